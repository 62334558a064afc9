"""Exponential moving average of the weights, with the schedule of diffusers' `EMAModel`."""

import math

import torch
from torch import nn


def ema_decay(update: int, power: float = 0.75, max_decay: float = 0.9999) -> float:
    """Decay of the given update, 1 - update^(-power), capped.

    Args:
        update: Number of this update, counted from 1; the first one copies the weights (decay 0).
        power: 0.75 suits runs of up to a million steps (diffusers' advice and Diffusion Policy's value).
        max_decay: Upper bound.
    """
    if update < 1:
        raise ValueError(f"updates are counted from 1, got {update}")
    return min(1.0 - update**-power, max_decay)


def check_schedule(power: float, max_decay: float) -> None:
    """Refuse what is no schedule of a decay, by the names that the configurations have for it.

    Raises:
        ValueError: If the power is not positive and finite, or the bound not in [0, 1].
    """
    if not (0 < power < math.inf and 0 <= max_decay <= 1):
        raise ValueError(
            f"ema_max_decay must be in [0, 1] and ema_power positive and finite, got {max_decay} and {power}"
        )


@torch.no_grad()
def ema_update(average: nn.Module, live: nn.Module, decay: float) -> None:
    """Move the average towards the live weights: a <- decay a + (1 - decay) w; buffers are copied.

    Args:
        average: Module of the same structure as `live`, changed in place.
        live: Module in training.
        decay: In [0, 1].
    """
    torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), 1.0 - decay)
    for kept, new in zip(average.buffers(), live.buffers(), strict=True):
        kept.copy_(new)
