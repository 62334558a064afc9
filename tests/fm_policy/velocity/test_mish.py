"""Mish by one exponential: torch's values and derivatives, twice."""

import pytest
import torch
import torch.nn.functional as F

from fm_policy.velocity.mish import FEW_ROWS, Mish


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """From where it vanishes to where its squares would overflow."""
    return torch.cat([torch.linspace(-30, 30, 2994), torch.tensor([-1e30, -1e4, 0.0, 60.0, 1e4, 1e30])]).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.float64, 1e-15)])
def test_values_and_slopes_are_torchs_to_rounding(dtype, tolerance):
    ours, theirs = (numbers(dtype).requires_grad_() for _ in range(2))
    exact = F.mish(theirs.double())
    exact.sum().backward()
    values = Mish()(ours)
    values.sum().backward()
    scale = ours.detach().abs().clamp(min=1)
    assert ((values - exact) / scale).abs().max() <= tolerance
    assert ((ours.grad - theirs.grad) / scale).abs().max() <= 10 * tolerance
    assert values.dtype == dtype


def test_both_derivatives_equal_finite_differences():
    torch.manual_seed(0)
    x = (4 * torch.randn(30, 100, dtype=torch.float64)).requires_grad_()
    mish, direction = Mish(), torch.randn(30, 100, dtype=torch.float64)

    def slope(x):
        return torch.autograd.grad(mish(x).sum(), x, create_graph=True)[0]

    for function in (mish, slope):
        (along,) = torch.autograd.grad(function(x), x, direction)
        h = 1e-5
        with torch.no_grad():
            up, down = x + h * direction, x - h * direction
        measured = (function(up.requires_grad_()) - function(down.requires_grad_())) / (2 * h)
        torch.testing.assert_close(along, measured, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_left_to_torch_whose_gradient_does_not_overflow(dtype):
    ours, theirs = (torch.linspace(-20, 20, 300).view(3, 100).to(dtype).requires_grad_() for _ in range(2))
    Mish()(ours).sum().backward()
    F.mish(theirs).sum().backward()
    assert torch.equal(ours.grad, theirs.grad) and ours.grad.isfinite().all()


def test_few_rows_are_left_to_torch():
    x = torch.randn(FEW_ROWS, 100)
    assert torch.equal(Mish()(x), F.mish(x))
