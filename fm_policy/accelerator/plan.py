"""What is trained and how: a method, the configuration that its checkpoint gets, and the optimiser's schedule.

All of it comes from recipes of this package. `fm` and `ddpm` are trained by the first stage's, and differ in the loss
alone. `ft` fine-tunes `fm` by a recipe of the second stage. `fm_continued` is its control: the loss of `fm`, the rate
of `ft`, and as many steps as cost its floating-point operations.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm_policy.accelerator import diffusion
from fm_policy.recipes import RecipeKey, available

METHODS = ("fm", "fm_continued", "ft", "ddpm")
TUNING_OF = {
    "reflow": RecipeKey("pusht", "state", None, "finetune"),  # a distillation, at whatever is observed
    "nearest": RecipeKey("pusht", "image", None, "finetune"),
    "independent": RecipeKey("pusht", "image", None, "finetune"),
}
"""Couplings of `ft`, and where its rate and steps are from."""


@dataclass(frozen=True)
class Plan:
    """A training.

    Attributes:
        name: Of its folder.
        method: One of `METHODS`.
        policy: Every field of the policy's configuration, as recipes have them.
        steps: Of the optimiser.
        batch: Windows per step.
        lr: Largest rate of AdamW.
        warmup: Steps of linear growth.
        cosine: Whether the rate then falls to 0 by a cosine.
        seed: Decides all that is drawn.
        held_out: Share of the episodes that is kept from training.
        bf16: Whether the nets compute in bfloat16; weights, losses and averages stay in float32.
        compile: Whether encoder and velocity net are compiled. The compiler may time kernels and choose anew in the
            next slice, so that roundings repeat only where it chooses alike.
    """

    name: str
    method: str
    policy: dict[str, Any]
    steps: int
    batch: int
    lr: float
    warmup: int
    cosine: bool
    seed: int
    held_out: float
    bf16: bool = False
    compile: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: diffusers' schedules `cosine` and `constant`."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * share)) if self.cosine else 1.0)


def read_recipe(file: Path | None, key: RecipeKey) -> dict[str, Any]:
    """A recipe, that of this package unless a file is named.

    Raises:
        ValueError: If the file is no recipe.
    """
    file = available()[key] if file is None else file
    try:
        recipe = json.loads(file.read_text(encoding="utf-8"))
        return {name: recipe[name] for name in ("policy", "steps", "batch_size", "seed", "dataset")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no recipe: {error!r}") from error


def first_stage(method: str, recipe: Mapping[str, Any], **changes: Any) -> Plan:
    """The plan of `fm` or `ddpm`.

    Args:
        method: Which.
        recipe: Of the first stage, e.g. `pusht_image.json`.
        **changes: Fields of the plan that are not the recipe's, where they are not None.

    Raises:
        ValueError: If the schedule is another than the cosine, the net none that the method can have, or what is
            observed shall be noisy.
    """
    policy = recipe["policy"]
    if policy["scheduler_name"] != "cosine":
        raise ValueError(f"scheduler_name must be 'cosine', got {policy['scheduler_name']!r}")
    _check_clear(policy)
    if method == "ddpm":
        diffusion.check(policy)
    schedule = {"lr": policy["optimizer_lr"], "warmup": policy["scheduler_warmup_steps"], "cosine": True}
    return Plan(**{"name": method, "method": method, "policy": dict(policy), **schedule, **_common(recipe, changes)})


def second_stage(
    recipe: Mapping[str, Any], tuning: Mapping[str, Any], coupling: str, solver_steps: int | None, **changes: Any
) -> Plan:
    """The plan of `ft`.

    Args:
        recipe: Of the first stage.
        tuning: Of the second one: what it changes in the first one's configuration, rate, steps and batch.
        coupling: One of `TUNING_OF`.
        solver_steps: Steps that eq. (6) goes through; None: the recipe's.
        **changes: As for `first_stage`.

    Raises:
        ValueError: If the coupling is unknown, the loss another than eq. (6), or what is observed shall be noisy.
    """
    if coupling not in TUNING_OF:
        raise ValueError(f"coupling must be one of {list(TUNING_OF)}, got {coupling!r}")
    policy = recipe["policy"] | {name: value for name, value in tuning["policy"].items() if name != "path"}
    policy |= {"coupling": coupling, "num_solver_steps": solver_steps or policy["num_solver_steps"]}
    if policy["stage"] != "finetune" or policy["variance"] != "scalar" or policy["cfm_weight"]:
        raise ValueError("the second stage's recipe must be of eq. (6) alone: stage finetune, variance scalar")
    _check_clear(policy)
    schedule = {"lr": policy["finetune_lr"], "warmup": 0, "cosine": coupling == "reflow"}
    name = f"ft_{coupling}_{policy['num_solver_steps']}"
    fields = {"name": name, "method": "ft", "policy": policy, **schedule, **_common(tuning, changes)}
    return Plan(**fields | {"held_out": recipe["dataset"]["eval_split"]})


def control(tuned: Plan, recipe: Mapping[str, Any], times: float) -> Plan:
    """The plan of `fm_continued`.

    Args:
        tuned: The plan that it is the control of.
        recipe: Of the first stage.
        times: Cost of a step of that plan in steps of flow matching.
    """
    fields = vars(tuned) | {"name": f"fm_continued_for_{tuned.name}", "method": "fm_continued"}
    return Plan(**fields | {"policy": dict(recipe["policy"]), "steps": max(1, round(tuned.steps * times))})


def _check_clear(policy: Mapping[str, Any]) -> None:
    if policy["observation_noise"]:
        raise ValueError(
            f"this training disturbs nothing: observation_noise must be 0, got {policy['observation_noise']}"
        )


def _common(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: recipe[key] for name, key in {"steps": "steps", "batch": "batch_size", "seed": "seed"}.items()}
    own["held_out"] = recipe["dataset"]["eval_split"]
    return own | {name: value for name, value in changes.items() if value is not None}
