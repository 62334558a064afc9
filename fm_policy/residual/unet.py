"""The head's ablation: a U-Net, about whose stability nothing can be said."""

from collections.abc import Sequence

from torch import nn

from fm_policy.velocity.unet1d import Unet1d


class ResidualUnet(Unet1d):
    """`Unet1d` that starts as the zero field, so that an untrained head returns the flow's chunk.

    Its times run from 1 to 1 + T_r; the time embedding knows no upper end. Arguments as for `Unet1d`.
    """

    def __init__(
        self,
        action_dim: int,
        obs_dim: int,
        down_dims: Sequence[int] = (32, 64),
        kernel_size: int = 5,
        n_groups: int = 8,
        time_embed_dim: int = 32,
    ) -> None:
        super().__init__(action_dim, obs_dim, down_dims, kernel_size, n_groups, time_embed_dim)
        last: nn.Conv1d = self.out[-1]  # type: ignore[assignment]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
