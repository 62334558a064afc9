"""Observations to one vector of features: o = (B, n_obs_steps * d).

Cameras pass through ResNet-18 (He et al. 2016), numbers go in as they are, normalised. No constructor here
downloads anything: weights come from training or from a checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize


def random_crop(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Crop every image of `(N, C, H, W)` at a place of its own to `shape` (height, width)."""
    n, _, height, width = images.shape
    top = torch.randint(height - shape[0] + 1, (n, 1), device=images.device)
    left = torch.randint(width - shape[1] + 1, (n, 1), device=images.device)
    rows = top + torch.arange(shape[0], device=images.device)  # (N, h)
    columns = left + torch.arange(shape[1], device=images.device)  # (N, w)
    index = torch.arange(n, device=images.device).view(n, 1, 1)
    # Advanced indices around a slice move to the front: (N, h, w, C).
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class SpatialSoftmax(nn.Module):
    """Expected image coordinates, in [-1, 1], of learned keypoints (Finn et al. 2016)."""

    def __init__(self, channels: int, keypoints: int) -> None:
        super().__init__()
        self.to_keypoints = nn.Conv2d(channels, keypoints, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Turn a feature map `(N, channels, H, W)` into coordinates `(N, 2 * keypoints)`."""
        maps = self.to_keypoints(features)
        height, width = maps.shape[-2:]
        attention = maps.flatten(2).softmax(dim=-1).view_as(maps)
        y = torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
        x = torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)
        return torch.cat([attention.sum(dim=3) @ y[:, None], attention.sum(dim=2) @ x[:, None]], dim=-1).flatten(1)


class ImageEncoder(nn.Module):
    """One camera's picture to a vector.

    Args:
        backbone: A torchvision ResNet, `resnet18` or `resnet34`.
        group_norm: GroupNorm (16 channels a group) in place of BatchNorm.
        keypoints: Keypoints of a spatial softmax; 0: global average pooling.
        resize_shape: Height and width to resize to first, or None.
        crop_shape: Height and width to crop to, or None.
        crop_is_random: Random crops in training mode.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        group_norm: bool = True,
        keypoints: int = 0,
        resize_shape: Sequence[int] | None = None,
        crop_shape: Sequence[int] | None = None,
        crop_is_random: bool = True,
    ) -> None:
        super().__init__()
        norm = (lambda channels: nn.GroupNorm(channels // 16, channels)) if group_norm else nn.BatchNorm2d
        resnet = getattr(torchvision.models, backbone)(weights=None, norm_layer=norm)
        channels = resnet.fc.in_features
        self.trunk = nn.Sequential(*list(resnet.children())[:-2])  # without pooling and classifier
        self.pool = SpatialSoftmax(channels, keypoints) if keypoints else nn.AdaptiveAvgPool2d(1)
        self.output_dim: int = 2 * keypoints if keypoints else channels
        self.resize_shape = list(resize_shape) if resize_shape else None
        self.crop_shape = list(crop_shape) if crop_shape else None
        self.crop_is_random = crop_is_random

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised pictures `(N, C, H, W)` as `(N, output_dim)`."""
        return self.pool(self.trunk(self._frame(images))).flatten(1)

    def train(self, mode: bool = True) -> Self:
        """See torch. On a CPU the weights of a robot's net lie channels last, which halves the time of a picture.

        Not in training, which gains less, and whose optimiser saves what lies as the weights do: LeRobot saves
        contiguous tensors only.
        """
        super().train(mode)
        last = not mode and next(self.trunk.parameters()).device.type == "cpu"
        self.trunk.to(memory_format=torch.channels_last if last else torch.contiguous_format)  # type: ignore[call-overload]
        return self

    def _frame(self, images: Tensor) -> Tensor:
        if self.resize_shape:
            images = resize(images, self.resize_shape, antialias=True)
        if not self.crop_shape:
            return images
        if self.training and self.crop_is_random:
            return random_crop(images, self.crop_shape)
        return center_crop(images, self.crop_shape)


class ObservationEncoder(nn.Module):
    """All observations of a history to one vector.

    Args:
        numbers: Names and lengths of the observations that are vectors.
        cameras: Names of the observations that are images.
        n_obs_steps: Length of the history.
        separate: One image encoder for each camera, or one for all.
        image_options: Arguments of `ImageEncoder`.
    """

    def __init__(
        self,
        numbers: Mapping[str, int],
        cameras: Sequence[str],
        n_obs_steps: int,
        separate: bool = False,
        **image_options: object,
    ) -> None:
        super().__init__()
        self.numbers = list(numbers)
        self.cameras = list(cameras)
        count = 0 if not cameras else len(cameras) if separate else 1
        encoders = [ImageEncoder(**image_options) for _ in range(count)]  # type: ignore[arg-type]
        self.images = nn.ModuleList(encoders)
        image_dim = len(cameras) * encoders[0].output_dim if encoders else 0
        self.output_dim = n_obs_steps * (sum(numbers.values()) + image_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Encode a history of observations, each `(B, n_obs_steps, ...)`, as o `(B, output_dim)`."""
        parts = [batch[name] for name in self.numbers]
        for i, name in enumerate(self.cameras):
            encoder = self.images[i % len(self.images)]
            images = batch[name]
            parts.append(encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2]))
        return torch.cat(parts, dim=-1).flatten(1)
