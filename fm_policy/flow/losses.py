"""Losses over chunks, blind to padding."""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "none"]


def masked_mse(
    prediction: Tensor, target: Tensor, is_pad: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Squared error, averaged over the time steps that are no padding and over the action dimensions.

    Args:
        prediction: `(B, horizon, action_dim)`.
        target: The same shape.
        is_pad: True where a time step lies beyond its episode, `(B, horizon)`; None when none does.
        reduction: "mean" gives a scalar, the mean over all valid elements of the batch; "none" gives
            `(B,)` losses whose mean is that scalar, so that weighting every sample by 1 changes nothing.

    Raises:
        ValueError: If every time step of the batch is padding, or the reduction is unknown.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    valid = torch.ones(prediction.shape[:2], dtype=torch.bool, device=prediction.device)
    if is_pad is not None:
        valid = ~is_pad
    share = valid.to(prediction.dtype).mean()
    if share == 0:
        raise ValueError("every time step of the batch is padding: there is nothing to learn from")
    # Selected before it is squared: what padding holds must not reach the gradient, finite or not.
    difference = torch.where(valid.unsqueeze(-1), prediction - target, 0.0)
    per_sample = difference.square().flatten(1).mean(dim=1) / share
    return per_sample.mean() if reduction == "mean" else per_sample
