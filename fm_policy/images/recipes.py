"""The rows of the table, and what each data set's are made with."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from fm_policy.images.net import Shape
from fm_policy.images.training import COUPLINGS, Recipe


@dataclass(frozen=True)
class Plan:
    """All sizes of one data set's table.

    Attributes:
        shape: Of the flow's net.
        base: Flow matching on independent pairs.
        tuned: Eq. (6), from a base.
        head_lr: Learning rate of the heads, which are otherwise trained as `tuned`.
        samples: Images that a cell is measured on.
        batch: Images drawn at once.
        classifier_steps: Of the training of the classifier whose features are measured.
    """

    shape: Shape
    base: Recipe
    tuned: Recipe
    head_lr: float
    samples: int
    batch: int
    classifier_steps: int


# Of CIFAR-10: Tong et al.'s net and training, which the paper took over. Not told by the paper, and chosen: all of
# `tuned`. Adam's learning rate of the base is constant after its growth.
PLANS = {
    "digits": Plan(
        Shape((16, 32)),
        Recipe("matching", "independent", 2000, 64, 1e-3, warmup=100, cosine=True),
        Recipe("likelihood", "inverse", 100, 32, 1e-4, solver_steps=4, k=8),
        head_lr=1e-3,
        samples=500,
        batch=250,
        classifier_steps=700,
    ),
    "fashion": Plan(
        Shape((64, 128), layers=2, attention=(1,)),
        Recipe("matching", "independent", 40_000, 128, 5e-4, warmup=1000, cosine=True),
        Recipe("likelihood", "inverse", 1000, 64, 5e-5, solver_steps=4, k=8),
        head_lr=1e-3,
        samples=10_000,
        batch=500,
        classifier_steps=6000,
    ),
    "cifar10": Plan(
        Shape((128, 256, 256, 256), layers=2, attention=(1,), head_channels=64, dropout=0.1, groups=32),
        Recipe("matching", "independent", 400_000, 128, 2e-4, warmup=5000, flip=True),
        Recipe("likelihood", "inverse", 2000, 64, 1e-5, solver_steps=16, k=2, flip=True),
        head_lr=1e-4,
        samples=50_000,
        batch=200,
        classifier_steps=20_000,
    ),
}


class Row(NamedTuple):
    """A row of the table: its title and the making of its model."""

    title: str
    recipe: Recipe


BASES = {"i-cfm": "I-CFM", "ot-cfm": "OT-CFM"}
HEAD_TITLES = {"unet": "U-Net", "control_synth": "ControlSynth"}


def rows(plan: Plan) -> dict[str, Row]:
    """All rows by their keys, which name files; a row comes after the one that it starts from."""
    found = {}
    for base, title in BASES.items():
        made = replace(plan.base, coupling="ot") if base == "ot-cfm" else plan.base
        found[base] = Row(title, made)
        for coupling in COUPLINGS:
            tuned = replace(plan.tuned, start=base, coupling=coupling)
            found[f"{base}-ft-{coupling}"] = Row(f"FT from {title}, {coupling}", tuned)
        # The controls: as many images through the net as the default fine-tuning lets through it.
        steps = max(1, round(plan.tuned.cost() / replace(made, steps=1).cost()))
        slow = replace(made, start=base, steps=steps, lr=plan.tuned.lr, warmup=0, cosine=False)
        found[f"{base}-continued-slow"] = Row(f"{title} continued, FT's rate", slow)
        anew = replace(made, start=base, steps=steps, warmup=min(made.warmup, steps // 10))
        found[f"{base}-continued-anew"] = Row(f"{title} continued, own schedule anew", anew)
        for head, name in HEAD_TITLES.items():
            behind = replace(plan.tuned, start=base, head=head, lr=plan.head_lr)
            found[f"{base}-resft-{head}"] = Row(f"ResFT ({name}) behind {title}", behind)
    return found


# What is made unless rows are named: other pairs than the default's, and heads, behind the first base only.
DEFAULT_ROWS = [
    "i-cfm",
    "i-cfm-ft-inverse",
    "i-cfm-continued-slow",
    "i-cfm-continued-anew",
    "ot-cfm",
    "ot-cfm-ft-inverse",
    "ot-cfm-continued-slow",
    "ot-cfm-continued-anew",
    "i-cfm-resft-unet",
    "i-cfm-resft-control_synth",
    "i-cfm-ft-independent",
    "i-cfm-ft-ot",
    "i-cfm-ft-nearest",
]
