"""Transformer over the time steps of a chunk, conditioned by adaptive layer norm (Peebles & Xie 2023)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fm_policy.velocity.interface import ConditionedNet, Conditions, TimeEmbedding


class AdaptiveBlock(nn.Module):
    """Self-attention and MLP, each shifted, scaled and gated by the condition; starts as the identity."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.merge = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.drop = nn.Dropout(dropout)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Transform x `(B, T, dim)` by what `self.modulation` made of the condition, `(B, 6 * dim)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.drop(self._attend(torch.addcmul(shift1, 1 + scale1, self.norm(x))))
        return x + gate2 * self.drop(self.mlp(torch.addcmul(shift2, 1 + scale2, self.norm(x))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.merge(mixed.transpose(1, 2).reshape(batch, length, dim))


class Transformer(ConditionedNet):
    """A small diffusion transformer as a velocity net.

    Args:
        action_dim: Numbers per action.
        obs_dim: Observation features.
        horizon: Time steps of a chunk.
        dim: Width.
        layers: Number of blocks.
        heads: Attention heads; must divide `dim`.
        dropout: Dropout probability in attention, MLP and residuals.
    """

    def __init__(
        self,
        action_dim: int,
        obs_dim: int,
        horizon: int,
        dim: int = 512,
        layers: int = 6,
        heads: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding(dim)
        self.obs_embedding = nn.Sequential(nn.Linear(obs_dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.activation = nn.SiLU()
        self.embed = nn.Linear(action_dim, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, horizon, dim))
        self.blocks = nn.ModuleList(AdaptiveBlock(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def condition(self, t: Tensor, o: Tensor) -> Conditions:
        """See `ConditionedNet.condition`: each block's modulation, `(B, 6 * dim)`."""
        cond = self.activation(t + o)
        return tuple(block.modulation(cond) for block in self.blocks)  # type: ignore[operator]

    def transform(self, x: Tensor, conditions: Conditions) -> Tensor:
        """See `ConditionedNet.transform`."""
        h = self.embed(x) + self.position
        for block, modulation in zip(self.blocks, conditions, strict=True):
            h = block(h, modulation)
        return self.out(self.norm(h))
