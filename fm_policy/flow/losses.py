"""Losses over chunks, blind to padding."""

import math
from typing import Literal

import torch
from torch import Tensor

from fm_policy.flow.path import interpolate, path_velocity
from fm_policy.flow.solvers import Velocity

Reduction = Literal["mean", "none"]
LOG_VARIANCE_RANGE = (-10.0, 4.0)
SIGMA_RANGE = (math.exp(LOG_VARIANCE_RANGE[0] / 2), math.exp(LOG_VARIANCE_RANGE[1] / 2))
HUBER_SCALE = 0.003
"""Of the distance between a chunk and its teacher's, in normalised actions: near enough for a robot."""


def masked_mse(
    prediction: Tensor, target: Tensor, is_pad: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Squared error, averaged over the time steps that are no padding and over the action dimensions.

    Of a velocity it is the loss of eq. (3); of a reconstructed chunk that of eq. (6), the negative log-likelihood
    under a scalar variance up to a factor.

    Args:
        prediction: `(B, horizon, action_dim)`.
        target: The same shape.
        is_pad: True where a time step lies beyond its episode, `(B, horizon)`; None when none does.
        reduction: "mean" gives a scalar, the mean over all valid elements of the batch; "none" gives
            `(B,)` losses whose mean is that scalar, so that weighting every sample by 1 changes nothing.

    Raises:
        ValueError: If every time step of the batch is padding, or the reduction is unknown.
    """
    return _masked_mean(_difference(prediction, target, is_pad).square(), is_pad, reduction)


def cfm_loss(
    v: Velocity, x0: Tensor, x1: Tensor, is_pad: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Conditional flow matching, eq. (3): |v(t, (1 - t) x0 + t x1) - (x1 - x0)|^2 at one uniform time t per row.

    Args:
        v: Velocity of these rows' observations, v(t, x) with t `(B,)`.
        x0: Noise, `(B, horizon, action_dim)`.
        x1: Data, the same shape.
        is_pad: As in `masked_mse`.
        reduction: As in `masked_mse`.
    """
    t = torch.rand(len(x1), device=x1.device, dtype=x1.dtype)
    return masked_mse(v(t, interpolate(t, x0, x1)), path_velocity(x0, x1), is_pad, reduction)


def gaussian_nll(
    prediction: Tensor,
    target: Tensor,
    log_variance: Tensor,
    is_pad: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Negative log-likelihood of the target around a reconstruction, eq. (B.6) with a diagonal variance, per element.

    L = 1/2 mean(e^2 / sigma^2 + log sigma^2), without the constant log(2 pi) / 2. With sigma fixed it is eq. (B.7),
    whose minimiser the logarithm does not move; with sigma learned the logarithm keeps it from growing.

    Args:
        prediction: Reconstructed chunk, `(B, horizon, action_dim)`.
        target: Data, the same shape.
        log_variance: log sigma^2, broadcast to `(horizon, action_dim)`; clamped to [-10, 4], which is sigma from
            0.007 to 7 in units of the normalised action.
        is_pad: As in `masked_mse`.
        reduction: As in `masked_mse`.

    Raises:
        ValueError: As `masked_mse`.
    """
    s = log_variance.clamp(*LOG_VARIANCE_RANGE)
    squared = _difference(prediction, target, is_pad).square()
    return _masked_mean(0.5 * (squared * torch.exp(-s) + s), is_pad, reduction)


def pseudo_huber(prediction: Tensor, target: Tensor, scale: float, reduction: Reduction = "mean") -> Tensor:
    """Distance of chunks, smooth at zero: sqrt(d^2 + scale^2) - scale, with d^2 the mean square over a chunk.

    As the loss of a distillation (Song & Dhariwal 2024, sec. 3.3; Lee et al. 2024): the square spends itself on the few
    chunks at the border of two modes, while this keeps on making the near ones nearer.

    Args:
        prediction: `(B, horizon, action_dim)`.
        target: The same shape; nothing of it is padding.
        scale: Distance below which it is a square, positive.
        reduction: "mean" gives a scalar, "none" `(B,)` losses whose mean that is.

    Raises:
        ValueError: If the reduction is unknown.
    """
    square = (prediction - target).square().flatten(1).mean(dim=1)
    return _reduce((square + scale**2).sqrt() - scale, reduction)


def _valid(values: Tensor, is_pad: Tensor | None) -> Tensor:
    """True at the time steps that count, `(B, horizon, 1)`."""
    valid = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if is_pad is None else ~is_pad
    return valid.unsqueeze(-1)


def _difference(prediction: Tensor, target: Tensor, is_pad: Tensor | None) -> Tensor:
    # Selected before anything is computed of it: what padding holds must not reach the gradient, finite or not.
    return torch.where(_valid(prediction, is_pad), prediction - target, 0.0)


def _masked_mean(values: Tensor, is_pad: Tensor | None, reduction: Reduction) -> Tensor:
    valid = _valid(values, is_pad)
    share = valid.to(values.dtype).mean()
    if share == 0:
        raise ValueError("every time step of the batch is padding: there is nothing to learn from")
    return _reduce(torch.where(valid, values, 0.0).flatten(1).mean(dim=1) / share, reduction)


def _reduce(per_sample: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return per_sample.mean() if reduction == "mean" else per_sample
