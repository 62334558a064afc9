"""The matrices of eq. (7) and the ways to parametrise them: free, or contracting by construction."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matrices(NamedTuple):
    """What a `System` holds, as tensors with gradients: x' = A0 x + sum_j A_j f_j(W_j x + b_j) + g."""

    a0: Tensor
    """`(n, n)`."""
    a: tuple[Tensor, ...]
    """A_j, `(n, k_j)` each."""
    w: tuple[Tensor, ...]
    """W_j, `(k_j, n)` each."""
    alpha: tuple[Tensor, ...]
    """Least slope of each unit of f_j, `(k_j,)` each."""
    beta: tuple[Tensor, ...]
    """Largest slope of each unit of f_j, `(k_j,)` each."""


Parts = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]
"""A0, all A_j and all W_j."""


class FreeMatrices(nn.Module):
    """A0, A_j and W_j as they are: any matrices, stable only if training makes them so.

    Starts at A0 = -rate I and A_j = 0.

    Args:
        n: Numbers in the state.
        widths: k_j, the units of each nonlinearity.
        rate: Rate of contraction at the start, per unit of time.
    """

    def __init__(self, n: int, widths: Sequence[int], rate: float) -> None:
        super().__init__()
        self.a0 = nn.Parameter(-rate * torch.eye(n))
        self.a = nn.ParameterList(torch.zeros(n, k) for k in widths)
        self.w = nn.ParameterList(_random_w(n, k) for k in widths)

    def forward(self) -> Parts:
        """The matrices of the present parameters."""
        return self.a0, tuple(self.a), tuple(self.w)


class ContractingMatrices(nn.Module):
    """Matrices that contract at `rate` in the Euclidean norm, whatever the parameters and whatever slopes >= 0.

    A0 = -(rate I + B Bᵀ) + (S - Sᵀ) and A_j = -W_jᵀ D_j with D_j >= 0 diagonal: where the units have the slopes
    s_j, the symmetric part of the Jacobian J is -(rate I + B Bᵀ) - sum_j W_jᵀ D_j diag(s_j) W_j <= -rate I. That is
    about the flow: Euler steps h contract where h < 2 rate / |J|².

    Starts near A0 = -rate I and A_j = 0: not at it, where the gradient of B would vanish.

    Args:
        n: Numbers in the state.
        widths: k_j, the units of each nonlinearity.
        rate: Rate of contraction, per unit of time.
    """

    INITIAL_GAIN = -4.5  # before the softplus, which makes 0.011 of it
    INITIAL_DAMPING = 0.05

    def __init__(self, n: int, widths: Sequence[int], rate: float) -> None:
        super().__init__()
        self.rate = rate
        # W_j starts with entries of size n^(-1/2): with this scale the field does not grow with the number of units.
        self.scale = n / sum(widths)
        self.damping = nn.Parameter(self.INITIAL_DAMPING / n**0.5 * torch.randn(n, n))
        self.rotation = nn.Parameter(torch.zeros(n, n))
        self.gains = nn.ParameterList(torch.full((k,), self.INITIAL_GAIN) for k in widths)
        self.w = nn.ParameterList(_random_w(n, k) for k in widths)

    def forward(self) -> Parts:
        """The matrices of the present parameters."""
        b = self.damping
        decay = self.rate * torch.eye(len(b), device=b.device, dtype=b.dtype) + b @ b.T
        a = (-w.T * (self.scale * F.softplus(gain)) for w, gain in zip(self.w, self.gains, strict=True))
        return self.rotation - self.rotation.T - decay, tuple(a), tuple(self.w)


PARAMETRISATIONS: dict[str, Callable[[int, Sequence[int], float], nn.Module]] = {
    "free": FreeMatrices,
    "penalty": FreeMatrices,  # the same matrices, under one of `stability.PENALTIES` in training
    "constructed": ContractingMatrices,
}


def _random_w(n: int, k: int) -> Tensor:
    return torch.empty(k, n).uniform_(-(n**-0.5), n**-0.5)
