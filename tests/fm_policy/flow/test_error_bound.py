"""Theorem 1: the bounds by hand, against the recursion they solve, and against flows that are known in closed form."""

import math
import runpy
from pathlib import Path

import pytest
import torch

from fm_policy.flow.error_bound import any_grid_bound, uniform_grid_bound, uniform_grid_bound_exponential
from fm_policy.flow.solvers import integrate

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[3] / "eval" / "known_flows.py"))
LinearFields = PROGRAM["LinearFields"]
ROUNDING = 1 + 1e-12


def worst_error(lipschitz, curvature, delta, steps, initial=0.0):
    """The recursion (B.3) at its worst, step by step."""
    error = torch.as_tensor(initial, dtype=torch.float64)
    for tau in torch.as_tensor(steps, dtype=torch.float64).unbind(-1):
        error = (1 + lipschitz * tau) * error + delta * tau + curvature * tau**2 / 2
    return error


def log_uniform(low, high, *shape, seed):
    u = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low * (high / low) ** u


@pytest.fixture(scope="module", params=[2, 3, 4, 8, 16, 32])
def wild(request):
    """50 000 times L, M and δ, and as many grids whose steps differ by up to nine orders of magnitude."""
    rows, n = 50_000, request.param
    ranges = ((0.01, 50), (1e-4, 10), (1e-4, 10))
    sizes = [log_uniform(low, high, rows, seed=10 * n + i) for i, (low, high) in enumerate(ranges)]
    drawn = log_uniform(1e-9, 1, rows, n, seed=10 * n + 3)
    growing = drawn.sort(dim=-1).values
    steps = torch.cat([order[i::3] for i, order in enumerate((drawn, growing, growing.flip(-1)))])
    return sizes, steps / steps.sum(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def drawn():
    """3000 fields x' = a x + b sin 3t, and a δ for each."""
    return PROGRAM["draw_fields"](3000, seed=0)


@pytest.fixture(scope="module")
def sizes(drawn):
    """L, M and δ of the fields."""
    fields, delta = drawn
    return fields.a.abs(), fields.curvature(), delta


@pytest.fixture(scope="module")
def ratios(drawn):
    """Error / bound of every bound, for every perturbation and grid."""
    return PROGRAM["compare"](*drawn, seed=0)


class TestFormulas:
    def test_by_hand(self):
        # L = 2, M = 6, δ = 0.5; steps .25 and .75: 0.5 * 1 + 3 * (.0625 + .5625) = 2.375
        assert any_grid_bound(2, 6, 0.5, [0.25, 0.75]).item() == pytest.approx(2.375 * math.exp(0.5))
        with_start = 2.375 * math.exp(0.5) + 0.1 * math.exp(2)
        assert any_grid_bound(2, 6, 0.5, [0.25, 0.75], initial=0.1).item() == pytest.approx(with_start)
        # N = 2: 0.5 + 6 / 4 = 2, times ((1 + 1)^2 - 1) / 2 or (e^2 - 1) / 2
        assert uniform_grid_bound(2, 6, 0.5, 2).item() == pytest.approx(3)
        assert uniform_grid_bound_exponential(2, 6, 0.5, 2).item() == pytest.approx(math.exp(2) - 1)

    @pytest.mark.parametrize("lipschitz", [0.0, 1e-300, 1e-17, 1e-9])
    def test_without_a_lipschitz_constant_nothing_is_amplified(self, lipschitz):
        limit = pytest.approx(0.3 + 2 / 10, rel=1e-8)
        assert uniform_grid_bound(lipschitz, 2, 0.3, 5).item() == limit
        assert uniform_grid_bound_exponential(lipschitz, 2, 0.3, 5).item() == limit
        assert any_grid_bound(lipschitz, 2, 0.3, [0.2] * 5, initial=0.0).item() == limit

    def test_a_straight_flow_and_an_exact_field_leave_no_error(self):
        for lipschitz in (0.0, 3.0, 1e4):  # e^1e4 is beyond double precision
            assert any_grid_bound(lipschitz, 0, 0, [0.25] * 4) == 0
            assert uniform_grid_bound(lipschitz, 0, 0, 2000) == uniform_grid_bound_exponential(lipschitz, 0, 0, 4) == 0

    def test_beyond_double_precision_the_bound_is_infinite_and_never_too_small(self):
        assert any_grid_bound(1e4, 0, 1e-3, [0.25] * 4).isinf()
        assert uniform_grid_bound_exponential(1e4, 0, 1e-3, 4).isinf()

    def test_numbers_and_grids_broadcast(self):
        lipschitz, delta = torch.rand(2, 5, 1, dtype=torch.float64)
        grids = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.8, 0.2]], dtype=torch.float64)
        bounds = any_grid_bound(lipschitz, 1.0, delta, grids)
        assert bounds.shape == (5, 3)
        assert bounds[3, 1] == any_grid_bound(lipschitz[3].item(), 1.0, delta[3].item(), [0.1, 0.9])
        assert uniform_grid_bound(lipschitz, 1.0, delta, 4).shape == (5, 1)

    @pytest.mark.parametrize("name", ["lipschitz", "curvature", "delta"])
    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, torch.tensor([1.0, -2.0])])
    def test_refuses_a_size_that_is_none(self, name, value):
        sizes = {"lipschitz": 1.0, "curvature": 1.0, "delta": 1.0} | {name: value}
        for bound, grid in (
            (any_grid_bound, [0.5, 0.5]),
            (uniform_grid_bound, 2),
            (uniform_grid_bound_exponential, 2),
        ):
            with pytest.raises(ValueError, match=f"^{name} must be finite and at least 0, got"):
                bound(**sizes, **{"steps" if bound is any_grid_bound else "num_steps": grid})

    def test_refuses_an_initial_error_below_0(self):
        with pytest.raises(ValueError, match=r"^initial must be finite and at least 0, got -1"):
            any_grid_bound(1, 1, 1, [1.0], initial=-1)

    @pytest.mark.parametrize("steps", [[], [0.5, 0.0, 0.5], [1.5, -0.5], [math.nan], [math.inf], 0.5])
    def test_refuses_steps_that_are_none(self, steps):
        with pytest.raises(ValueError, match="^steps must be one or more step sizes, all finite and positive, got"):
            any_grid_bound(1, 1, 1, steps)

    @pytest.mark.parametrize("bound", [uniform_grid_bound, uniform_grid_bound_exponential])
    @pytest.mark.parametrize("num_steps", [0, -3, 2.5])
    def test_refuses_a_number_of_steps_that_is_none(self, bound, num_steps):
        with pytest.raises(ValueError, match=f"^num_steps must be a whole number of at least 1, got {num_steps}"):
            bound(1, 1, 1, num_steps)


class TestWorstRecursion:
    """(B.3) with equality, 300 000 times."""

    def test_never_exceeds_bound_4(self, wild):
        sizes, steps = wild
        ratio = worst_error(*sizes, steps) / any_grid_bound(*sizes, steps)
        assert ratio.max() <= ROUNDING
        assert ratio.max() > 0.95

    def test_never_exceeds_bound_4_with_an_initial_error(self, wild):
        sizes, steps = wild
        initial = log_uniform(1e-6, 10, len(steps), seed=1)
        worst, bound = worst_error(*sizes, steps, initial), any_grid_bound(*sizes, steps, initial)
        assert (worst <= bound * ROUNDING).all()
        # One factor for both, e^{L t_{N-1}}, would be too small: an initial error passes the last step too.
        without = any_grid_bound(*sizes, steps)
        one_factor = without + (bound - without) * torch.exp(-sizes[0] * steps[:, -1])
        assert (worst > one_factor * ROUNDING).any()

    def test_bound_4_needs_its_factor(self, wild):
        sizes, steps = wild
        unamplified = any_grid_bound(0.0, *sizes[1:], steps)
        assert (worst_error(*sizes, steps) > unamplified * ROUNDING).double().mean() > 0.5
        # A factor that stops one step earlier, e^{L t_{N-2}}, is too small as well.
        early = unamplified * torch.exp(sizes[0] * steps[:, :-2].sum(-1))
        assert (worst_error(*sizes, steps) > early * ROUNDING).any()

    def test_every_grid_of_three_steps(self):
        share = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
        first, second = (x.flatten() for x in torch.meshgrid(share, share, indexing="ij"))
        steps = torch.stack([first, (1 - first) * second, (1 - first) * (1 - second)], dim=-1)
        for lipschitz in (1e-3, 0.1, 1.0, 5.0, 100.0):
            for curvature, delta in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
                worst = worst_error(lipschitz, curvature, delta, steps)
                assert (worst <= any_grid_bound(lipschitz, curvature, delta, steps) * ROUNDING).all()

    @pytest.mark.parametrize("num_steps", [1, 2, 7, 32, 1000])
    def test_bound_5_is_its_solution_on_equal_steps(self, num_steps):
        sizes = [log_uniform(0.01, 10, 1000, seed=num_steps + i) for i in range(3)]
        steps = [1 / num_steps] * num_steps
        bound = uniform_grid_bound(*sizes, num_steps)
        torch.testing.assert_close(worst_error(*sizes, steps), bound, rtol=1e-11, atol=0)
        for looser in (uniform_grid_bound_exponential(*sizes, num_steps), any_grid_bound(*sizes, steps)):
            assert (bound <= looser * ROUNDING).all()


class TestLinearFields:
    """Euler on 3000 perturbed fields x' = a x + b sin 3t whose flow is known."""

    def test_the_solution_solves_the_equation(self, drawn):
        fields, _ = drawn
        torch.testing.assert_close(fields.solution(0.0), fields.start, rtol=0, atol=0)
        numerical = integrate(fields.velocity, fields.start, "rk4", 400)
        torch.testing.assert_close(fields.solution(1.0), numerical, rtol=1e-9, atol=1e-9)
        h = 1e-4
        for t in (0.1, 0.5, 0.93):
            before, now, after = (fields.solution(s) for s in (t - h, t, t + h))
            torch.testing.assert_close((after - before) / (2 * h), fields.velocity(t, now), rtol=0, atol=1e-5)
            torch.testing.assert_close((after - 2 * now + before) / h**2, fields.acceleration(t), rtol=0, atol=1e-4)

    def test_the_curvature_is_never_too_small_and_hardly_too_large(self, drawn):
        fields, _ = drawn
        times = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
        seen = torch.stack([fields.acceleration(t).abs() for t in [0.0, 1.0, *times]]).amax(0)
        assert (seen <= fields.curvature()).all()
        assert (fields.curvature() / seen).median() < 1.01

    @pytest.mark.parametrize("kind", PROGRAM["PERTURBATIONS"])
    def test_the_perturbation_is_no_larger_than_delta_and_reaches_it(self, drawn, kind):
        fields, delta = drawn
        v = PROGRAM["perturbed"](fields, delta, kind)
        points = torch.linspace(-3, 3, 101, dtype=torch.float64)
        gaps = torch.stack([(v(0.3, x) - fields.velocity(0.3, x)).abs() / delta for x in points])
        assert gaps.max() <= 1 + 1e-9
        assert gaps.amax(0).min() > 0.99

    def test_the_steps_are_those_of_the_deployed_solver(self, drawn):
        fields, delta = drawn
        v = PROGRAM["perturbed"](fields, delta, "sine")
        error = PROGRAM["euler_errors"](fields, delta, "sine", [[1 / 16] * 16])[0]
        deployed = (integrate(v, fields.start, "euler", 16) - fields.solution(1.0)).abs()
        torch.testing.assert_close(error, deployed, rtol=0, atol=1e-12)

    def test_the_random_grids_lead_from_0_to_1_with_wild_steps(self):
        grids = PROGRAM["random_grids"](seed=0)
        assert {len(steps) for steps in grids} == set(range(2, 33))
        assert [sum(steps) for steps in grids] == pytest.approx([1.0] * len(grids))
        assert max(max(steps) / min(steps) for steps in grids) > 500

    def test_no_bound_is_violated(self, ratios):
        assert sum(ratio.numel() for ratio in ratios.values()) > 1_000_000
        assert {name: (ratio > 1).sum().item() for name, ratio in ratios.items()} == dict.fromkeys(ratios, 0)

    def test_the_bounds_are_tight(self, ratios):
        largest = {name: ratio.max().item() for name, ratio in ratios.items()}
        assert 0.81 < largest["(4), equal steps"] < 1 and 0.81 < largest["(4), random steps"] < 1
        assert 0.96 < largest["(5) with e^L"] < largest["(5) with (1 + L/N)^N"] < 1

    def test_every_part_of_the_bounds_is_needed(self, ratios, drawn, sizes):
        lipschitz, curvature, delta = sizes
        equal = {n: PROGRAM["euler_errors"](*drawn, "adversarial", [[1 / n] * n])[0] for n in (4, 16)}
        for n, error in equal.items():
            for understated in (
                (0.5 * lipschitz, curvature, delta),
                (lipschitz, 0.5 * curvature, delta),
                (lipschitz, curvature, 0.5 * delta),
            ):
                assert (error > uniform_grid_bound(*understated, n)).sum() > 30
            # (4) without its factor
            assert (error > any_grid_bound(0.0, curvature, delta, [1 / n] * n)).sum() > 30
        # (4) is looser, yet a curvature or a training error left out shows
        assert (equal[16] > any_grid_bound(lipschitz, 0.0, delta, [1 / 16] * 16)).sum() > 30
        assert (equal[16] > any_grid_bound(lipschitz, curvature, 0.0, [1 / 16] * 16)).sum() > 30

    @pytest.mark.parametrize("num_steps", [1, 2, 8, 32])
    def test_an_initial_error_stays_within_bound_4(self, drawn, sizes, num_steps):
        fields, delta = drawn
        initial = log_uniform(1e-3, 1, 3000, seed=5)
        start = fields.start - initial * fields.acceleration(0.0).sign()
        end = integrate(PROGRAM["perturbed"](fields, delta, "adversarial"), start, "euler", num_steps)
        error = (end - fields.solution(1.0)).abs()
        bound = any_grid_bound(*sizes, [1 / num_steps] * num_steps, initial)
        assert (error <= bound).all()
        assert (error / bound).max() > 0.8
        assert (error > any_grid_bound(*sizes, [1 / num_steps] * num_steps)).any()

    @pytest.mark.parametrize(("num_steps", "share"), [(4, 0.439), (16, 0.767), (64, 0.931), (1024, 0.995)])
    def test_a_rising_field_with_a_constant_error_attains_bound_5(self, num_steps, share):
        rising = LinearFields(*torch.tensor([[3.0], [0.0], [0.0]], dtype=torch.float64))
        assert rising.curvature() == 0
        steps = [1 / num_steps] * num_steps
        (error,) = PROGRAM["euler_errors"](rising, torch.tensor([0.2]), "constant", [steps]).flatten().tolist()
        assert error == pytest.approx(uniform_grid_bound(3, 0, 0.2, num_steps).item(), rel=1e-6)
        assert error / uniform_grid_bound_exponential(3, 0, 0.2, num_steps).item() == pytest.approx(share, abs=1e-3)
        assert 3 < any_grid_bound(3, 0, 0.2, steps).item() / error < 3.5
