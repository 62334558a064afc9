"""Fréchet's distance against closed forms, and the classifier whose features it is taken in."""

import importlib.util

import pytest
import torch

from fm_policy.images.quality import (
    Moments,
    accuracy,
    batches,
    frechet_distance,
    inception,
    moments,
    real_pictures,
    train_classifier,
)

CPU = torch.device("cpu")


def exact(mean, covariance, count=50, seed=0):
    """Rows with exactly this mean and this covariance."""
    z = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (count - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def counted(rows):
    found = Moments(rows.shape[1])
    found.add(rows)
    return found


FIRST = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
SECOND = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)


class TestFrechetDistance:
    def test_of_two_gaussians_in_the_plane(self):
        """The root's trace there: tr (A B)^(1/2) = (tr A B + 2 (det A det B)^(1/2))^(1/2); A B is not B A."""
        assert not torch.allclose(FIRST @ SECOND, SECOND @ FIRST)
        cross = ((FIRST @ SECOND).trace() + 2 * (FIRST.det() * SECOND.det()).sqrt()).sqrt()
        expected = 3**2 + 4**2 + FIRST.trace() + SECOND.trace() - 2 * cross
        a = counted(exact(torch.tensor([1.0, 1.0]), FIRST))
        b = counted(exact(torch.tensor([4.0, -3.0]), SECOND, seed=1))
        assert frechet_distance(a, b) == pytest.approx(expected.item())
        assert frechet_distance(b, a) == pytest.approx(expected.item())

    def test_of_independent_numbers(self):
        """sum (m - n)^2 + (s - r)^2."""
        a = counted(exact(torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))))
        b = counted(exact(torch.ones(3), torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64))))
        assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4)

    def test_to_itself_is_zero_and_to_a_point_the_spread(self):
        a = counted(exact(torch.zeros(2), FIRST))
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
        point = counted(torch.zeros(5, 2))
        assert frechet_distance(a, point) == pytest.approx(FIRST.trace().item())


def test_moments_come_batch_by_batch():
    rows = exact(torch.tensor([5.0, -7.0]), SECOND)
    found = Moments(2)
    for batch in rows.split(7):
        found.add(batch.float())
    torch.testing.assert_close(found.mean(), torch.tensor([5.0, -7.0], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.covariance(), SECOND, rtol=1e-4, atol=1e-5)


def test_moments_of_less_than_two_images_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        counted(torch.zeros(1, 2)).covariance()
    with pytest.raises(ValueError, match="no images"):
        moments(lambda x: x, iter([]))


def test_batches_make_up_the_count():
    assert list(batches(7, 3)) == [3, 3, 1]
    assert list(batches(6, 3)) == [3, 3]


@pytest.fixture(scope="module")
def net(images):
    return train_classifier(images, 250, CPU)


class TestClassifier:
    def test_knows_digits_that_it_never_saw(self, images, net):
        assert accuracy(net, images, images.held_out) > 0.93
        assert not any(p.requires_grad for p in net.parameters())

    def test_is_the_same_on_every_run(self, images):
        nets = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            nets.append(train_classifier(images, 2, CPU).state_dict())
        assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])

    def test_held_out_digits_lie_nearer_than_blurred_noisy_or_few_ones(self, images, net):
        train = moments(net.features, real_pictures(images, images.train, CPU))
        real = torch.cat([*real_pictures(images, images.held_out, CPU)])

        def distance(pictures):
            return frechet_distance(train, moments(net.features, iter([pictures])))

        floor = distance(real)
        torch.manual_seed(0)
        noisy = (real + 0.2 * torch.randn_like(real)).clamp(0, 1)
        blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
        ones = real[images.held_out.labels == 1]
        assert all(distance(worse) > 2 * floor for worse in (noisy, blurred, ones, real.mean(0).expand(450, 1, 8, 8)))


@pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is not None, reason="torchmetrics is installed")
def test_fid_without_torchmetrics_is_refused():
    with pytest.raises(ValueError, match="FID needs torchmetrics and torch-fidelity: pip install"):
        inception(CPU)
