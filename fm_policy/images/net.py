"""Velocity of images: diffusers' U-Net, alone or with a head behind it."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from fm_policy.flow.solvers import CountedVelocity, Velocity, integrate
from fm_policy.residual.control_synth import ControlSynth

TIME_SCALE = 1000.0  # diffusers' sinusoids were made for step numbers up to 1000
HEADS = ("unet", "control_synth")
HEAD_SPAN, HEAD_STEPS = 0.25, 4  # T_r and the Euler steps in it, as in the recipes
HEAD_CHANNELS = (16,)
LARGEST_STATE = 1024  # numbers of an image that one ControlSynth may couple; in a larger one each pixel has its own
NOTHING = (1, 1)  # shape of what the head observes: one zero


@dataclass(frozen=True)
class Shape:
    """Sizes of a U-Net.

    Attributes:
        channels: Of each level; each level halves the image of the one before.
        layers: Residual blocks of a level.
        attention: The levels that attend, counted from 0.
        head_channels: Channels of an attention head; levels that attend, and the last one, have a multiple of it.
        dropout: Probability in the residual blocks.
        groups: Of the group norms.
    """

    channels: tuple[int, ...]
    layers: int = 1
    attention: tuple[int, ...] = ()
    head_channels: int = 64
    dropout: float = 0.0
    groups: int = 8

    def __post_init__(self) -> None:
        attending = [self.channels[level] for level in self.attention] + [self.channels[-1]] * bool(self.attention)
        if any(channels % self.head_channels for channels in attending):
            raise ValueError(f"levels that attend need multiples of {self.head_channels} channels, got {self.channels}")


class Unet2d(nn.Module):
    """v(t, x) on chunks of pixels, by diffusers' `UNet2DModel`."""

    def __init__(self, image: tuple[int, int, int], shape: Shape, *, zero: bool = False) -> None:
        """A net for images of (height, width, channels); `zero`: it starts as the zero field."""
        super().__init__()
        self.image = image
        height, width, channels = image
        levels = range(len(shape.channels))
        down = tuple("AttnDownBlock2D" if level in shape.attention else "DownBlock2D" for level in levels)
        up = tuple("AttnUpBlock2D" if level in shape.attention else "UpBlock2D" for level in reversed(levels))
        net: Any = UNet2DModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=shape.channels,
            layers_per_block=shape.layers,
            attention_head_dim=shape.head_channels,
            norm_num_groups=shape.groups,
            dropout=shape.dropout,
            add_attention=bool(shape.attention),
        )
        if zero:
            for parameter in net.conv_out.parameters():
                nn.init.zeros_(parameter)
        self.net = net

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Velocity at time t, a scalar or `(B,)`, of chunks `(B, pixels, channels)`."""
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        picture = x.unflatten(1, self.image[:2]).movedim(-1, 1).contiguous()
        return self.net(picture, TIME_SCALE * times).sample.movedim(1, -1).flatten(1, 2)


class ImageFlow(nn.Module):
    """A flow from noise at t = 0 to images at t = 1, and perhaps a head from 1 to 1 + T_r.

    Where there is a head, the flow is frozen.
    """

    def __init__(self, image: tuple[int, int, int], shape: Shape, head: str = "") -> None:
        """See `Unet2d`.

        Args:
            image: Height, width and channels.
            shape: Of the flow's net.
            head: One of `HEADS`, or "" for none.

        Raises:
            ValueError: If the head is unknown.
        """
        super().__init__()
        if head and head not in HEADS:
            raise ValueError(f"head must be one of {list(HEADS)}, got {head!r}")
        height, width, channels = image
        self.flow = Unet2d(image, shape)
        self.head: Unet2d | ControlSynth | None = None
        if head:
            self.flow.requires_grad_(False)
        if head == "unet":
            self.head = Unet2d(image, Shape(HEAD_CHANNELS), zero=True)
        if head == "control_synth":
            layout = "chunk" if channels * height * width <= LARGEST_STATE else "shared"
            self.head = ControlSynth(channels, 1, height * width, layout=layout)

    def solve(self, x0: Tensor, solver: str, steps: int, *, checkpoint: bool = False) -> Tensor:
        """From noise `(B, pixels, channels)` to images; arguments as for `integrate`."""
        return self.solve_counted(x0, solver, steps, checkpoint=checkpoint)[0]

    def solve_counted(self, x0: Tensor, solver: str, steps: int, *, checkpoint: bool = False) -> tuple[Tensor, int]:
        """Images, and the calls of the flow's net (NFE); the head's `HEAD_STEPS` come on top."""
        v = CountedVelocity(self.flow)
        with torch.set_grad_enabled(self.head is None and torch.is_grad_enabled()):
            x = integrate(v, x0, solver, steps, checkpoint=checkpoint)
        if self.head is not None:
            x = integrate(self._head(x), x, "euler", HEAD_STEPS, start=1.0, end=1.0 + HEAD_SPAN)
        return x, v.calls

    def _head(self, x: Tensor) -> Velocity:
        if isinstance(self.head, ControlSynth):
            return self.head.bind(x.new_zeros(NOTHING))
        assert self.head is not None
        return self.head
