"""How a map answers to disturbances: the size of what comes out for the size of what goes in."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fm_policy.flow.noise import sample_noise


def rms(rows: Tensor) -> Tensor:
    """Root of the mean square over all numbers of a row: `(B, ...)` to `(B,)`."""
    return rows.flatten(1).square().mean(dim=1).sqrt()


def directions(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random disturbances of size 1, `(B, ...)`: uniform over directions, each row with an RMS of 1 per number."""
    drawn = sample_noise(shape, generator)
    return drawn / rms(drawn).view(-1, *[1] * (drawn.ndim - 1))


def response(disturbed: Callable[[float], Tensor], sizes: Sequence[float]) -> Tensor:
    """RMS change of a map's result for disturbances of growing size in one direction.

    Args:
        disturbed: From the size of the disturbance to the result, `(B, ...)`; everything else stays the same.
        sizes: Of the disturbance.

    Returns:
        `(len(sizes), B)`, per number of the result. Divided by the size it is the factor by which the map lets this
        disturbance through; for a linear map |A d| / |d|, whatever the size.
    """
    undisturbed = disturbed(0.0)
    return torch.stack([rms(disturbed(size) - undisturbed) for size in sizes])
