"""Diagnostics of fine-tuning on samples and gradients that are known."""

import pytest
import torch

from fm_policy.flow.diagnostics import StepGradients, mode_changes, spread
from fm_policy.flow.solvers import SCHEMES, integrate

K, B, HORIZON, ACTION_DIM = 32, 3, 4, 2


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestSpread:
    def test_of_two_samples_by_hand(self):
        samples = torch.zeros(2, 1, 2, 1)
        samples[0, 0, :, 0] = torch.tensor([1.0, 3.0])  # variances 1 / 2 and 9 / 2 over the noises
        assert spread(samples).item() == pytest.approx(2.5**0.5)

    def test_is_the_standard_deviation_of_each_observations_samples(self):
        sigma = torch.tensor([0.1, 1.0, 3.0]).view(1, B, 1, 1)
        samples = 5 * normal(1, B, HORIZON, ACTION_DIM) + sigma * normal(4000, B, HORIZON, ACTION_DIM, seed=1)
        torch.testing.assert_close(spread(samples), sigma.flatten(), rtol=0.02, atol=0)

    def test_of_a_map_that_ignores_its_noise_it_is_zero(self):
        assert spread(torch.ones(K, B, HORIZON, ACTION_DIM)).tolist() == [0.0] * B


class TestModeChanges:
    """Two modes at centre + and - direction, noise around each a tenth as wide as half their distance."""

    centre = 3 * normal(1, B, HORIZON, ACTION_DIM, seed=1)
    direction = normal(1, B, HORIZON, ACTION_DIM, seed=2)

    def chunks(self, share: float = 0.5) -> torch.Tensor:
        """The first `share` of the noises lead to the mode +."""
        sign = torch.where(torch.arange(K) < share * K, 1.0, -1.0).view(K, 1, 1, 1)
        width = 0.1 * self.direction.square().mean().sqrt()
        return self.centre + sign * self.direction + width * normal(K, B, HORIZON, ACTION_DIM, seed=3)

    def mirrored(self, chunks: torch.Tensor) -> torch.Tensor:
        return 2 * self.centre - chunks

    @pytest.mark.parametrize("share", [0.5, 0.25, 1 / K])
    def test_identity_changes_nothing_and_swapping_changes_all(self, share):
        before = self.chunks(share)
        assert not mode_changes(before, before).any()
        assert mode_changes(before, self.mirrored(before)).all()

    def test_identity_changes_nothing_of_a_long_tail_either(self):
        before = torch.tensor([-1.0] * 6 + [-0.3, 3.5]).view(8, 1, 1, 1)
        assert not mode_changes(before, before).any()

    @pytest.mark.parametrize("share", [0.5, 0.25])
    def test_finds_the_chunks_that_changed(self, share):
        before = self.chunks(share)
        swapped = torch.rand(K, B, generator=torch.Generator().manual_seed(4)) < 0.3
        after = torch.where(swapped.view(K, B, 1, 1), self.mirrored(before), before)
        changed = mode_changes(before, after)
        assert changed.shape == (K, B) and changed.dtype == torch.bool
        assert torch.equal(changed, swapped)

    def test_collapse_to_the_mean_is_no_change(self):
        before = self.chunks()
        assert not mode_changes(before, before.mean(dim=0, keepdim=True).expand_as(before)).any()

    def test_nor_is_a_shift_or_a_shrinkage(self):
        before = self.chunks()
        assert not mode_changes(before, before + 0.5 * self.direction).any()
        assert not mode_changes(before, self.centre + 0.2 * (before - self.centre)).any()

    def test_all_to_one_mode_changes_the_other_modes_chunks(self):
        before = self.chunks(0.25)
        after = (self.centre + self.direction).expand_as(before)
        assert torch.equal(mode_changes(before, after), (torch.arange(K) >= K / 4).view(K, 1).expand(K, B))

    def test_where_there_is_one_mode_hardly_any_chunk_goes_so_far(self):
        before = self.centre + normal(K, B, HORIZON, ACTION_DIM, seed=5)
        after = before + 0.3 * normal(K, B, HORIZON, ACTION_DIM, seed=6)
        assert mode_changes(before, after).float().mean() < 0.02

    def test_chunks_that_are_all_alike_have_no_other_mode_to_go_to(self):
        before = torch.ones(K, B, HORIZON, ACTION_DIM)
        assert not mode_changes(before, torch.zeros_like(before)).any()


class TestStepGradients:
    A = 1.5

    def velocity(self, t, x):
        return self.A * x

    def logged(self, solver: str, steps: int, checkpoint: bool = False) -> list[float]:
        v = StepGradients(self.velocity, steps)
        integrate(v, torch.ones(3, requires_grad=True), solver, steps, checkpoint=checkpoint).sum().backward()
        assert list(v.logs()) == [f"grad_step_{step:02d}" for step in range(steps)]
        return list(v.logs().values())

    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_of_a_linear_chain_by_hand(self, checkpoint):
        """x_(n+1) = x_n + h v_n with v_n = a x_n: dL / dv_n = h (1 + a h)^(N - 1 - n)."""
        growth = [(1 + self.A / 4) ** (3 - n) for n in range(4)]
        expected = [4 * g / sum(growth) for g in growth]
        assert self.logged("euler", 4, checkpoint) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_both_calls_of_a_midpoint_step_count_for_it(self, checkpoint):
        """The second of a step weighs h, the first a h / 2 of that; a step grows by 1 + a h + (a h)^2 / 2."""
        z = self.A / 3
        growth = [(1 + z + z**2 / 2) ** (2 - n) for n in range(3)]
        expected = [3 * g / sum(growth) for g in growth]
        assert self.logged("midpoint", 3, checkpoint) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("solver", SCHEMES)
    @pytest.mark.parametrize("steps", [1, 3, 7, 10, 49, 100])
    def test_every_step_of_every_grid_is_told_apart(self, solver, steps):
        """Of a velocity that forgets x every step weighs the same, but where calls at its end count for the next."""
        v = StepGradients(lambda t, x: weight.expand_as(x), steps)
        weight = torch.ones((), requires_grad=True)
        integrate(v, torch.zeros(2), solver, steps).sum().backward()
        logs = list(v.logs().values())
        inner = logs[1:-1] if solver in ("heun", "rk4") else logs
        assert inner == pytest.approx(inner[:1] * len(inner), rel=1e-4)

    def test_empty_before_the_backward_pass_and_without_one(self):
        v = StepGradients(self.velocity, 2)
        loss = integrate(v, torch.ones(3, requires_grad=True), "euler", 2).sum()
        assert v.logs() == {}
        loss.backward()
        assert v.logs() != {}
        with torch.no_grad():
            still = StepGradients(self.velocity, 2)
            assert torch.equal(integrate(still, torch.ones(3), "euler", 2), torch.full((3,), (1 + self.A / 2) ** 2))
        assert still.logs() == {}
