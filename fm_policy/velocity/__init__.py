"""Velocity nets v(t, x, o) behind one small interface. Knows torch only."""

from fm_policy.velocity.interface import VelocityNet
from fm_policy.velocity.transformer import Transformer
from fm_policy.velocity.unet1d import Unet1d

__all__ = ["Transformer", "Unet1d", "VelocityNet"]
