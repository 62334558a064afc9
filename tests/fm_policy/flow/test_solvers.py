"""Solvers: measured order, parity with torchdiffeq, exact counts, gradients."""

import math
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint

from fm_policy.flow.solvers import SCHEMES, CountedVelocity, call_times, integrate


def pendulum(t, x):
    """A smooth, nonlinear, time-dependent field without a symmetry that could hide an error."""
    angle, speed = x[..., :1], x[..., 1:]
    return torch.cat([speed, -torch.sin(angle) + 0.3 * math.cos(3 * float(t))], dim=-1)


START = torch.tensor([[0.4, -0.2], [1.3, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEMES)
def test_measured_order_of_convergence(name):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    exact = odeint(pendulum, START, ends, method="dopri5", rtol=1e-12, atol=1e-12)[-1]
    errors = [(integrate(pendulum, START, name, steps) - exact).abs().max().item() for steps in (16, 32, 64)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([SCHEMES[name].order] * 2, abs=0.15)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
def test_equals_torchdiffeq_on_the_same_grid(ours, theirs):
    grid = torch.linspace(0, 1, 9, dtype=torch.float64)
    reference = odeint(pendulum, START, grid, method=theirs)[-1]
    torch.testing.assert_close(integrate(pendulum, START, ours, 8), reference, rtol=0, atol=1e-14)


def test_rk4_is_exact_for_cubic_quadrature():
    # dx/dt = 4 t^3 integrates to t^4; a rule of order 4 is exact for polynomials of degree 3 in t.
    x = integrate(lambda t, x: torch.full_like(x, 4 * t**3), torch.zeros(1, 1, dtype=torch.float64), "rk4", 1)
    assert x.item() == pytest.approx(1.0, abs=1e-15)


def test_dopri5_meets_its_tolerance():
    x = integrate(lambda t, x: -2 * x, torch.ones(3, 2, dtype=torch.float64), "dopri5", 1)
    torch.testing.assert_close(x, torch.full((3, 2), math.exp(-2.0), dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_counts_every_call_of_the_velocity(name):
    v = CountedVelocity(pendulum)
    integrate(v, START, name, 5)
    assert v.calls == 5 * SCHEMES[name].calls


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 1.25), (1.0, 0.0), (1 / 3, 1.0)])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_times_of_the_calls_to_the_bit(name, start, end):
    asked = []
    integrate(lambda t, x: asked.append(t) or x, torch.ones(1), name, 7, start=start, end=end)
    assert call_times(name, 7, start, end) == tuple(dict.fromkeys(asked))
    assert call_times("dopri5", 7, start, end) == ()


@pytest.mark.parametrize("name", SCHEMES)
def test_gradient_through_the_solver_equals_finite_differences(name):
    torch.manual_seed(0)
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def endpoint(weight):
        return integrate(lambda t, x: torch.tanh(x @ weight + t), START, name, 3)

    assert torch.autograd.gradcheck(endpoint, (weight,))


def test_refusals_name_the_value():
    with pytest.raises(ValueError, match="unknown fixed-grid solver 'leapfrog'"):
        integrate(pendulum, START, "leapfrog", 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        integrate(pendulum, START, "euler", 0)
