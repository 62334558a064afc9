"""Which noise is paired with which data: the coupling q(x0, x1 | o)."""

import torch
from torch import Tensor

from fm_policy.flow.noise import sample_noise


def independent(x1: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise drawn without regard to the data: q(x0, x1 | o) = N(x0; 0, I) p(x1 | o).

    The only coupling under which training sees, for every observation, the noise that inference draws:
    mini-batch optimal transport ignores the condition and skews it (Cheng & Schwing 2025, C2OT).

    Args:
        x1: Data, `(B, horizon, action_dim)`; the noise takes its shape, type and device.
        generator: Source of randomness; torch's global one when None.
    """
    return sample_noise(x1.shape, generator, device=x1.device, dtype=x1.dtype)


COUPLINGS = {"independent": independent}
