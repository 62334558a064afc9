"""Couplings: what they pair, what they leave alone, and what a map learns from their pairs."""

import copy
import math
from itertools import permutations

import pytest
import torch
from torch import nn

from fm_policy.flow.coupling import independent, inverse, minibatch_ot, nearest, reflow
from fm_policy.flow.losses import cfm_loss, masked_mse
from fm_policy.flow.noise import sample_noise
from fm_policy.flow.solvers import integrate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_modes(generator, size=128):
    """Data around -1 and 1, `(size, 1, 1)`."""
    modes = torch.randint(2, (size, 1, 1), generator=generator) * 2.0 - 1.0
    return modes + 0.05 * torch.randn(size, 1, 1, generator=generator)


def velocity_of(net):
    def v(t, x):
        t = torch.as_tensor(t, dtype=x.dtype).view(-1, 1, 1).expand(len(x), 1, 1)
        return net(torch.cat([t, x], dim=2))

    return v


@pytest.fixture(scope="module")
def base():
    """A net that flow matching has taught the two modes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
        optimizer, generator = torch.optim.Adam(net.parameters(), lr=5e-3), seeded()
        for _ in range(300):
            x1 = two_modes(generator)
            loss = cfm_loss(velocity_of(net), independent(x1), x1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def test_independent_is_gaussian_and_blind_to_the_data():
    x1 = torch.linspace(-1, 1, 4000).view(-1, 1, 1).expand(-1, 5, 2)
    x0 = independent(x1, seeded())
    assert x0.shape == x1.shape
    assert abs(x0.mean()) < 0.02
    assert abs(x0.std() - 1) < 0.02
    correlation = torch.corrcoef(torch.stack([x0[:, 0, 0], x1[:, 0, 0]]))[0, 1]
    assert abs(correlation) < 0.05  # 3 standard errors of 4000 samples


class TestMinibatchOt:
    def pairs(self, size=64):
        return independent(torch.empty(size, 3, 2), seeded(1)), 2 * torch.randn(size, 3, 2, generator=seeded(2))

    def test_gives_every_noise_out_once_and_leaves_the_data(self):
        """So the marginal of the noise is what it was, exactly."""
        x0, x1 = self.pairs()
        before = x1.clone()
        paired = minibatch_ot(x0, x1)
        assert torch.equal(x1, before)
        assert not torch.equal(paired, x0)
        ordered = (x.flatten(1)[x.flatten(1)[:, 0].argsort()] for x in (x0, paired))
        assert torch.equal(*ordered)

    def test_lowers_the_transport_cost(self):
        x0, x1 = self.pairs()
        costs = [(x - x1).square().sum().item() for x in (x0, minibatch_ot(x0, x1))]
        assert costs[1] < 0.9 * costs[0]

    def test_no_order_costs_less(self):
        """Against all 720 orders of six rows."""
        x0, x1 = self.pairs(6)
        least = min((x0[list(order)] - x1).square().sum().item() for order in permutations(range(6)))
        assert (minibatch_ot(x0, x1) - x1).square().sum().item() == pytest.approx(least)

    def test_on_a_line_it_keeps_the_order(self):
        x1 = torch.tensor([3.0, -1.0, 0.5]).view(3, 1, 1)
        x0 = torch.tensor([0.1, 0.2, -0.3]).view(3, 1, 1)
        assert minibatch_ot(x0, x1).flatten().tolist() == pytest.approx([0.2, -0.3, 0.1])

    def test_refuses_what_cannot_be_paired(self):
        x0, x1 = self.pairs()
        with pytest.raises(ValueError, match=r"noise \(64, 3, 2\) and data \(63, 3, 2\) must have one shape"):
            minibatch_ot(x0, x1[1:])
        x1[5, 1, 0] = math.nan
        with pytest.raises(ValueError, match="must be finite"):
            minibatch_ot(x0, x1)


class TestNearest:
    K, B = 4, 3

    def data(self):
        return torch.randn(self.B, 5, 2, generator=seeded(1))

    @pytest.mark.parametrize("padded", [False, True])
    def test_chooses_the_noise_whose_chunk_comes_nearest(self, padded):
        """Against a loop over rows and candidates; each row has a map of its own."""
        x1, o = self.data(), torch.tensor([-1.0, 0.5, 2.0]).view(-1, 1, 1)
        is_pad = torch.zeros(self.B, 5, dtype=torch.bool)
        if padded:
            is_pad[0, 1:], is_pad[1, 3:] = True, True
            x1[is_pad] = math.nan
        calls = []

        def solve(x0):
            assert not torch.is_grad_enabled()
            calls.append(x0)
            return torch.tanh(x0 + o.repeat(self.K, 1, 1))

        chosen = nearest(x1, self.K, solve, is_pad if padded else None, seeded())
        assert [len(x0) for x0 in calls] == [self.K * self.B]
        assert not chosen.requires_grad
        candidates = calls[0].view(self.K, self.B, 5, 2)
        picked = []
        for row in range(self.B):
            errors = [(torch.tanh(x0 + o[row]) - x1[row])[~is_pad[row]].square().mean() for x0 in candidates[:, row]]
            picked.append(min(range(self.K), key=errors.__getitem__))
            assert torch.equal(chosen[row], candidates[picked[-1], row])
        assert len(set(picked)) > 1  # a constant choice would not do

    def test_padding_decides_nothing(self):
        x1 = self.data()
        is_pad = torch.tensor([False, True, True, True, True]).expand(self.B, -1)
        far = x1.clone()
        far[:, 1:] = 100.0
        pick = [nearest(data, self.K, lambda x0: x0, is_pad, seeded()) for data in (x1, far)]
        assert torch.equal(*pick)
        assert not torch.equal(pick[0], nearest(x1, self.K, lambda x0: x0, None, seeded()))

    def test_of_one_noise_it_is_the_independent_coupling(self):
        x1 = self.data()
        assert torch.equal(nearest(x1, 1, lambda x0: x0, None, seeded()), independent(x1, seeded()))

    def test_keeps_no_gradient_of_the_map(self):
        weight = torch.ones((), requires_grad=True)
        assert not nearest(self.data(), self.K, lambda x0: weight * x0).requires_grad

    def test_no_noise_at_all_is_refused(self):
        with pytest.raises(ValueError, match="at least 1 noise per row, got k=0"):
            nearest(self.data(), 0, lambda x0: x0)


class TestReflow:
    def test_pairs_fresh_noise_with_its_end(self):
        x1 = torch.full((3, 5, 2), math.nan)  # the data say what shape, and nothing else
        weight = torch.ones((), requires_grad=True)
        x0, end = reflow(x1, lambda t, x: -weight * x, 10, seeded())
        assert torch.equal(x0, independent(x1, seeded()))
        torch.testing.assert_close(end, 0.9**10 * x0)  # Euler's own answer to dx/dt = -x
        assert not end.requires_grad

    def test_two_steps_learn_what_sixteen_do(self, base):
        """Both modes stay, at their places: the end is a function of the noise, and nothing is averaged."""
        net, generator = copy.deepcopy(base), seeded(1)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(300):
            x0, end = reflow(torch.empty(128, 1, 1), velocity_of(base), 16, generator)
            loss = masked_mse(integrate(velocity_of(net), x0, "euler", 2), end)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x0, end = reflow(torch.empty(1000, 1, 1), velocity_of(base), 16, seeded(2))
        with torch.no_grad():
            before, after = (integrate(velocity_of(v), x0, "euler", 2) for v in (base, net))
        assert masked_mse(after, end) < 0.2 * masked_mse(before, end)
        assert (after.sign() == end.sign()).float().mean() > 0.97
        assert abs(after.abs().mean() - end.abs().mean()) < 0.05


class TestWhatIsLearnedOfTwoModes:
    """Data are -1 or 1, each half of the time: E[x1 | x0] is 0 for independent pairs, a mode for the nearest."""

    def solve(self, net, x0):
        return integrate(velocity_of(net), x0, "euler", 2)

    def finetuned(self, base, k):
        net, generator = copy.deepcopy(base), seeded(1)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(200):
            x1 = two_modes(generator)
            x0 = nearest(x1, k, lambda x0: self.solve(net, x0), generator=generator)
            loss = masked_mse(self.solve(net, x0), x1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net

    @torch.no_grad()
    def samples(self, net):
        return self.solve(net, sample_noise((4000, 1, 1), seeded(2))).flatten()

    def near_a_mode(self, x):
        return ((x.abs() - 1).abs() < 0.2).float().mean()

    def test_independent_pairs_average_the_modes(self, base):
        before, after = self.samples(base), self.samples(self.finetuned(base, 1))
        assert before.std() > 0.5
        assert after.std() < 0.1  # one candidate is an independent pair: neither mode is left
        assert self.near_a_mode(after) == 0

    def test_nearest_pairs_keep_both_modes(self, base):
        """Two steps of the base leave most samples between the modes; afterwards few are there."""
        before, after = self.samples(base), self.samples(self.finetuned(base, 5))
        assert self.near_a_mode(before) < 0.3 and self.near_a_mode(after) > 0.7
        assert 0.4 < (after > 0).float().mean() < 0.6
        assert after[after > 0].median() == pytest.approx(1, abs=0.1)
        assert after[after < 0].median() == pytest.approx(-1, abs=0.1)


class TestInverse:
    def test_a_linear_flow_in_closed_form(self):
        """Data N(m, s^2) of noise N(0, 1) flow along u = m + c(t) (x - t m): x0 = (x1 - m) / s."""
        mean, std = 0.7, 0.4

        def velocity(t, x):
            c = (t * std**2 - (1 - t)) / (t**2 * std**2 + (1 - t) ** 2)
            return mean + c * (x - t * mean)

        x1 = mean + std * torch.linspace(-2, 2, 21, dtype=torch.float64).view(-1, 1, 1)
        torch.testing.assert_close(inverse(x1, velocity), (x1 - mean) / std, rtol=0, atol=2e-3)

    def test_run_forward_again_its_noise_becomes_the_data(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

        def velocity(t, x):
            return net(x) * (1 + math.sin(3 * t))

        x1 = torch.randn(8, 4, 2, generator=seeded())
        x0 = inverse(x1, velocity)
        assert not x0.requires_grad
        assert (x0 - x1).abs().mean() > 0.1
        with torch.no_grad():
            torch.testing.assert_close(integrate(velocity, x0, "rk4", 100), x1, rtol=0, atol=1e-3)

    def test_the_data_stay_as_they_are(self):
        x1 = torch.ones(2, 3, 1)
        inverse(x1, lambda t, x: x)
        assert torch.equal(x1, torch.ones(2, 3, 1))
