"""Conditional 1-D U-Net over the time steps of a chunk (Janner et al. 2022; Chi et al. 2023)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fm_policy.velocity.interface import ConditionedNet, Conditions, TimeEmbedding
from fm_policy.velocity.mish import Mish

# Up to this batch a CPU is faster as below: a call of the (64, 128, 256) net takes 2.5 instead of 4.5 ms for one row,
# 4.7 instead of 5.7 for four, on one core; for 8 rows the two are level.
FEW_ROWS = 4

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class Conv1d(nn.Conv1d):
    """Torch's convolution, but on a CPU one matrix product of all windows, where that is faster. Equal to rounding.

    That is so for the few rows that a robot asks for, where torch multiplies without oneDNN and with the windows on the
    wrong side; and for any number of rows if the weights lie channels last, as `lay_weights` lays them.
    """

    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x, `(B, inputs, T)`."""
        # An exported graph keeps its convolutions; a compiled one is twice as slow with them as with the products.
        exported = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        if x.device.type != "cpu" or exported or (len(x) > FEW_ROWS and not self.channels_last):
            return super().forward(x)
        (width,), (stride,), padding = self.kernel_size, self.stride, int(self.padding[0])
        if self.channels_last:  # windows are runs of memory
            windows = F.pad(x.transpose(1, 2), (0, 0, padding, padding)).unfold(1, width, stride).transpose(2, 3)
            weight = self.weight.transpose(1, 2)
        else:
            windows, weight = F.pad(x, (padding, padding)).unfold(2, width, stride).transpose(1, 2), self.weight
        rows = windows.flatten(2).contiguous()  # (B, T', inputs * width); a view, of width 1, would round as it lies
        return F.linear(rows, weight.flatten(1), self.bias).transpose(1, 2)


def lay_weights(net: nn.Module, channels_last: bool) -> None:
    """Lay the weights of every `Conv1d` of a net on a CPU channels last or as torch does; no number changes.

    Channels last, windows are copied in runs, and one product does for any number of rows: on an AMD core without
    AVX-512 a call of the (64, 128, 256) net takes .7 to .8 of the time for 8 to 128 rows. With AVX-512 nothing is done,
    since there torch's convolution computes 64 rows as fast as the core multiplies.
    """
    convs = (module for module in net.modules() if isinstance(module, Conv1d))
    with torch.inference_mode(mode=False):  # whose tensors could not be trained any more
        for conv in convs:
            last = channels_last and conv.weight.device.type == "cpu" and not AVX512
            if last == conv.channels_last:
                return  # a net's are laid together, and a trainer asks in every step
            weight = conv.weight.detach()
            conv.weight.data = weight.transpose(1, 2).contiguous().transpose(1, 2) if last else weight.contiguous()
            conv.channels_last = last


class ConvBlock(nn.Sequential):
    """Convolution that keeps the length, group norm, Mish."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, n_groups: int) -> None:
        super().__init__(
            Conv1d(inputs, outputs, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, outputs),
            Mish(),
        )


class FilmResBlock(nn.Module):
    """Two convolutions around a feature-wise scale and shift by the condition (Perez et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, cond_dim: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.first = ConvBlock(inputs, outputs, kernel_size, n_groups)
        self.film = nn.Linear(cond_dim, 2 * outputs)
        self.second = ConvBlock(outputs, outputs, kernel_size, n_groups)
        self.skip = Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """Transform x `(B, inputs, T)`, scaled and shifted by what `self.film` made of the condition."""
        scale, shift = film.unsqueeze(-1).chunk(2, dim=1)
        return self.second(torch.addcmul(shift, scale, self.first(x))) + self.skip(x)


class ResPair(nn.Sequential):
    """Two residual blocks."""

    def forward(self, x: Tensor, films: Iterator[Tensor]) -> Tensor:  # type: ignore[override]
        """Transform x `(B, inputs, T)`, each block by the next film."""
        for block in self:
            x = block(x, next(films))
        return x


class Unet1d(ConditionedNet):
    """The U-Net of Diffusion Policy as a velocity net.

    With `down_dims` (256, 512, 1024), `kernel_size` 5, `n_groups` 8 and `time_embed_dim` 256 it is the
    paper's: 66.1 M parameters for Franka Kitchen (9 actions, 60 observation numbers).

    Args:
        action_dim: Numbers per action.
        obs_dim: Observation features.
        down_dims: Channels of each level; the horizon must be a multiple of 2^(levels - 1).
        kernel_size: Odd width of the convolutions.
        n_groups: Groups of the group norm; must divide every entry of `down_dims`.
        time_embed_dim: Width of the time embedding.
    """

    def __init__(
        self,
        action_dim: int,
        obs_dim: int,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        time_embed_dim: int = 256,
    ) -> None:
        super().__init__()
        cond_dim = time_embed_dim + obs_dim

        def pair(inputs: int, outputs: int) -> ResPair:
            return ResPair(
                FilmResBlock(inputs, outputs, cond_dim, kernel_size, n_groups),
                FilmResBlock(outputs, outputs, cond_dim, kernel_size, n_groups),
            )

        self.time_embedding = TimeEmbedding(time_embed_dim)
        self.obs_embedding = nn.Identity()
        self.activation = Mish()
        levels = list(zip((action_dim, *down_dims[:-1]), down_dims, strict=True))
        self.down = nn.ModuleList(pair(a, b) for a, b in levels)
        self.shrink = nn.ModuleList(Conv1d(d, d, 3, stride=2, padding=1) for d in down_dims[:-1])
        self.middle = pair(down_dims[-1], down_dims[-1])
        self.up = nn.ModuleList(pair(2 * b, a) for a, b in levels[:0:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose1d(d, d, 4, stride=2, padding=1) for d in down_dims[-2::-1])
        self.out = nn.Sequential(
            ConvBlock(down_dims[0], down_dims[0], kernel_size, n_groups),
            Conv1d(down_dims[0], action_dim, 1),
        )

    def condition(self, t: Tensor, o: Tensor) -> Conditions:
        """See `ConditionedNet.condition`: each block's film, `(B, 2 * outputs)`."""
        cond = self.activation(torch.cat([t, o], dim=-1))
        return tuple(block.film(cond) for pair in (*self.down, self.middle, *self.up) for block in pair)

    def transform(self, x: Tensor, conditions: Conditions) -> Tensor:
        """See `ConditionedNet.transform`."""
        h, films = x.transpose(1, 2), iter(conditions)  # (B, action_dim, horizon)
        skips = []
        for level, down in enumerate(self.down):
            h = down(h, films)
            if level > 0:  # as in Diffusion Policy, whose first level has no skip
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle(h, films)
        for up, grow in zip(self.up, self.grow, strict=True):
            h = grow(up(torch.cat([h, skips.pop()], dim=1), films))
        return self.out(h).transpose(1, 2)
