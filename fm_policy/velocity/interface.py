"""What every velocity net offers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fm_policy.flow.solvers import Velocity

# Conditions of all times lie in memory together up to so many rows, which is where it pays: of a robot's one row, and
# not of a batch of training, which reads the weights for many rows anyway.
MOST_ROWS = 256


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

    @abstractmethod
    def bind(self, o: Tensor, times: Sequence[float] = ()) -> Velocity:
        """The velocity v(t, x) of these observations as solvers take it.

        Args:
            o: Observation features, `(B, obs_dim)`.
            times: When v will be asked, if that is known. It may be asked at any other time as well.
        """


Conditions = tuple[Tensor, ...]
"""What the blocks of a net, one after another, are told of a time and of observations, `(B, ...)` each."""


class ConditionedNet(VelocityNet):
    """A velocity net that time and observation enter by way of its blocks' conditions, which x has no part in.

    Times that a solver is going to ask at are embedded at once, and if there are few rows their conditions are computed
    at once: the weights that make them, an eighth of the U-Net's and a third of the Transformer's, are then read once
    per chunk and not once per call. For rows in multiples of 16 it is the same, bit for bit, either way.
    """

    time_embedding: "TimeEmbedding"
    obs_embedding: nn.Module

    @abstractmethod
    def condition(self, t: Tensor, o: Tensor) -> Conditions:
        """Conditions of embedded times and observations, `(B, ...)` each."""

    @abstractmethod
    def transform(self, x: Tensor, conditions: Conditions) -> Tensor:
        """dx/dt of x, `(B, horizon, action_dim)`."""

    def forward(self, t: float | Tensor, x: Tensor, o: Tensor | Conditions) -> Tensor:
        """See `VelocityNet.forward`; with conditions instead of features t is told by these."""
        if isinstance(o, Tensor):
            o = self.condition(self.time_embedding(t).expand(len(x), -1), self.obs_embedding(o))
        return self.transform(x, o)

    def bind(self, o: Tensor, times: Sequence[float] = ()) -> Velocity:
        """See `VelocityNet.bind`."""
        if not times:
            return lambda t, x: self(t, x, o)
        embedded, features = self.time_embedding(times), self.obs_embedding(o)
        if len(times) * len(o) <= MOST_ROWS:
            at_once = dict(zip(times, self._at_once(embedded, features), strict=True))
            return lambda t, x: self(t, x, at_once.get(t, o) if isinstance(t, float) else o)
        rows = dict(zip(times, embedded.split(1), strict=True))

        def velocity(t: float | Tensor, x: Tensor) -> Tensor:
            row = rows.get(t) if isinstance(t, float) else None
            return self(t, x, o if row is None else self.condition(row.expand(len(o), -1), features))

        return velocity

    def _at_once(self, embedded: Tensor, features: Tensor) -> Iterator[Conditions]:
        """The conditions at each of S embedded times `(S, dim)` for embedded observations, from one batch of all."""
        count = len(embedded)
        blocks = self.condition(embedded.repeat_interleave(len(features), dim=0), features.repeat(count, 1))
        return zip(*(block.chunk(count) for block in blocks), strict=True)


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

    def forward(self, t: float | Sequence[float] | Tensor) -> Tensor:
        """Embed times, a scalar or B of them, into `(1 or B, dim)`."""
        frequencies: Tensor = self.frequencies  # type: ignore[assignment]
        if isinstance(t, (int, float)):
            times = frequencies.new_full((1,), t)  # made where it is used: a copy would make an accelerator wait
        else:
            times = torch.as_tensor(t, dtype=frequencies.dtype, device=frequencies.device)
        angles = times.reshape(-1, 1) * frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
