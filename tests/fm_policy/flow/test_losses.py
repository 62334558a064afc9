"""Losses: by hand, against torch's distributions, and blind to padding."""

import math

import pytest
import torch
from torch.distributions import Normal

from fm_policy.flow.losses import LOG_VARIANCE_RANGE, cfm_loss, gaussian_nll, masked_mse, pseudo_huber

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class TestMaskedMse:
    prediction = torch.tensor([[[1.0], [2.0], [3.0]], [[0.0], [0.0], [5.0]]])
    target = torch.zeros(2, 3, 1)
    is_pad = torch.tensor([[False, False, True], [False, True, True]])

    def test_mean_over_valid_elements_by_hand(self):
        assert masked_mse(self.prediction, self.target, self.is_pad).item() == pytest.approx((1 + 4 + 0) / 3)

    def test_without_padding_it_is_the_plain_mean(self):
        expected = (self.prediction - self.target).square().mean()
        torch.testing.assert_close(masked_mse(self.prediction, self.target), expected)

    def test_per_sample_losses_average_to_the_mean(self):
        per_sample = masked_mse(self.prediction, self.target, self.is_pad, "none")
        assert per_sample.shape == (2,)
        torch.testing.assert_close(per_sample.mean(), masked_mse(self.prediction, self.target, self.is_pad))

    def test_refusals(self):
        with pytest.raises(ValueError, match="every time step of the batch is padding"):
            masked_mse(self.prediction, self.target, torch.ones(2, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match="'sum'"):
            masked_mse(self.prediction, self.target, None, "sum")


class TestPseudoHuber:
    def test_is_a_square_near_and_a_distance_far(self):
        target = torch.zeros(3, 2, 2, dtype=torch.float64)
        prediction = torch.tensor([1e-5, 1.0, 100.0], dtype=torch.float64).view(3, 1, 1).expand_as(target)
        near, _, far = pseudo_huber(prediction, target, 0.01, "none")
        assert near.item() == pytest.approx(1e-10 / (2 * 0.01), rel=1e-4)
        assert far.item() == pytest.approx(100 - 0.01, rel=1e-6)

    def test_its_gradient_is_finite_where_nothing_differs_and_never_more_than_that_of_the_distance(self):
        prediction = torch.randn(50, 4, 2, generator=torch.Generator().manual_seed(0)) * 10
        prediction[0] = 0
        prediction.requires_grad_()
        (gradient,) = torch.autograd.grad(
            pseudo_huber(prediction, torch.zeros(50, 4, 2), 0.01, "none").sum(), prediction
        )
        sizes = gradient.flatten(1).norm(dim=1)
        assert sizes[0] == 0
        assert (sizes <= 8**-0.5 + 1e-6).all() and sizes[1:].min() > 0.9 * 8**-0.5

    def test_per_sample_losses_average_to_the_mean(self):
        prediction, target = torch.randn(2, 5, 4, 2, generator=torch.Generator().manual_seed(0))
        per_sample = pseudo_huber(prediction, target, 0.1, "none")
        assert per_sample.shape == (5,)
        torch.testing.assert_close(per_sample.mean(), pseudo_huber(prediction, target, 0.1))
        with pytest.raises(ValueError, match="'sum'"):
            pseudo_huber(prediction, target, 0.1, "sum")


class TestGaussianNll:
    @staticmethod
    def case(size=5):
        generator = torch.Generator().manual_seed(0)
        prediction, target = torch.randn(2, size, 4, 3, generator=generator, dtype=torch.float64)
        log_variance = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        is_pad = torch.arange(4) >= torch.randint(1, 5, (size, 1), generator=generator)
        return prediction, target, log_variance, is_pad

    def test_is_the_normal_density_without_its_constant(self):
        prediction, target, log_variance, is_pad = self.case()
        log_density = Normal(prediction, (0.5 * log_variance).exp()).log_prob(target)
        loss = gaussian_nll(prediction, target, log_variance)
        assert (loss + HALF_LOG_TWO_PI).item() == pytest.approx(-log_density.mean().item(), rel=1e-12)
        loss = gaussian_nll(prediction, target, log_variance, is_pad)
        assert (loss + HALF_LOG_TWO_PI).item() == pytest.approx(-log_density[~is_pad].mean().item(), rel=1e-12)

    def test_unit_variance_is_half_the_squared_error(self):
        prediction, target, _, is_pad = self.case()
        loss = gaussian_nll(prediction, target, torch.zeros(4, 3), is_pad)
        torch.testing.assert_close(loss, 0.5 * masked_mse(prediction, target, is_pad))

    def test_best_variance_is_the_mean_squared_error_of_each_element(self):
        prediction, target, _, is_pad = self.case(size=50)
        squared = (prediction - target).square()
        per_element = torch.stack([squared[~is_pad[:, step], step].mean(dim=0) for step in range(4)])
        best = per_element.log().requires_grad_()
        loss = gaussian_nll(prediction, target, best, is_pad)
        loss.backward()
        assert best.grad.abs().max() < 1e-12
        for step in range(4):
            for sign in (-1, 1):
                moved = best.detach().clone()
                moved[step] += sign * 0.1
                assert gaussian_nll(prediction, target, moved, is_pad) > loss

    @pytest.mark.parametrize(("beyond", "bound"), [(-20.0, LOG_VARIANCE_RANGE[0]), (30.0, LOG_VARIANCE_RANGE[1])])
    def test_variance_stays_in_its_range(self, beyond, bound):
        prediction, target, _, _ = self.case()
        loss, at_the_bound = (gaussian_nll(prediction, target, torch.full((4, 3), s)) for s in (beyond, bound))
        assert torch.equal(loss, at_the_bound)
        assert 0.006 < math.exp(LOG_VARIANCE_RANGE[0] / 2) < 0.007 and 7 < math.exp(LOG_VARIANCE_RANGE[1] / 2) < 8

    def test_one_number_per_action_dimension_broadcasts(self):
        prediction, target, log_variance, is_pad = self.case()
        rows = log_variance[0].expand(4, 3)
        per_dimension = gaussian_nll(prediction, target, log_variance[0], is_pad)
        torch.testing.assert_close(per_dimension, gaussian_nll(prediction, target, rows, is_pad))

    def test_per_sample_losses_average_to_the_mean(self):
        prediction, target, log_variance, is_pad = self.case()
        per_sample = gaussian_nll(prediction, target, log_variance, is_pad, "none")
        assert per_sample.shape == (5,)
        torch.testing.assert_close(per_sample.mean(), gaussian_nll(prediction, target, log_variance, is_pad))

    def test_refusals(self):
        prediction, target, log_variance, is_pad = self.case()
        with pytest.raises(ValueError, match="every time step of the batch is padding"):
            gaussian_nll(prediction, target, log_variance, torch.ones_like(is_pad))
        with pytest.raises(ValueError, match="'sum'"):
            gaussian_nll(prediction, target, log_variance, is_pad, "sum")


def mse(prediction, target, log_variance, is_pad, reduction):
    return masked_mse(prediction, target, is_pad, reduction) + 0 * log_variance.sum()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss_of", [mse, gaussian_nll])
@pytest.mark.parametrize("where", ["prediction", "target", "both"])
def test_what_padding_holds_reaches_neither_value_nor_gradient(loss_of, where, reduction):
    prediction, target, log_variance, is_pad = TestGaussianNll.case()
    results = []
    for filling in (0.0, math.nan, math.inf):
        p, x1, s = (tensor.clone() for tensor in (prediction, target, log_variance))
        if where != "target":
            p[is_pad] = filling
        if where != "prediction":
            x1[is_pad] = filling
        p.requires_grad_(), s.requires_grad_()
        loss = loss_of(p, x1, s, is_pad, reduction)
        gradients = torch.autograd.grad(loss.sum(), (p, s))
        assert gradients[0][is_pad].abs().max() == 0
        assert gradients[0][~is_pad].abs().min() > 0
        results.append((loss, *gradients))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_flow_matching_asks_the_velocity_on_the_straight_path():
    x0, x1 = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    is_pad = (torch.arange(4) > 2).expand(6, 4)
    asked = []

    def v(t, x):
        asked.append((t, x))
        return torch.zeros_like(x)

    loss = cfm_loss(v, x0, x1, is_pad)
    t, x = asked[0]
    assert t.shape == (6,) and t.min() >= 0 and t.max() <= 1 and t.unique().numel() == 6
    torch.testing.assert_close(x, (1 - t.view(-1, 1, 1)) * x0 + t.view(-1, 1, 1) * x1)
    assert loss.item() == pytest.approx((x1 - x0)[:, :3].square().mean().item(), rel=1e-12)
    assert cfm_loss(lambda t, x: x1 - x0, x0, x1, is_pad) == 0
