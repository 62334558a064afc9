"""What a set of episodes says, and how sure it is.

Episodes of one seed share their start, so they are not independent: every interval here counts seeds, not
episodes, and treats the seeds as a sample of all starts. With one repeat these are the usual intervals.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtrit

from fm_policy.evaluation.episodes import Episode

CONFIDENCE = 0.95

Interval = tuple[float, float]


def table(episodes: Sequence[Episode], name: str) -> NDArray[np.float64]:
    """One number of all episodes as `(seeds, repeats)`, in rising order of both.

    Args:
        episodes: The episodes.
        name: A field, or one of the measures.

    Raises:
        KeyError: If an episode has no such number.
        ValueError: If there is none, or if some seed lacks a repeat that another one has.
    """
    values = {episode.key: float(episode.to_row()[name]) for episode in episodes}
    seeds = sorted({key.seed for key in values})
    repeats = sorted({key.repeat for key in values})
    if not episodes or len(values) != len(episodes) or len(values) != len(seeds) * len(repeats):
        raise ValueError(
            f"{len(episodes)} episodes do not fill a table of {len(seeds)} seeds x {len(repeats)} repeats once"
        )
    return np.array([[values[seed, repeat] for repeat in repeats] for seed in seeds])  # type: ignore[index]


def mean_interval(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval | None:
    """Student's interval of the mean over the seeds' means; None for a single seed, which tells nothing.

    Args:
        values: `(seeds, repeats)`.
        confidence: Coverage, in (0, 1).
    """
    means = values.mean(axis=1)
    if len(means) < 2:
        return None
    error = means.std(ddof=1) / math.sqrt(len(means))
    half = float(stdtrit(len(means) - 1, (1 + confidence) / 2) * error)
    return float(means.mean()) - half, float(means.mean()) + half


def share_interval(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    """Wilson's interval of a share, for the number of independent trials that the episodes are worth.

    That number is p (1 - p) / variance of the mean over seeds (Kish's effective sample size), from the number of
    episodes, when repeats are independent or there is one repeat, to the number of seeds, when the start decides. Of
    several repeats the variance is an estimate, and counts for less the fewer seeds it is from (Korn & Graubard 1998).

    Args:
        values: Zeros and ones, `(seeds, repeats)`.
        confidence: Coverage, in (0, 1).
    """
    return wilson_interval(float(values.mean()), _effective_size(values, confidence), confidence)


def wilson_interval(share: float, trials: float, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval (Wilson 1927) of a share among a number of independent trials.

    Args:
        share: Observed share, in [0, 1].
        trials: Number of trials, positive.
        confidence: Coverage, in (0, 1).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    values: NDArray[np.float64], reference: NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[float, Interval | None]:
    """Mean of values minus reference on the same seeds, and Student's interval of it over the seeds.

    What a seed does to both cancels, so that the interval is narrower than those of the two means suggest.

    Args:
        values: `(seeds, repeats)`.
        reference: The same seeds and repeats in the same order.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If the shapes differ.
    """
    if values.shape != reference.shape:
        raise ValueError(f"tables of {values.shape} and {reference.shape} seeds and repeats cannot be paired")
    difference = values - reference
    return float(difference.mean()), mean_interval(difference, confidence)


def wins_and_losses(values: NDArray[np.float64], reference: NDArray[np.float64]) -> tuple[int, int]:
    """How often values exceed the reference on the same seed and repeat, and how often they fall below it."""
    return int((values > reference).sum()), int((values < reference).sum())


def bootstrap_interval(
    differences: NDArray[np.float64], confidence: float = CONFIDENCE, resamples: int = 10_000
) -> Interval | None:
    """Percentile interval (Efron 1979) of a mean over seeds; the same for the same numbers.

    None for a single seed, and where all seeds say the same: drawing them anew shows nothing of what lies between them.

    Args:
        differences: One number of each seed, `(seeds,)`.
        confidence: Coverage, in (0, 1).
        resamples: How often the seeds are drawn anew.
    """
    seeds = len(differences)
    if (differences == differences[0]).all():
        return None
    counts = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    low, high = np.quantile(counts @ differences / seeds, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test: how often fair coins are as uneven as this; ties do not count."""
    tosses = wins + losses
    return float(min(1.0, 2 * bdtr(min(wins, losses), tosses, 0.5))) if tosses else 1.0


def best_of_repeats(values: NDArray[np.float64]) -> float:
    """Mean over the seeds of the best repeat (the paper's "max performance"); values `(seeds, repeats)`."""
    return float(values.max(axis=1).mean())


def _effective_size(values: NDArray[np.float64], confidence: float) -> float:
    (seeds, repeats), share = values.shape, float(values.mean())
    variance = float(values.mean(axis=1).var(ddof=1)) / seeds if min(seeds, repeats) > 1 else 0.0
    if variance == 0:
        return seeds  # one repeat; or nothing tells whether the start decides: the careful reading
    sureness = NormalDist().inv_cdf((1 + confidence) / 2) / float(stdtrit(seeds - 1, (1 + confidence) / 2))
    return min(max(share * (1 - share) / variance * sureness**2, seeds), values.size)
