"""A tiny policy with random weights and short episodes: enough for all that does not depend on skill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from env_configs import make_env_config
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.checkpoint import Checkpoint, load_checkpoint
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

FEATURES = {
    "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
    "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
    "action": PolicyFeature(FeatureType.ACTION, (2,)),
}
RANGES = {"observation.image": {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.2)}}
TINY = {"down_dims": (16, 32), "n_groups": 4, "time_embed_dim": 16, "num_solver_steps": 2, "device": "cpu"}


def _save(folder: Path, sees: str = "observation.environment_state", **fields: Any) -> Path:
    torch.manual_seed(0)
    inputs, outputs = ({name: FEATURES[name] for name in names} for names in (("observation.state", sees), ("action",)))
    config = FlowMatchingConfig(input_features=inputs, output_features=outputs, **(TINY | fields))
    board = {"min": torch.tensor(0.0), "max": torch.tensor(512.0)}
    stats = {name: {key: value.expand(ft.shape) for key, value in board.items()} for name, ft in FEATURES.items()}
    for part in (FlowMatchingPolicy(config), *make_fm_ft_pre_post_processors(config, stats | RANGES)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Makes checkpoints of tiny policies for Push-T, from states or `sees="observation.image"`, with fields as asked.

    They see one observation, execute 8 actions of 16, and their actions roam the board.
    """

    def make(**fields: Any) -> Checkpoint:
        return load_checkpoint(_save(tmp_path_factory.mktemp("tiny"), **fields))

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    """The tiny policy as it is."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def short_pusht() -> EnvConfig:
    """Push-T with episodes of 30 steps."""
    return make_env_config("pusht_b", episode_length=30, starts="random_state")
