"""What every velocity net offers."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from fm_policy.flow.solvers import Velocity


class VelocityNet(nn.Module, ABC):
    """A velocity field on chunks of actions, conditioned on an observation."""

    @abstractmethod
    def forward(self, t: float | Tensor, x: Tensor, o: Tensor) -> Tensor:
        """Velocity at time t.

        Args:
            t: Time in [0, 1], 0 is noise and 1 is data; a scalar for the whole batch, or `(B,)`.
            x: Chunks, `(B, horizon, action_dim)`, normalised.
            o: Observation features, `(B, obs_dim)`.

        Returns:
            dx/dt, `(B, horizon, action_dim)`.
        """

    def bind(self, o: Tensor) -> Velocity:
        """The velocity v(t, x) of these observations, `(B, obs_dim)`, as solvers take it."""
        return lambda t, x: self(t, x, o)


class TimeEmbedding(nn.Module):
    """Sinusoids of t and a small MLP (Vaswani et al. 2017; frequencies as in Diffusion Policy's U-Net)."""

    # The sinusoids were made for step numbers 0-1000: unscaled, t in [0, 1] would hardly turn them.
    TIME_SCALE = 1000.0

    def __init__(self, dim: int) -> None:
        """Embed times into `dim` numbers; dim must be even and at least 4."""
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the time embedding needs an even dimension of at least 4, got {dim}")
        half = dim // 2
        frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half))
        self.register_buffer("frequencies", frequencies * self.TIME_SCALE, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, t: float | Tensor, batch: int) -> Tensor:
        """Embed t, a scalar or `(B,)`, into `(B, dim)`."""
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        if not isinstance(t, Tensor):
            t = torch.full((1,), t, dtype=frequencies.dtype, device=frequencies.device)
        angles = t.reshape(-1, 1).to(frequencies.dtype) * frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1)).expand(batch, -1)
