"""Contraction by construction: at any weights, in any state, under any input."""

import numpy as np
import pytest
import torch

from fm_policy.flow.solvers import integrate
from fm_policy.residual.control_synth import LAYOUTS

RATE = 0.4
ALL = ("tanh", "leaky_relu", "prelu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("std", [0.3, 3.0, 30.0])
def test_the_symmetric_jacobian_is_at_most_minus_the_rate(make, layout, std):
    head = make.head(std=std, layout=layout, rate=RATE, activations=ALL)
    for seed in range(5):
        v = head.bind(make.normal(1, make.OBS_DIM, seed=seed))
        x = make.normal(1, make.HORIZON, make.ACTION_DIM, seed=seed + 10)
        jacobian = torch.func.jacrev(lambda flat, v=v: v(1.0, flat.view(1, make.HORIZON, -1)).flatten())(x.flatten())
        mu_2 = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)[-1].item()
        assert mu_2 <= -RATE + 1e-12 * jacobian.norm().item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_under_common_inputs_approach_each_other_at_the_rate(make, layout):
    """Six times, with another input from each time to the next; the fine grid stands for the flow."""
    head = make.head(std=0.7, layout=layout, rate=RATE, activations=ALL)
    pairs = 16
    shape = (pairs, make.HORIZON, make.ACTION_DIM)
    x, y = 3 * make.normal(*shape), 3 * make.normal(*shape, seed=1)
    y[: pairs // 2] = x[: pairs // 2] + 1e-3 * y[: pairs // 2]  # near pairs and far ones
    start = (x - y).flatten(1).norm(dim=1)
    length = 0.25
    for number in range(1, 7):
        o = make.normal(pairs, make.OBS_DIM, seed=number)
        with torch.no_grad():
            x, y = (integrate(head.bind(o), z, "rk4", 30, start=0.0, end=length) for z in (x, y))
        ratio = (x - y).flatten(1).norm(dim=1) / start
        assert (ratio <= np.exp(-RATE * length * number) * (1 + 1e-9)).all()
        assert (ratio > 0).all()


def test_the_rate_is_exact_where_nothing_else_damps(make):
    """B = 0 and D = 0: a pure rotation on top, and distances shrink by e^(-rate t) to the digit."""
    head = make.head(std=1.0, rate=RATE)
    with torch.no_grad():
        head.parts.damping.zero_()
        for gain in head.parts.gains:
            gain.fill_(-1e4)
        x, y = (make.normal(8, make.HORIZON, make.ACTION_DIM, seed=seed) for seed in (0, 1))
        v = head.bind(make.normal(8, make.OBS_DIM))
        ends = [integrate(v, z, "rk4", 50) for z in (x, y)]
    torch.testing.assert_close((ends[0] - ends[1]).norm(), np.exp(-RATE) * (x - y).norm(), rtol=1e-8, atol=0)


def test_without_the_construction_weights_of_that_size_expand(make):
    head = make.head(std=0.7, mode="free", rate=RATE)
    x, y = (make.normal(8, make.HORIZON, make.ACTION_DIM, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        v = head.bind(make.normal(8, make.OBS_DIM))
        ends = [integrate(v, z, "rk4", 50) for z in (x, y)]
    assert (ends[0] - ends[1]).norm() > (x - y).norm()
