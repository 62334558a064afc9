"""Small policies and batches, made from their configuration alone."""

from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor

from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

ACTION_DIM = 3
VECTORS = {
    "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    "observation.environment_state": PolicyFeature(FeatureType.ENV, (5,)),
}
CAMERAS = {
    "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
}


def config(**changes) -> FlowMatchingConfig:
    """A configuration whose nets run in milliseconds."""
    defaults = {
        "device": "cpu",
        "input_features": dict(VECTORS),
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        "down_dims": (16, 32),
        "kernel_size": 3,
        "n_groups": 4,
        "time_embed_dim": 8,
        "transformer_dim": 16,
        "transformer_layers": 2,
        "transformer_heads": 2,
        "num_solver_steps": 4,
    }
    return FlowMatchingConfig(**{**defaults, **changes})


def policy(**changes) -> FlowMatchingPolicy:
    """A tiny policy with seeded weights, in training mode."""
    torch.manual_seed(0)
    return FlowMatchingPolicy(config(**changes))


def finetuning(**changes) -> FlowMatchingPolicy:
    """A tiny policy in stage `finetune` with a copy of its base, as a trainer makes it, in training mode.

    Its weights are moved away from their first values, many of which are zero in a Transformer.
    """
    torch.manual_seed(0)
    policy = FlowMatchingPolicy(config(stage="finetune", **changes), dataset_meta=SimpleNamespace())
    with torch.no_grad():
        for parameter in policy.net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for copied in (policy.base_net, *([policy.ema_net] if policy.config.use_ema else [])):
        copied.load_state_dict(policy.net.state_dict())
    return policy.train()


def windows(config: FlowMatchingConfig, size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A normalised training batch of the shapes that the configuration asks for."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (config.n_obs_steps, *ft.shape) for name, ft in config.input_features.items()}
    shapes["action"] = (config.horizon, ACTION_DIM)
    batch = {name: torch.rand(size, *shape, generator=generator) * 2 - 1 for name, shape in shapes.items()}
    return batch | {"action_is_pad": torch.zeros(size, config.horizon, dtype=torch.bool)}


def frame(config: FlowMatchingConfig, size: int = 4, seed: int = 0) -> dict[str, Tensor | None]:
    """A normalised present observation as LeRobot's evaluation hands it in, `action: None` included."""
    batch = windows(config, size, seed)
    return {name: batch[name][:, -1] for name in config.input_features} | {"action": None}


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Makers of small things, the functions above; and the features `VECTORS`, `CAMERAS`."""
    makers = {"config": config, "policy": policy, "finetuning": finetuning, "windows": windows, "frame": frame}
    return SimpleNamespace(**makers, VECTORS=VECTORS, CAMERAS=CAMERAS)
