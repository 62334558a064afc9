"""From one stage of training to the next: which checkpoint may be its base, what is taken over, what is refused."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig, parser
from torch import Tensor

from fm_policy.configuration_fm_ft import FlowMatchingConfig

# For each stage, the stages whose checkpoints it may be loaded from: its own, to go on, or the one before.
BASES = {
    "pretrain": ("pretrain",),
    "finetune": ("pretrain", "finetune"),
    "residual": ("pretrain", "finetune", "residual"),
}

# What makes the weights and their meaning, of a head, too. A U-Net of another horizon would load without a word.
INHERITED = (
    *("input_features", "output_features", "normalization_mapping", "n_obs_steps", "horizon"),
    *("resize_shape", "crop_shape", "vision_backbone", "use_group_norm", "spatial_softmax_num_keypoints"),
    *("use_separate_rgb_encoder_per_camera", "velocity_net", "down_dims", "kernel_size", "n_groups"),
    *("time_embed_dim", "transformer_dim", "transformer_layers", "transformer_heads"),
)

HEAD = ("head", "head_mode", "head_layout", "head_activations", "head_width", "head_rate")


def is_new_run() -> bool:
    """Whether a training starts from another one's checkpoint, and is no resumed one.

    LeRobot tells neither the policy nor its configuration; it decides by the command line itself, as here.
    """
    return parser.get_path_arg("policy") is not None


def starts_new_stage(config: FlowMatchingConfig, folder: Path, trains: bool) -> bool:
    """Whether a policy of this configuration starts a new stage from the checkpoint, instead of going on with its own.

    Fine-tuning that starts from a fine-tuned policy is a new stage, too: its base is that policy and no longer its
    base's.

    Args:
        config: Of the policy.
        folder: The checkpoint.
        trains: Whether the policy is loaded to be trained, and not to act.

    Raises:
        ValueError: If the checkpoint cannot be its base: another kind of policy, another shape, a later stage, a
            training that has not come to its end, or a teacher on another grid than its own.
    """
    base = PreTrainedConfig.from_pretrained(folder)
    if not isinstance(base, FlowMatchingConfig):
        raise ValueError(f"{folder} holds a policy of type {base.type!r}, expected 'fm_ft'")
    if base.stage not in BASES[config.stage]:
        raise ValueError(
            f"{folder} is of stage {base.stage!r}: stage {config.stage!r} goes on from {list(BASES[config.stage])}"
        )
    _mention_other_grid(config, base)
    further, new_run = base.stage != config.stage, trains and is_new_run()
    if further or new_run:
        _check_inherited(config, base, folder)
    if not (further or (new_run and config.stage == "finetune")):
        return False
    _check_finished(folder)
    _check_teacher(config, base, folder)
    return True


def _check_teacher(config: FlowMatchingConfig, base: FlowMatchingConfig, folder: Path) -> None:
    """Refuse to learn from a tuned policy on a grid that it was not tuned through: there it is another, worse one."""
    if base.stage == "pretrain" or config.coupling != "reflow":
        return
    solver, steps = base.solver, base.num_solver_steps
    if (solver, steps) != ("euler", config.reflow_steps):
        advice = f": --policy.reflow_steps={steps}" if solver == "euler" else ", which reflow, by Euler's steps, cannot"
        raise ValueError(
            f"coupling='reflow' would learn from {folder} by {config.reflow_steps} steps of euler, but that policy "
            f"was fine-tuned through {steps} of {solver}{advice}"
        )


def _check_inherited(config: FlowMatchingConfig, base: FlowMatchingConfig, folder: Path) -> None:
    differing = [
        f"{name}: {getattr(base, name)} there, {getattr(config, name)} asked for"
        for name in (*INHERITED, *(HEAD if base.stage == "residual" else ()))
        if _plain(getattr(base, name)) != _plain(getattr(config, name))
    ]
    if differing:
        raise ValueError(
            f"stage {config.stage!r} keeps the shape of its base {folder}, but:\n  " + "\n  ".join(differing)
        )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_finished(folder: Path) -> None:
    """Refuse a checkpoint from the middle of its training; one without that training's records is a chosen one."""
    state, settings = folder.parent / "training_state" / "training_step.json", folder / "train_config.json"
    if not (state.is_file() and settings.is_file()):
        return
    step, steps = json.loads(state.read_text())["step"], json.loads(settings.read_text())["steps"]
    if step < steps:
        raise ValueError(
            f"{folder} is half-trained: step {step} of {steps}. Resume that training; or, where an earlier checkpoint "
            f"is the better one, choose it: python -m fm_policy.select {folder.absolute().parents[2]} --out DIR"
        )


def _mention_other_grid(config: FlowMatchingConfig, base: FlowMatchingConfig) -> None:
    trained, now = (_grid(c, with_head=base.stage == "residual") for c in (base, config))
    if base.stage != "pretrain" and trained != now:
        logging.warning(f"The policy was fine-tuned through {trained} and now runs {now}: another map than the tuned.")


def _grid(config: FlowMatchingConfig, with_head: bool) -> str:
    flow = f"{config.solver} in {config.num_solver_steps} steps"
    return f"{flow} and a head of {config.head_steps} steps to 1 + {config.head_span}" if with_head else flow


def first_weights(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a stage starts with: its base's averaged net in every role; all else, a head too, newly made.

    Args:
        weights: Of the base's file: `net.*`, perhaps `ema_net.*`, counters.
        fresh: The new policy's own.
    """
    average = {name.removeprefix("ema_"): w for name, w in weights.items() if name.startswith("ema_net.")}
    net = average or {name: w for name, w in weights.items() if name.startswith("net.")}
    roles = [role for role in ("", "ema_", "base_") if any(name.startswith(f"{role}net.") for name in fresh)]
    inherited = tuple(f"{role}net.{part}." for role in roles for part in ("encoder", "velocity"))
    new = {name: w for name, w in fresh.items() if not name.startswith(inherited)}
    return new | {role + name: w.clone() for role in roles for name, w in net.items()}


def completed_weights(weights: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights for a policy of the same stage, which may keep other copies of the net than the file.

    A file of averaged weights alone starts a new average (`use_ema`) and is its own base; a policy that is loaded to
    act needs no base.
    """
    complete = {name: w for name, w in weights.items() if name in fresh or not name.startswith("base_net.")}
    for role in ("ema_", "base_"):
        wanted = any(name.startswith(f"{role}net.") for name in fresh)
        if wanted and not any(name.startswith(f"{role}net.") for name in weights):
            net = {role + name: w.clone() for name, w in weights.items() if name.startswith("net.")}
            complete |= {name: w for name, w in net.items() if name in fresh}  # a base has no head
            complete |= {name: w for name, w in fresh.items() if name == f"{role}updates"}
    return complete


def check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: str) -> None:
    """Check that weights fit a policy.

    Raises:
        ValueError: Naming every missing, unexpected or wrongly shaped weight.
    """
    problems = [f"missing: {name}" for name in expected.keys() - weights.keys()]
    problems += [f"unexpected: {name}" for name in weights.keys() - expected.keys()]
    problems += [
        f"wrong shape: {name} is {tuple(weights[name].shape)}, the configuration makes it {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        raise ValueError(f"{file} does not fit its configuration, {len(problems)} weights differ:\n  {shown}")
