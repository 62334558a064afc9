"""Mish, x tanh(log(1 + e^x)) (Misra 2019), by one exponential, where torch takes three of its kind.

With s = 1 + e^x: Mish(x) = x - 2 x / (s^2 + 1), whose derivative is 1 - 2 / (s^2 + 1) + 4 x s (s - 1) / (s^2 + 1)^2.
Equal to torch's within a few units of the last place of max(|x|, 1); for finite numbers only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Up to this batch one kernel is faster than five: 4 instead of 8 us for the 1024 numbers of one robot on a level of the
# default U-Net. For 64 robots it takes 193 instead of 70 us, a sixth of the whole call; with its gradient 420 instead
# of 248. Rows decide and not numbers, so that a batch's size changes no bit of a row beyond them.
FEW_ROWS = 2

# Of halves torch rounds the result alone, the formulas above each of their steps, and a square of float16 overflows.
PRECISE = (torch.float32, torch.float64)

# Beyond it Mish(x) is x in single precision, and no square below overflows.
LARGE = 20.0


class Mish(nn.Module):
    """`torch.nn.Mish`, faster on CPUs; without parameters, as that."""

    def forward(self, x: Tensor) -> Tensor:
        """Mish of every number."""
        ours = x.device.type == "cpu" and x.dtype in PRECISE and len(x) > FEW_ROWS
        if not ours or torch.compiler.is_compiling():
            return F.mish(x)
        return _Mish.apply(x)


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        square = x.clamp(max=LARGE).exp_().add_(1).square_()
        return torch.addcdiv(x, x, square.add_(1), value=-2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.clamp(max=LARGE).exp() + 1
        inverse = (s.square() + 1).reciprocal()
        return gradients[0] * (1 - 2 * inverse + 4 * (x * inverse) * (s * (s - 1) * inverse))
