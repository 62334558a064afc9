"""Path and noise: the formulas, and a flow that is known in closed form."""

import pytest
import torch
from torch import nn

from fm_policy.flow.coupling import independent
from fm_policy.flow.losses import cfm_loss
from fm_policy.flow.noise import disturbed, sample_noise
from fm_policy.flow.path import interpolate, path_velocity
from fm_policy.flow.solvers import integrate


def test_path_runs_from_noise_to_data_at_its_velocity():
    x0, x1 = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    points = interpolate(t, x0, x1)
    torch.testing.assert_close(points[0], x0[0])
    torch.testing.assert_close(points[-1], x1[-1])
    h = 1e-6
    slope = (interpolate(t + h, x0, x1) - interpolate(t - h, x0, x1)) / (2 * h)
    torch.testing.assert_close(slope, path_velocity(x0, x1), rtol=1e-6, atol=1e-6)


def test_noise_is_the_same_for_the_same_generator_seed():
    draw = [sample_noise((3, 4), torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_training_recovers_a_gaussian_flow_known_in_closed_form():
    """Data N(m, s^2): the marginal velocity is u = m + c(t) (x - t m), c = (t s^2 - (1 - t)) / var(t)."""
    torch.manual_seed(0)
    mean, std = 0.7, 0.4
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)

    def v(t, x):
        t = torch.as_tensor(t, dtype=x.dtype).view(-1, 1).expand(len(x), 1)
        return net(torch.cat([t, x.view(-1, 1)], dim=1)).view_as(x)

    for _ in range(1000):
        x1 = mean + std * torch.randn(1024, 1, 1)
        loss = cfm_loss(v, independent(x1), x1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        for t in (0.1, 0.5, 0.9):
            spread = (t**2 * std**2 + (1 - t) ** 2) ** 0.5
            x = t * mean + spread * torch.linspace(-1.5, 1.5, 31).view(-1, 1, 1)
            exact = mean + (t * std**2 - (1 - t)) / spread**2 * (x - t * mean)
            assert (v(t, x) - exact).abs().mean() < 0.06
        x1 = integrate(v, torch.randn(20000, 1, 1), "rk4", 16)
        assert x1.mean().item() == pytest.approx(mean, abs=0.03)
        assert x1.std().item() == pytest.approx(std, abs=0.03)
        # The flow of one Gaussian to another is x -> m + s x, a map that sampling alone would not show.
        x0 = torch.linspace(-2, 2, 41).view(-1, 1, 1)
        assert (integrate(v, x0, "rk4", 16) - (mean + std * x0)).abs().mean() < 0.05


def test_noise_on_observations_has_its_size_is_independent_and_spares_the_rest():
    batch = {"state": torch.full((4000, 2, 3), 5.0), "action": torch.ones(4000, 4)}
    noisy = disturbed(batch, ["state"], 0.1)
    assert noisy["state"].mean() == pytest.approx(5, abs=0.01)
    assert noisy["state"].std() == pytest.approx(0.1, abs=0.002)
    assert torch.corrcoef(noisy["state"].flatten(1).T).fill_diagonal_(0).abs().max() < 0.1
    assert noisy["action"] is batch["action"] and (batch["state"] == 5).all()
    before = torch.get_rng_state()
    assert disturbed(batch, ["state"], 0.0) == batch
    assert torch.equal(torch.get_rng_state(), before)
