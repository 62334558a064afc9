"""The one source of noise, for training and for inference alike."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_noise(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw x0 ~ N(0, I).

    A given generator draws on its own device, and the result is moved: a CPU generator gives the same
    numbers whatever device the policy runs on.

    Args:
        shape: Shape of the sample, `(B, horizon, action_dim)` for a batch of chunks.
        generator: Source of randomness; torch's global one when None.
        device: Where the sample is wanted.
        dtype: Floating type of the sample.
    """
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    noise = torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)
    return noise.to(device) if device is not None else noise
