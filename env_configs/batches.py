"""Environments that LeRobot counts exactly, one or a batch of them, in this process or with one process each."""

import multiprocessing
from collections.abc import Callable
from typing import ClassVar

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end


class BatchedEnvConfig(EnvConfig):
    """A configuration whose environments are made one by one or in batches, of gymnasium's `gym_id`.

    Attributes:
        BATCH_SIZE: environments at a time that a small computer has the memory for.
    """

    BATCH_SIZE: ClassVar[int] = 64

    def make(self) -> gym.Env:
        """One environment, not vectorised.

        Raises:
            ModuleNotFoundError: the simulator is not installed.
        """
        return gym.make(self.gym_id, disable_env_checker=self.disable_env_checker, **self.gym_kwargs)

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, VectorEnv]]:
        """A batch of `n_envs` environments as LeRobot wants it: suite -> task -> batch.

        Raises:
            ValueError: `n_envs` is below 1.
            ModuleNotFoundError: the simulator is not installed.
        """
        return {self.type: {0: make_batch(self.make, n_envs, use_async_envs)}}


def make_batch(make: Callable[[], gym.Env], n_envs: int, use_async_envs: bool) -> VectorEnv:
    """A batch of environments for LeRobot's evaluation.

    That evaluation counts one step too many after the end of an episode. Here this step repeats the last
    observation and `info` with a reward of 0: an ended environment is frozen until the next rollout.

    Args:
        make: builds one environment; can be pickled.
        n_envs: size of the batch, at least 1.
        use_async_envs: one process for each environment; a batch of one always runs in this process.

    Raises:
        ValueError: `n_envs` is below 1.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs must be positive, not {n_envs}")
    makers, mode = [freeze_after_episode_end(make)] * n_envs, AutoresetMode.NEXT_STEP
    if n_envs == 1 or not use_async_envs:
        return SyncVectorEnv(makers, autoreset_mode=mode)
    # Import LeRobot and the tasks once, in the server that the processes are forked from, not once in each.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", __package__])
    return AsyncVectorEnv(makers, context="forkserver", autoreset_mode=mode)
