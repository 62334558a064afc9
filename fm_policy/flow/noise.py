"""The one source of noise, for training and for inference alike; and noise on what is observed."""

import math
from collections.abc import Iterable, Mapping, Sequence

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


def check_noise_scale(scale: float) -> None:
    """Refuse a standard deviation of x0 that none is.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"noise_scale must be finite and 0 or more, got {scale}")


def disturbed(batch: Mapping[str, Tensor], names: Iterable[str], size: float) -> dict[str, Tensor]:
    """A batch with independent Gaussian noise on some of its values.

    Args:
        batch: Values by their names.
        names: Those that the noise is for.
        size: Its standard deviation; of 0 nothing is drawn, so that old seeds give what they gave.
    """
    return {**batch, **{name: batch[name] + size * torch.randn_like(batch[name]) for name in names if size}}
