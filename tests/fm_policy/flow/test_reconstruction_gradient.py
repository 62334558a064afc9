"""The gradient of the reconstruction loss: that of the deployed map itself, not of another one near it."""

import math
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint, odeint_adjoint

from fm_policy.flow.losses import masked_mse
from fm_policy.flow.solvers import SCHEMES, integrate

DOUBLE = torch.float64
SHAPE = (2, 3, 2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def parameters() -> list[torch.Tensor]:
    """Of a velocity with one hidden layer: into it, of the time, out of it."""
    return [draw(2, 4, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_(), draw(4, 2, seed=3).requires_grad_()]


def reconstruction_loss(solver, steps, x0, into, of_time, out, checkpoint=False):
    """Of the first two time steps of three."""

    def v(t, x):
        return torch.tanh(x @ into + t * of_time) @ out

    is_pad = torch.tensor([False, False, True]).expand(2, 3)
    return masked_mse(integrate(v, x0, solver, steps, checkpoint=checkpoint), draw(*SHAPE, seed=4), is_pad)


class TestReconstructionLoss:
    @pytest.mark.parametrize("steps", [1, 2, 5])
    @pytest.mark.parametrize("solver", SCHEMES)
    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_gradient_equals_finite_differences(self, solver, steps, checkpoint):
        def loss(x0, *weights):
            return reconstruction_loss(solver, steps, x0, *weights, checkpoint=checkpoint)

        assert torch.autograd.gradcheck(loss, (draw(*SHAPE).requires_grad_(), *parameters()), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("steps", [1, 4])
    @pytest.mark.parametrize("solver", SCHEMES)
    def test_checkpointing_changes_no_bit_of_value_and_gradient(self, solver, steps):
        results = []
        for checkpoint in (False, True):
            inputs = [draw(*SHAPE).requires_grad_(), *parameters()]
            loss = reconstruction_loss(solver, steps, *inputs, checkpoint=checkpoint)
            results.append([loss, *torch.autograd.grad(loss, inputs)])
        assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*results, strict=True))


class TestDiscretiseThenOptimise:
    """dx/dt = a x from 1: N Euler steps deploy (1 + a / N)^N, whose derivative is (1 + a / N)^(N - 1), not e^a."""

    A = 1.2

    @pytest.mark.parametrize("steps", [1, 2, 4, 16])
    def test_the_gradient_is_that_of_the_deployed_map(self, steps):
        a = torch.tensor(self.A, dtype=DOUBLE, requires_grad=True)
        x1 = integrate(lambda t, x: a * x, torch.ones(1, dtype=DOUBLE), "euler", steps)
        (gradient,) = torch.autograd.grad(x1.sum(), a)
        assert x1.item() == pytest.approx((1 + self.A / steps) ** steps, rel=1e-14)
        assert gradient.item() == pytest.approx((1 + self.A / steps) ** (steps - 1), rel=1e-14)

    def test_the_adjoint_equation_on_the_same_grid_gives_another_one(self):
        """It also steps the state backwards, to another start: h x1 sum_k ((1 + a h) (1 - a h))^k."""
        errors = []
        for steps in (2, 4, 8, 16, 32):
            field = torch.nn.Linear(1, 1, bias=False, dtype=DOUBLE)
            torch.nn.init.constant_(field.weight, self.A)
            ends, h = torch.tensor([0.0, 1.0], dtype=DOUBLE), 1 / steps
            grid = {"method": "euler", "options": {"step_size": h}, "adjoint_params": tuple(field.parameters())}
            x1 = odeint_adjoint(lambda t, x, field=field: field(x), torch.ones(1, 1, dtype=DOUBLE), ends, **grid)[-1]
            x1.sum().backward()
            deployed, continuous = (1 + self.A * h) ** (steps - 1), math.exp(self.A)
            by_hand = h * x1.item() * sum((1 - (self.A * h) ** 2) ** k for k in range(steps))
            adjoint = field.weight.grad.item()
            assert x1.item() == pytest.approx((1 + self.A * h) ** steps, rel=1e-12)  # the same map, forwards
            assert adjoint == pytest.approx(by_hand, rel=1e-12)
            errors.append(abs(adjoint / deployed - 1))
            assert abs(deployed / continuous - 1) > 0.2 * h  # nor is it the true flow's
        assert errors[0] > 0.1
        assert [math.log2(a / b) for a, b in pairwise(errors)][1:] == pytest.approx([1] * 3, abs=0.15)  # it goes as h


class TestBackwardInTime:
    """Step by step, Psi_h = psi_h + C h^(p+1), and back by C (-h)^(p+1): for an even order p the two cancel."""

    @staticmethod
    def field(t, x):
        angle, speed = x[..., :1], x[..., 1:]
        return torch.cat([speed, -torch.sin(angle) + 0.3 * math.cos(3 * float(t))], dim=-1)

    def orders(self, errors):
        return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]

    @pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 3), ("heun", 3), ("rk4", 5)])
    def test_there_and_back_misses_the_start_by_the_order_of_the_scheme(self, solver, order):
        x0, errors = draw(4, 2), []
        for steps in (8, 16, 32, 64):
            x1 = integrate(self.field, x0, solver, steps)
            errors.append((integrate(self.field, x1, solver, steps, start=1.0, end=0.0) - x0).abs().max().item())
        assert self.orders(errors)[1:] == pytest.approx([order] * 2, abs=0.25)

    @pytest.mark.parametrize("solver", SCHEMES)
    def test_back_alone_it_has_the_order_of_the_scheme(self, solver):
        x1, ends = draw(4, 2), torch.tensor([1.0, 0.0], dtype=DOUBLE)
        exact = odeint(self.field, x1, ends, method="dopri5", rtol=1e-12, atol=1e-12)[-1]
        backwards = [integrate(self.field, x1, solver, steps, start=1.0, end=0.0) for steps in (16, 32, 64)]
        orders = self.orders([(x0 - exact).abs().max().item() for x0 in backwards])
        assert orders == pytest.approx([SCHEMES[solver].order] * 2, abs=0.2)

    def test_part_of_the_way_and_dopri5(self):
        x0 = draw(4, 2)
        whole = integrate(self.field, x0, "rk4", 4)
        half = integrate(self.field, x0, "rk4", 2, end=0.5)
        torch.testing.assert_close(integrate(self.field, half, "rk4", 2, start=0.5), whole, rtol=1e-14, atol=1e-14)
        x1 = integrate(self.field, x0, "dopri5", 1, 1e-9)
        back = integrate(self.field, x1, "dopri5", 1, 1e-9, start=1.0, end=0.0)
        torch.testing.assert_close(back, x0, rtol=0, atol=1e-7)

    def test_an_adaptive_solver_has_no_steps_to_checkpoint(self):
        with pytest.raises(ValueError, match="dopri5 has no fixed steps to checkpoint"):
            integrate(self.field, draw(4, 2), "dopri5", 1, checkpoint=True)


class TestThroughThePolicy:
    """The whole of `forward` in stage finetune, in double precision, along random directions of its parameters."""

    @staticmethod
    def policy_and_batch(tiny, **changes):
        changes = {"transformer_dropout": 0.1, "num_solver_steps": 3, "cfm_weight": 0.3, "stage": "finetune"} | changes
        policy = tiny.policy(**changes).double().train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # a new Transformer is zero behind its gates, where most gradients are zero too
            for parameter in policy.net.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        batch = tiny.windows(policy.config)
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        batch["action_is_pad"][0, 10:] = True
        return policy, batch

    @staticmethod
    def loss(policy, batch):
        policy.training_steps.zero_()  # noise and times of a step are a function of seed and step
        return policy.forward(batch)[0]

    def slope(self, policy, batch, parameters, direction, h=1e-5):
        """Central difference of the loss along a direction."""

        def value(step):
            for parameter, d in zip(parameters, direction, strict=True):
                parameter += step * d
            loss = self.loss(policy, batch)
            for parameter, d in zip(parameters, direction, strict=True):
                parameter -= step * d
            return loss.item()

        with torch.no_grad():
            return (value(h) - value(-h)) / (2 * h)

    def check(self, policy, batch, parameters, directions=2):
        gradient = torch.autograd.grad(self.loss(policy, batch), parameters)
        generator = torch.Generator().manual_seed(2)
        for _ in range(directions):
            direction = [torch.randn(p.shape, generator=generator, dtype=DOUBLE) for p in parameters]
            norm = sum(d.square().sum() for d in direction).sqrt()
            direction = [d / norm for d in direction]
            expected = self.slope(policy, batch, parameters, direction)
            along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
            assert along == pytest.approx(expected, rel=1e-5, abs=1e-8)
            assert abs(expected) > 1e-6  # a slope that could be missed

    @pytest.mark.parametrize("coupling", ["independent", "nearest"])
    @pytest.mark.parametrize("net", ["unet", "transformer"])
    @pytest.mark.parametrize(
        "variance",
        [{"variance": "scalar"}, {"variance": "diagonal", "sigma": (0.1, 0.5, 2.0)}, {"variance": "learned"}],
        ids=lambda variance: variance["variance"],
    )
    def test_gradient_equals_finite_differences(self, tiny, net, variance, coupling):
        policy, batch = self.policy_and_batch(tiny, velocity_net=net, coupling=coupling, **variance)
        self.check(policy, batch, list(policy.net.parameters()))

    @pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4"])
    def test_other_solvers_and_checkpointing(self, tiny, solver):
        policy, batch = self.policy_and_batch(tiny, solver=solver, num_solver_steps=2, checkpoint_solver=True)
        self.check(policy, batch, list(policy.net.parameters()), directions=1)

    def test_gradient_of_a_learned_variance(self, tiny):
        policy, batch = self.policy_and_batch(tiny, variance="learned", sigma=(0.1, 0.5, 2.0))
        self.check(policy, batch, [policy.log_variance])

    @pytest.mark.parametrize("net", ["unet", "transformer"])
    def test_checkpointing_changes_no_bit(self, tiny, net):
        gradients = []
        for checkpoint in (False, True):
            policy, batch = self.policy_and_batch(tiny, velocity_net=net, checkpoint_solver=checkpoint)
            gradients.append(torch.autograd.grad(self.loss(policy, batch), list(policy.net.parameters())))
        assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*gradients, strict=True))
