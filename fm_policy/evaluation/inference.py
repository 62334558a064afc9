"""From observations of some environments of a batch to chunks of actions for them, row by row reproducible."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import preprocess_observation
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STR
from numpy.typing import NDArray
from torch import Tensor

from fm_policy.evaluation.episodes import EpisodeKey
from fm_policy.evaluation.policies import ChunkPolicy
from fm_policy.flow.noise import sample_noise

ROW_BLOCK = 16
"""Rows of an inference call come in multiples of this.

The matrix kernels of a CPU treat the rows of a last, incomplete block otherwise than the rest, and a row's last
bits change with it. Calls of 16, 32, 48, ... rows give each row the same bits wherever it stands, with one thread
or more (measured for the nets of this package on AVX-512; the tests measure it anew where they run).
"""

type Processor = PolicyProcessorPipeline[Any, Any]
Observation = dict[str, Any]  # of a VectorEnv: arrays (n_envs, ...), or dictionaries of such


def map_observation(function: Callable[[NDArray], NDArray], observation: Observation) -> Observation:
    """Apply a function to every array of an observation."""
    return {
        name: map_observation(function, value) if isinstance(value, dict) else function(value)
        for name, value in observation.items()
    }


def episode_noise(key: EpisodeKey) -> torch.Generator:
    """The source of an episode's noise: its n-th chunk takes the n-th draw, whatever runs beside it."""
    return _generator(np.random.SeedSequence(key))


def episode_observation_noise(key: EpisodeKey) -> torch.Generator:
    """A source of its own for the noise in an episode's observations: x0 is the same with and without it."""
    return _generator(np.random.SeedSequence(key, spawn_key=(1,)))


def _generator(source: np.random.SeedSequence) -> torch.Generator:
    return torch.Generator().manual_seed(int(source.generate_state(1, np.uint64)[0]))


def observed_numbers(config: PreTrainedConfig) -> dict[str, int]:
    """How many numbers each observed feature has, in the order of the configuration.

    Raises:
        ValueError: If the policy sees images: noise of a size in normalised units is not what disturbs a camera.
    """
    if config.image_features:
        cameras = list(config.image_features)
        raise ValueError(f"only observations of numbers can be disturbed, and the policy sees the images {cameras}")
    return {name: math.prod(feature.shape) for name, feature in (config.input_features or {}).items()}


def shift_observation(batch: Mapping[str, Any], numbers: Mapping[str, int], shift: Tensor) -> dict[str, Any]:
    """Add `shift` to preprocessed observations.

    Args:
        batch: Holds each feature as `(B, n_obs_steps, *shape)`.
        numbers: See `observed_numbers`.
        shift: `(B, n_obs_steps, sum of numbers)`, the features side by side.
    """
    parts = zip(numbers, shift.split(list(numbers.values()), dim=-1), strict=True)
    return {**batch, **{name: batch[name] + part.to(batch[name]).view_as(batch[name]) for name, part in parts}}


def _check_task(config: PreTrainedConfig, env_config: EnvConfig) -> None:
    task = {env_config.features_map.get(name, name): spec.shape for name, spec in env_config.features.items()}
    for name, spec in ((config.input_features or {}) | (config.output_features or {})).items():
        if name not in config.image_features and name in task and tuple(task[name]) != tuple(spec.shape):
            raise ValueError(
                f"the policy is of another task: its '{name}' has the shape {tuple(spec.shape)}, "
                f"that of {env_config.type} {tuple(task[name])}"
            )
    # Of equal shape, and of another meaning: joint targets and velocities of Kitchen.
    learned, asked = getattr(config, "action_feature_names", None), getattr(env_config, "action_names", None)
    if learned and asked and list(learned) != list(asked):
        raise ValueError(f"the policy's actions are {list(learned)}, those of this {env_config.type} {list(asked)}")


def _row_block(policy: ChunkPolicy, batch_size: int) -> int | None:
    if policy.config.nfe is None:
        return None  # the adaptive solver chooses its steps for a batch as a whole: a row is itself only alone
    if next(policy.parameters()).device.type == "cpu":
        return ROW_BLOCK
    return batch_size  # an accelerator's kernels change with the number of rows, so that it stays the same


class ChunkSampler:
    """A policy with its processors, asked for the chunks of some rows of a batch of environments.

    Attributes:
        n_action_steps: Actions of a chunk to execute.
        n_obs_steps: Observations that the policy sees.
        observation_noise: Standard deviation of the noise that is added to every normalised number of the
            observations that the policy sees, anew for each chunk.
        row_block: Rows of a call are padded to a multiple of this; None: every row is called for alone.
        calls: Rows and wall seconds of every call of the policy, processors included.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        preprocessor: Processor,
        postprocessor: Processor,
        env_config: EnvConfig,
        n_action_steps: int | None = None,
        batch_size: int = ROW_BLOCK,
        observation_noise: float = 0.0,
    ) -> None:
        """Join the parts.

        Args:
            policy: The policy.
            preprocessor: From observations in LeRobot's form to the policy's.
            postprocessor: From the policy's actions to the environment's.
            env_config: The task; its own processors stand between environment and policy.
            n_action_steps: Actions of a chunk to execute; None: as many as the policy is configured for.
            batch_size: Most rows of a call.
            observation_noise: Standard deviation of noise in the observations, in normalised units.

        Raises:
            ValueError: If task and policy differ in their shapes, a chunk does not hold n_action_steps actions, the
                noise is negative or not finite, or the policy sees images that it cannot be added to.
        """
        config = policy.config
        _check_task(config, env_config)
        steps = config.n_action_steps if n_action_steps is None else n_action_steps
        if not 1 <= steps <= config.chunk_length:
            raise ValueError(f"n_action_steps must be from 1 to {config.chunk_length}, what a chunk holds, got {steps}")
        if not (math.isfinite(observation_noise) and observation_noise >= 0):
            raise ValueError(f"observation_noise must be finite and at least 0, got {observation_noise}")
        self.n_action_steps = steps
        self.observation_noise = observation_noise
        self._numbers = observed_numbers(config) if observation_noise else {}
        self.n_obs_steps = config.n_obs_steps
        self.calls: list[tuple[int, float]] = []
        self._policy, self._preprocessor, self._postprocessor = policy, preprocessor, postprocessor
        self._env_preprocessor, self._env_postprocessor = env_config.get_env_processors()
        self.row_block = _row_block(policy, batch_size)
        policy.reset()  # of a history that someone may have driven it through: here each call brings its own
        self._noise_shape = config.noise_shape

    def __call__(
        self,
        frames: Sequence[Observation],
        rows: Sequence[int],
        tasks: Sequence[str],
        noise: Sequence[torch.Generator],
        observation_noise: Sequence[torch.Generator],
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Compute the next chunk of some rows.

        Args:
            frames: The last n_obs_steps observations of all environments, oldest first.
            rows: Environments that need a chunk, at least one.
            tasks: What each of these is told to do.
            noise: Source of noise of each of these.
            observation_noise: Source of the noise in the observations of each of these.

        Returns:
            Actions to execute, `(len(rows), n_action_steps, action_dim)`, and network calls of each row.
        """
        x0 = torch.stack([sample_noise(self._noise_shape, generator) for generator in noise])
        shape = (self.n_obs_steps, sum(self._numbers.values()))  # of no numbers where nothing is to be added
        shift = torch.stack([self.observation_noise * sample_noise(shape, draw) for draw in observation_noise])
        size = len(rows) if self.row_block else 1
        parts = [slice(i, i + size) for i in range(0, len(rows), size)]
        answers = [self._call(frames, rows[part], tasks[part], x0[part], shift[part]) for part in parts]
        return np.concatenate([a for a, _ in answers]), np.repeat([float(nfe) for _, nfe in answers], size)

    def _call(
        self, frames: Sequence[Observation], rows: Sequence[int], tasks: Sequence[str], x0: Tensor, shift: Tensor
    ) -> tuple[NDArray[np.float32], int]:
        start = time.perf_counter()
        block = self.row_block or 1
        filled = np.resize(np.arange(len(rows)), -(-len(rows) // block) * block)
        with torch.inference_mode():
            batch = self._history(frames, np.asarray(rows)[filled], [tasks[i] for i in filled])
            batch = shift_observation(batch, self._numbers, shift[filled])
            chunk = self._policy.predict_action_chunk(batch, noise=x0[filled])
            actions = self._executable(chunk[: len(rows), : self.n_action_steps])
        self.calls.append((len(filled), time.perf_counter() - start))
        return actions, self._policy.nfe

    def _history(self, frames: Sequence[Observation], rows: NDArray, tasks: list[str]) -> dict[str, Tensor]:
        seen = [self._preprocess(map_observation(lambda value: value[rows], frame), tasks) for frame in frames]
        names = [name for name, value in seen[-1].items() if name.startswith(OBS_STR) and isinstance(value, Tensor)]
        return seen[-1] | {name: torch.stack([frame[name] for frame in seen], dim=1) for name in names}

    def _preprocess(self, observation: Observation, tasks: list[str]) -> dict[str, Any]:
        return self._preprocessor(self._env_preprocessor(preprocess_observation(observation) | {"task": tasks}))

    def _executable(self, chunk: Tensor) -> NDArray[np.float32]:
        """Processors take single actions, `(N, action_dim)`: a chunk is as many of them."""
        actions = self._env_postprocessor({ACTION: self._postprocessor(chunk.flatten(0, 1))})[ACTION]
        return actions.cpu().numpy().reshape(*chunk.shape[:2], -1)
