"""The units: f(0) = 0, increasing, and slopes that stay in their sector and reach both of its ends."""

import pytest
import torch

from fm_policy.residual.nonlinearities import NONLINEARITIES, make_nonlinearity

WIDTH = 4


@pytest.fixture(params=list(NONLINEARITIES))
def unit(request):
    f = make_nonlinearity(request.param, WIDTH).double()
    torch.manual_seed(0)
    for parameter in f.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    return f


def test_measured_slopes_stay_within_the_sector_and_reach_its_ends(unit):
    alpha, beta = unit.slopes(torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    size = 10.0 ** (4 * torch.rand(20000, 1, generator=generator, dtype=torch.float64) - 3)  # from 0.001 to 10
    y, z = (size * torch.randn(20000, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    slopes = ((unit(y) - unit(z)) / (y - z)).detach()
    tolerance = 1e-9
    assert (slopes >= alpha - tolerance).all() and (slopes <= beta + tolerance).all()
    assert (slopes >= 0).all()
    torch.testing.assert_close(slopes.amin(0), alpha.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(slopes.amax(0), beta, atol=0.02, rtol=0)


def test_zero_stays_zero_and_the_sector_is_sane(unit):
    alpha, beta = unit.slopes(torch.zeros(()))
    assert unit(torch.zeros(2, WIDTH, dtype=torch.float64)).abs().max() == 0
    assert alpha.shape == beta.shape == (WIDTH,) and alpha.dtype == torch.float32
    assert (alpha >= 0).all() and (alpha <= beta).all()


def test_the_learned_slope_cannot_leave_its_sector():
    f = make_nonlinearity("prelu", 3)
    torch.testing.assert_close(f(torch.full((3,), -1.0)), torch.full((3,), -0.25))
    with torch.no_grad():
        f.leak_logit.copy_(torch.tensor([-1e4, 0.0, 1e4]))
    assert f.slopes(torch.zeros(()))[0].tolist() == [0.0, 0.5, 1.0]


def test_the_leaky_sector_is_exact_in_double_precision():
    f = make_nonlinearity("leaky_relu", 1)
    like = torch.zeros((), dtype=torch.float64)
    assert f.slopes(like)[0].item() == 0.1 == -f(torch.full((1,), -1.0, dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("name", "width", "message"), [("relu", 3, "one of .*'tanh'.*got 'relu'"), ("tanh", 0, "at least 1 unit, got 0")]
)
def test_others_are_refused(name, width, message):
    with pytest.raises(ValueError, match=message):
        make_nonlinearity(name, width)
