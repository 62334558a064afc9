import numpy as np
import pytest

from fm_policy.evaluation.episodes import Episode
from fm_policy.evaluation.statistics import (
    best_of_repeats,
    mean_interval,
    paired_difference,
    share_interval,
    table,
    wilson_interval,
    wins_and_losses,
)


def episode(seed: int, repeat: int, reward: float, success: bool = False) -> Episode:
    return Episode(seed, repeat, None, reward, reward, {}, success, steps=1, nfe=1, chunks=1)


@pytest.mark.parametrize(
    ("share", "trials", "expected"),
    [(0.64, 50, (0.501, 0.759)), (0.0, 10, (0.0, 0.278)), (1.0, 10, (0.722, 1.0)), (0.5, 500, (0.456, 0.544))],
)
def test_wilson_interval_gives_published_values(share, trials, expected):
    assert wilson_interval(share, trials) == pytest.approx(expected, abs=1e-3)


def test_wilson_interval_is_where_the_score_test_turns():
    """Its ends p are the shares whose own standard error puts the observed share 1.96 of them away."""
    for end in wilson_interval(0.3, 40):
        assert abs(0.3 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 40), rel=1e-6)


def outcomes(rng: np.random.Generator, seeds: int, repeats: int, spread: float) -> np.ndarray:
    """Successes whose chance differs from start to start, 0.5 on average."""
    chances = rng.beta(1 / spread, 1 / spread, size=(seeds, 1))
    return (rng.random((seeds, repeats)) < chances).astype(float)


@pytest.mark.parametrize("interval", [mean_interval, share_interval])
@pytest.mark.parametrize(("seeds", "repeats", "spread"), [(200, 1, 2.0), (50, 10, 2.0), (50, 10, 0.01)])
def test_intervals_hold_the_truth_95_times_in_100(interval, seeds, repeats, spread):
    rng = np.random.default_rng(0)
    intervals = [interval(outcomes(rng, seeds, repeats, spread)) for _ in range(1500)]
    held = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert 0.93 < held < 0.97


@pytest.mark.parametrize(("seeds", "repeats"), [(2, 10), (3, 10), (5, 10), (10, 3)])
@pytest.mark.parametrize("spread", [2.0, 0.5])
def test_few_seeds_make_a_wide_interval_however_many_repeats_they_have(seeds, repeats, spread):
    rng = np.random.default_rng(0)
    intervals = [share_interval(outcomes(rng, seeds, repeats, spread)) for _ in range(1000)]
    assert np.mean([low <= 0.5 <= high for low, high in intervals]) > 0.93


def test_repeats_of_one_seed_are_worth_one_trial():
    assert share_interval(np.array([[1.0] * 9 + [0.0]])) == wilson_interval(0.9, 1)
    assert share_interval(np.array([[1.0, 0.0], [0.0, 1.0]])) == wilson_interval(0.5, 2)  # alike, by whatever chance


def test_an_interval_that_counted_episodes_would_be_too_narrow():
    rng = np.random.default_rng(0)
    values = [outcomes(rng, 50, 10, spread=2.0) for _ in range(500)]
    held = np.mean([low <= 0.5 <= high for low, high in (wilson_interval(v.mean(), v.size) for v in values)])
    assert held < 0.8


def test_share_interval_is_wilsons_of_the_episodes_with_one_repeat_and_of_the_seeds_if_the_start_decides():
    rng = np.random.default_rng(1)
    column = (rng.random((40, 1)) < 0.3).astype(float)
    expected = wilson_interval(column.mean(), 40)
    assert share_interval(column) == pytest.approx(expected)
    assert share_interval(np.repeat(column, 5, axis=1)) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_interval_of_unanimous_episodes_counts_seeds(share):
    assert share_interval(np.full((20, 3), share)) == wilson_interval(share, 20)


def test_mean_interval_of_one_seed_is_unknown():
    assert mean_interval(np.ones((1, 50))) is None


def test_paired_difference_is_students_interval_of_the_seeds_differences():
    """Differences of the seeds' means 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653."""
    starts = np.array([[10.0, 20.0], [-300.0, 5.0], [0.5, 70.0]])  # what a start does to both cancels
    gains = np.array([[0.0, 2.0], [2.0, 2.0], [1.0, 5.0]])
    difference, interval = paired_difference(starts + gains, starts)
    assert difference == pytest.approx(2)
    assert interval == pytest.approx((2 - 4.302653 / np.sqrt(3), 2 + 4.302653 / np.sqrt(3)), rel=1e-6)


def test_paired_difference_of_one_seed_has_no_interval():
    assert paired_difference(np.array([[0.5, 0.7]]), np.array([[0.1, 0.1]])) == (pytest.approx(0.5), None)


def test_tables_of_other_seeds_cannot_be_paired():
    with pytest.raises(ValueError, match=r"tables of \(3, 1\) and \(3, 2\)"):
        paired_difference(np.ones((3, 1)), np.ones((3, 2)))


def test_wins_and_losses_leave_ties_out():
    ours, theirs = np.array([[1, 0, 1], [1, 1, 0]]), np.array([[0, 0, 1], [0, 1, 1]])
    assert wins_and_losses(ours, theirs) == (2, 1)


def test_best_of_repeats_averages_the_best_of_each_seed():
    assert best_of_repeats(np.array([[0.1, 0.9], [0.5, 0.3]])) == pytest.approx(0.7)


def test_table_orders_by_seed_and_repeat():
    episodes = [episode(7, 1, 0.4), episode(3, 0, 0.1), episode(7, 0, 0.3), episode(3, 1, 0.2)]
    assert table(episodes, "max_reward").tolist() == [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    "episodes",
    [[], [episode(3, 0, 0), episode(3, 1, 0), episode(7, 0, 0)], [episode(3, 0, 0), episode(3, 0, 0)]],
)
def test_table_refuses_holes_and_doubles(episodes):
    with pytest.raises(ValueError, match="do not fill a table"):
        table(episodes, "success")
