"""The units f_j of eq. (7), each with the sector of slopes that it never leaves.

A certificate needs of a unit that f(0) = 0, that it is continuous and increasing (Assumptions 2 and 3 of
arXiv 2510.02081), and two numbers alpha <= (f(a) - f(b)) / (a - b) <= beta that hold for all a and b.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAK = 0.1


class Nonlinearity(nn.Module, ABC):
    """An increasing function with f(0) = 0, applied to each of `width` units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """Apply f to `(..., width)`."""

    @abstractmethod
    def slopes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest slope of every unit, `(width,)` each, in the precision of `like` and beside it."""


class Tanh(Nonlinearity):
    """Bounded; slopes in (0, 1]."""

    def forward(self, y: Tensor) -> Tensor:
        """See `Nonlinearity.forward`."""
        return torch.tanh(y)

    def slopes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """See `Nonlinearity.slopes`."""
        return like.new_zeros(self.width), like.new_ones(self.width)


class LeakyRelu(Nonlinearity):
    """Unbounded; slope 0.1 below 0 and 1 above."""

    def forward(self, y: Tensor) -> Tensor:
        """See `Nonlinearity.forward`."""
        return F.leaky_relu(y, LEAK)

    def slopes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """See `Nonlinearity.slopes`."""
        return like.new_full((self.width,), LEAK), like.new_ones(self.width)


class ParametricRelu(Nonlinearity):
    """Unbounded; one learned slope per unit below 0, between 0 and 1, and slope 1 above (He et al. 2015)."""

    INITIAL_LEAK = 0.25

    def __init__(self, width: int) -> None:
        super().__init__(width)
        # Learned through a sigmoid: whatever the optimiser does, the slope cannot leave the certified sector.
        self.leak_logit = nn.Parameter(torch.full((width,), math.log(self.INITIAL_LEAK / (1 - self.INITIAL_LEAK))))

    def forward(self, y: Tensor) -> Tensor:
        """See `Nonlinearity.forward`."""
        return torch.where(y > 0, y, self.leak_logit.sigmoid() * y)

    def slopes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """See `Nonlinearity.slopes`."""
        return self.leak_logit.sigmoid().to(like), like.new_ones(self.width)


NONLINEARITIES: dict[str, type[Nonlinearity]] = {"tanh": Tanh, "leaky_relu": LeakyRelu, "prelu": ParametricRelu}


def make_nonlinearity(name: str, width: int) -> Nonlinearity:
    """The nonlinearity of that name.

    Raises:
        ValueError: If there is none, or the width is below 1.
    """
    if name not in NONLINEARITIES:
        raise ValueError(
            f"a head's nonlinearity must be one of {list(NONLINEARITIES)}, got {name!r}: "
            "it needs f(0) = 0 and known bounds of its slopes, 0 <= alpha <= beta"
        )
    if width < 1:
        raise ValueError(f"a nonlinearity needs at least 1 unit, got {width}")
    return NONLINEARITIES[name](width)
