"""From observations of some environments of a batch to chunks of actions for them, row by row reproducible."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import preprocess_observation
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STR
from numpy.typing import NDArray
from torch import Tensor

from fm_policy.evaluation.episodes import EpisodeKey
from fm_policy.flow.noise import sample_noise
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

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
    entropy = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0]))


def _row_block(policy: FlowMatchingPolicy, batch_size: int) -> int | None:
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
        row_block: Rows of a call are padded to a multiple of this; None: every row is called for alone.
        calls: Rows and wall seconds of every call of the policy, processors included.
    """

    def __init__(
        self,
        policy: FlowMatchingPolicy,
        preprocessor: Processor,
        postprocessor: Processor,
        env_config: EnvConfig,
        n_action_steps: int | None = None,
        batch_size: int = ROW_BLOCK,
    ) -> None:
        """Join the parts.

        Args:
            policy: The policy.
            preprocessor: From observations in LeRobot's form to the policy's.
            postprocessor: From the policy's actions to the environment's.
            env_config: The task; its own processors stand between environment and policy.
            n_action_steps: Actions of a chunk to execute; None: as many as the policy is configured for.
            batch_size: Most rows of a call.

        Raises:
            ValueError: If a chunk does not hold n_action_steps actions.
        """
        config = policy.config
        steps = config.n_action_steps if n_action_steps is None else n_action_steps
        if not 1 <= steps <= config.chunk_length:
            raise ValueError(f"n_action_steps must be from 1 to {config.chunk_length}, what a chunk holds, got {steps}")
        self.n_action_steps = steps
        self.n_obs_steps = config.n_obs_steps
        self.calls: list[tuple[int, float]] = []
        self._policy, self._preprocessor, self._postprocessor = policy, preprocessor, postprocessor
        self._env_preprocessor, self._env_postprocessor = env_config.get_env_processors()
        self.row_block = _row_block(policy, batch_size)
        self._noise_shape = (config.horizon, config.action_feature.shape[0])

    def __call__(
        self,
        frames: Sequence[Observation],
        rows: Sequence[int],
        tasks: Sequence[str],
        noise: Sequence[torch.Generator],
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Compute the next chunk of some rows.

        Args:
            frames: The last n_obs_steps observations of all environments, oldest first.
            rows: Environments that need a chunk, at least one.
            tasks: What each of these is told to do.
            noise: Source of noise of each of these.

        Returns:
            Actions to execute, `(len(rows), n_action_steps, action_dim)`, and network calls of each row.
        """
        x0 = torch.stack([sample_noise(self._noise_shape, generator) for generator in noise])
        size = len(rows) if self.row_block else 1
        parts = [slice(i, i + size) for i in range(0, len(rows), size)]
        answers = [self._call(frames, rows[part], tasks[part], x0[part]) for part in parts]
        return np.concatenate([a for a, _ in answers]), np.repeat([float(nfe) for _, nfe in answers], size)

    def _call(
        self, frames: Sequence[Observation], rows: Sequence[int], tasks: Sequence[str], x0: Tensor
    ) -> tuple[NDArray[np.float32], int]:
        start = time.perf_counter()
        block = self.row_block or 1
        filled = np.resize(np.arange(len(rows)), -(-len(rows) // block) * block)
        with torch.inference_mode():
            batch = self._history(frames, np.asarray(rows)[filled], [tasks[i] for i in filled])
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
