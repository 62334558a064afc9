"""Which checkpoint is the best, and from which others the data separate it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fm_policy.evaluation.statistics import Interval, mean_interval, paired_difference


@dataclass(frozen=True)
class Standing:
    """How a checkpoint compares with the best.

    Attributes:
        mean: Of the criterion.
        interval: 95 % interval of that mean; None if it is unknown.
        difference: Mean minus the best's.
        difference_interval: 95 % interval of the paired difference; None if it is unknown.
        separated: Whether that interval excludes 0; the best itself is not separated from itself.
    """

    mean: float
    interval: Interval | None
    difference: float
    difference_interval: Interval | None
    separated: bool


def usable(values: Mapping[str, NDArray[np.float64]]) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """Part what can be compared from what cannot: the criteria that are finite, and why the others are skipped.

    Weights that are finite, but enormous, make chunks that are not.

    Raises:
        ValueError: If nothing can be compared.
    """
    finite = {name: value for name, value in values.items() if np.isfinite(value).all()}
    skipped = {name: "its training diverged: its criterion is not finite" for name in values if name not in finite}
    if not finite:
        raise ValueError(f"no checkpoint can be chosen: the criterion of {', '.join(skipped)} is not finite")
    return finite, skipped


def choose(values: Mapping[str, NDArray[np.float64]], smallest: bool) -> tuple[str, dict[str, Standing]]:
    """Choose the best mean, the first of equals, and compare every checkpoint with it.

    The intervals do not count that the best was picked from these very values: they flatter it a little, the
    more the more checkpoints there are.

    Args:
        values: Finite criterion of every checkpoint, `(episodes or seeds, draws or repeats)`, the same ones for all.
        smallest: Whether less is better.

    Returns:
        The best one's name, and how each one stands.
    """
    sign = 1 if smallest else -1
    best = min(values, key=lambda name: sign * values[name].mean())
    return best, {name: _standing(value, values[best]) for name, value in values.items()}


def _standing(values: NDArray[np.float64], best: NDArray[np.float64]) -> Standing:
    difference, interval = paired_difference(values, best)
    separated = interval is not None and not interval[0] <= 0 <= interval[1]
    return Standing(float(values.mean()), mean_interval(values), difference, interval, separated)
