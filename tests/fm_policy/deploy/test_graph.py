"""The exported graph against the policy that it was made of, through LeRobot's processors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.deploy.export import export
from fm_policy.deploy.graph import eager
from fm_policy.deploy.runner import Runner, load
from fm_policy.deploy.settings import settings_of
from fm_policy.evaluation.checkpoint import Checkpoint, load_checkpoint
from fm_policy.flow.noise import sample_noise
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

STATE = {"observation.state": PolicyFeature(FeatureType.STATE, (2,))}
NUMBERS = STATE | {"observation.environment_state": PolicyFeature(FeatureType.ENV, (5,))}
CAMERA = STATE | {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 40))}
CAMERAS = CAMERA | {"observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 36, 32))}
ACTION = PolicyFeature(FeatureType.ACTION, (3,))
WIDE = {"low": [-1e9] * 3, "high": [1e9] * 3, "step": [1e9] * 3, "deadline": None}
SMALL = {
    "device": "cpu",
    "output_features": {"action": ACTION},
    "horizon": 8,
    "n_action_steps": 3,
    "num_solver_steps": 3,
    "down_dims": (16, 32),
    "kernel_size": 3,
    "n_groups": 4,
    "time_embed_dim": 8,
    "transformer_dim": 16,
    "transformer_layers": 1,
    "transformer_heads": 2,
    "use_ema": False,
}
SYNTH = {"stage": "residual", "head": "control_synth", "head_width": 8}
UNET = {"stage": "residual", "head": "unet", "head_steps": 2}
MEAN_STD = dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MEAN_STD")

CASES = {
    "unet, no head, state, noise scaled": {"input_features": STATE, "solver": "heun", "noise_scale": 0.6},
    "unet, synth head, two vectors": SYNTH | {"input_features": NUMBERS, "n_obs_steps": 2},
    "unet, unet head, camera cropped, keypoints, batch norm": UNET
    | {"input_features": CAMERA, "crop_shape": (28, 30), "use_group_norm": False, "spatial_softmax_num_keypoints": 4},
    "transformer, no head, two cameras resized and cropped, mean and deviation": {
        "velocity_net": "transformer",
        "input_features": CAMERAS,
        "use_separate_rgb_encoder_per_camera": True,
        "n_obs_steps": 2,
        "resize_shape": (30, 30),
        "crop_shape": (28, 28),
        "normalization_mapping": MEAN_STD,
    },
    "transformer, synth head of a chunk, camera resized": SYNTH
    | {"velocity_net": "transformer", "input_features": CAMERA, "head_layout": "chunk", "resize_shape": (24, 24)},
    "transformer, unet head, two vectors, averaged weights": UNET
    | {"velocity_net": "transformer", "input_features": NUMBERS, "use_ema": True, "solver": "rk4"},
}


def statistics(features: dict[str, PolicyFeature]) -> dict[str, dict[str, torch.Tensor]]:
    """Of numbers from -2 to 3, or of pictures."""
    numbers = {"min": -2.0, "max": 3.0, "mean": 0.5, "std": 1.5}
    return {
        name: {
            key: torch.full((3, 1, 1) if feature.type is FeatureType.VISUAL else feature.shape, value)
            for key, value in numbers.items()
        }
        for name, feature in features.items()
    }


def save(folder: Path, **fields) -> Checkpoint[FlowMatchingPolicy]:
    """A small checkpoint whose weights, many of which start at zero, are all moved."""
    torch.manual_seed(0)
    config = FlowMatchingConfig(**(SMALL | fields))
    policy = FlowMatchingPolicy(config)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stats = statistics(config.input_features | config.output_features)
    for part in (policy, *make_fm_ft_pre_post_processors(config, stats)):
        part.save_pretrained(folder)
    return load_checkpoint(folder)


def observe(config: FlowMatchingConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a robot sees: numbers, and pictures as cameras give them."""
    seen = {}
    for name, feature in config.input_features.items():
        if feature.type is FeatureType.VISUAL:
            channels, height, width = feature.shape
            seen[name] = rng.integers(256, size=(height, width, channels), dtype=np.uint8)
        else:
            seen[name] = rng.uniform(-3, 4, size=feature.shape)
    return seen


def as_lerobot(observation: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same as LeRobot's preprocessor is given it."""
    return {
        name: torch.from_numpy(value).permute(2, 0, 1).float() / 255
        if value.dtype == np.uint8
        else torch.from_numpy(value).float()
        for name, value in observation.items()
    }


def noise(seed: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: sample_noise(shape, generator).numpy()


def assert_same_episodes(runner, checkpoint, episodes=(7, 2, 4)):
    """Every action of some episodes, between which both are reset."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(5)
    for length in episodes:
        runner.reset()
        checkpoint.policy.reset()
        for _ in range(length):
            observation = observe(checkpoint.policy.config, rng)
            action = runner.act(observation)
            batch = checkpoint.preprocessor(as_lerobot(observation))
            wanted = checkpoint.postprocessor(checkpoint.policy.select_action(batch, generator=generator))
            np.testing.assert_allclose(action, wanted[0].numpy(), atol=1e-4, rtol=0)
    assert runner.events == {}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_the_exported_policy_acts_like_select_action(fields, tmp_path):
    checkpoint = save(tmp_path / "checkpoint", **fields)
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_episodes(load(tmp_path / "out", noise=noise(5), **WIDE), checkpoint)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's loader
def test_torch_exports_graph_has_the_same_signature(tmp_path):
    checkpoint = save(tmp_path / "checkpoint", **SYNTH, input_features=NUMBERS, n_obs_steps=2, noise_scale=0.6)
    export(tmp_path / "checkpoint", tmp_path / "out", form="pt2")
    module = torch.export.load(tmp_path / "out" / "policy.pt2").module()

    def compute(inputs):
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.inference_mode():
            return module(tensors.pop("noise"), tensors)[0].numpy()

    assert_same_episodes(load(tmp_path / "out", compute, noise=noise(5), **WIDE), checkpoint)


def test_a_runner_drives_the_policy_itself(tmp_path):
    checkpoint = save(tmp_path, input_features=NUMBERS, n_obs_steps=3)
    settings = settings_of(checkpoint)
    runner = Runner(settings | {"limits": settings["limits"] | WIDE}, eager(checkpoint), noise(5))
    assert_same_episodes(runner, checkpoint)
