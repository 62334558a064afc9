"""DDPM as a method beside flow matching: the same net predicts noise, and its weights go to LeRobot's diffusion policy.

The U-Net is Diffusion Policy's in both, weight by weight. LeRobot's encoder has one more linear layer and a ReLU behind
the keypoints. These lie in [-1, 1], so that an identity with a bias of 1 passes them through, moved by 1; the net is
trained on keypoints that are moved so, and nothing else differs between the methods.
"""

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fm_policy.encoders import ObservationEncoder
from fm_policy.flow.coupling import independent
from fm_policy.flow.losses import masked_mse
from fm_policy.velocity import VelocityNet
from fm_policy.velocity.interface import TimeEmbedding

STEPS = 100
LARGEST_BETA = 0.999
LAST_BLOCK_GROUPS = 8  # of LeRobot's U-Net, whatever its n_groups

NAMES = (
    (r"^encoder\.images\.0\.trunk\.", "rgb_encoder.backbone."),
    (r"^encoder\.images\.0\.pool\.to_keypoints\.", "rgb_encoder.pool.nets."),
    (r"^velocity\.time_embedding\.mlp\.0\.", "unet.diffusion_step_encoder.1."),
    (r"^velocity\.time_embedding\.mlp\.2\.", "unet.diffusion_step_encoder.3."),
    (r"^velocity\.(shrink|grow)\.(\d+)\.", r"velocity.\1.\2.2."),
    (r"^velocity\.(down|shrink)\.", "unet.down_modules."),
    (r"^velocity\.middle\.", "unet.mid_modules."),
    (r"^velocity\.(up|grow)\.", "unet.up_modules."),
    (r"^velocity\.out\.0\.", "unet.final_conv.0.block."),
    (r"^velocity\.out\.1\.", "unet.final_conv.1."),
    (r"\.first\.", ".conv1.block."),
    (r"\.second\.", ".conv2.block."),
    (r"\.film\.", ".cond_encoder.1."),
    (r"\.skip\.", ".residual_conv."),
)
"""From the names of our weights to LeRobot's, one after another."""


def check(policy: Mapping[str, Any]) -> None:
    """Refuse a configuration whose net LeRobot's diffusion policy cannot have.

    Raises:
        ValueError: Naming the field.
    """
    if policy["velocity_net"] != "unet":
        raise ValueError(f"ddpm needs velocity_net='unet', LeRobot's only one, got {policy['velocity_net']!r}")
    if not policy["spatial_softmax_num_keypoints"]:
        raise ValueError("ddpm needs spatial_softmax_num_keypoints above 0, got 0: LeRobot's encoder always has some")
    if policy["n_groups"] != LAST_BLOCK_GROUPS:
        raise ValueError(f"ddpm needs n_groups={LAST_BLOCK_GROUPS}, as LeRobot's last block, got {policy['n_groups']}")


@cache
def signal_shares(device: torch.device) -> Tensor:
    """Share of the data's variance at each of the 100 noise levels, `(100,)`: squared cosine (Nichol & Dhariwal 2021).

    To the bit diffusers' `squaredcos_cap_v2`, which the tests compare.
    """

    def share(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - share((k + 1) / STEPS) / share(k / STEPS), LARGEST_BETA) for k in range(STEPS)]
    return (1 - torch.tensor(betas)).cumprod(0).to(device)


def loss(net: VelocityNet, o: Tensor, x1: Tensor, is_pad: Tensor) -> Tensor:
    """Squared error of the predicted noise at a uniform level (Ho et al. 2020, eq. 14), blind to padding.

    Args:
        net: Asked at t = level / 1000, which its embedding turns back into the level.
        o: Observation features, `(B, obs_dim)`, see `features`.
        x1: Data, `(B, horizon, action_dim)`.
        is_pad: True beyond the episode's end, `(B, horizon)`.
    """
    level = torch.randint(STEPS, (len(x1),), device=x1.device)
    share, noise = signal_shares(x1.device)[level, None, None], independent(x1)
    noisy = share.sqrt() * x1 + (1 - share).sqrt() * noise
    return masked_mse(net(level / TimeEmbedding.TIME_SCALE, noisy, o), noise, is_pad)


def features(encoder: ObservationEncoder, batch: Mapping[str, Tensor]) -> Tensor:
    """The encoder's answer `(B, obs_dim)` with all keypoints moved by 1."""
    o = encoder(batch)
    n_obs_steps = batch[encoder.cameras[0]].shape[1]
    moved = torch.zeros(n_obs_steps, o.shape[1] // n_obs_steps, device=o.device)
    moved[:, -encoder.images[0].output_dim :] = 1  # type: ignore[operator]
    return o + moved.flatten()


def as_lerobots(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as those of LeRobot's `DiffusionModel`, without its constants."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    coordinates = 2 * len(renamed["rgb_encoder.pool.nets.bias"])
    passed = {"rgb_encoder.out.weight": torch.eye(coordinates), "rgb_encoder.out.bias": torch.ones(coordinates)}
    return renamed | passed
