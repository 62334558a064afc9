"""Batched episodes of a policy in a task.

The environments of a batch step together. Whenever their chunks are used up, every ended episode makes room for
the next one of the plan, so that the batch stays full until the plan runs out; until then an ended environment
waits, frozen, and costs neither simulation nor inference. What happens in an episode depends on its seed and
repeat alone: not on the size of the batch, on what runs beside it, or on what ran before.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from numpy.typing import NDArray

from fm_policy.evaluation.episodes import Episode, EpisodeKey, plan, whole
from fm_policy.evaluation.inference import (
    ChunkSampler,
    Observation,
    Processor,
    episode_noise,
    episode_observation_noise,
    map_observation,
)
from fm_policy.evaluation.policies import ChunkPolicy
from fm_policy.evaluation.videos import Camera

BATCH_SIZE = 64

Info = dict[str, Any]


def evaluate(
    policy: ChunkPolicy,
    preprocessor: Processor,
    postprocessor: Processor,
    env_config: EnvConfig,
    seeds: Iterable[int],
    repeats: int = 1,
    n_action_steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    use_async_envs: bool = False,
    observation_noise: float = 0.0,
) -> list[Episode]:
    """Run every seed `repeats` times, without writing anything.

    Args:
        policy: The policy; left in the mode, training or evaluation, in which it came.
        preprocessor: Its preprocessor.
        postprocessor: Its postprocessor.
        env_config: The task.
        seeds: Seeds of the starts.
        repeats: Episodes of each seed, with different noise.
        n_action_steps: Actions of a chunk to execute; None: as many as the policy is configured for.
        batch_size: Most environments at a time.
        use_async_envs: Give each environment its own process.
        observation_noise: Standard deviation of noise in the observations, see `ChunkSampler`.

    Returns:
        Episodes by repeat, then in the order of the seeds.
    """
    jobs = plan(seeds, repeats)
    rank = {key: number for number, key in enumerate(jobs)}
    was_training = policy.training
    policy.eval()
    try:
        processors = preprocessor, postprocessor
        sampler = ChunkSampler(policy, *processors, env_config, n_action_steps, batch_size, observation_noise)
        episodes = run_episodes(sampler, env_config, jobs, batch_size, use_async_envs)
        return sorted(episodes, key=lambda episode: rank[episode.key])
    finally:
        policy.train(was_training)


def run_episodes(
    sampler: ChunkSampler,
    env_config: EnvConfig,
    jobs: Iterable[EpisodeKey],
    batch_size: int = BATCH_SIZE,
    use_async_envs: bool = False,
    camera: Camera | None = None,
) -> Iterator[Episode]:
    """Run episodes, and yield each one as it ends.

    Args:
        sampler: The policy.
        env_config: The task.
        jobs: Seeds and repeats, started in this order.
        batch_size: Most environments at a time.
        use_async_envs: Give each environment its own process.
        camera: Films some of the episodes.

    Raises:
        ValueError: If the batch size is below 1, or the task does not report what an evaluation needs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    waiting = deque(jobs)
    if waiting:
        env = _make_env(env_config, min(batch_size, len(waiting)), use_async_envs)
        try:
            yield from _Batch(env, sampler, waiting, camera).run()
        finally:
            env.close()


def jitter(actions: NDArray) -> float:
    """How much executed actions shake: the mean square of their second differences, a[t+1] - 2 a[t] + a[t-1].

    Zero for any motion of constant velocity; a step of size s within a still episode of T actions adds 2 s² / (T - 2)
    to the mean over time.

    Args:
        actions: `(T, action_dim)`, in the task's units.

    Returns:
        The mean over time and action dimensions, in squared units of the actions; 0 for fewer than three actions.
    """
    differences = np.diff(actions.astype(np.float64), n=2, axis=0)
    return float(np.square(differences).mean()) if differences.size else 0.0


class _Running:
    """An episode that has not ended."""

    def __init__(self, key: EpisodeKey, initial_state: list[float] | None, measures: Iterable[str]) -> None:
        self.key = key
        self.noise = episode_noise(key)
        self.observation_noise = episode_observation_noise(key)
        self.steps = self.chunks = 0
        self._initial_state = initial_state
        self._calls = 0.0
        self._rewards = -np.inf, 0.0  # largest, last
        self._success = False
        self._measures = dict.fromkeys(measures, (-np.inf, 0.0))
        self._actions: list[NDArray[np.float32]] = []

    def count_chunk(self, calls: float) -> None:
        self.chunks += 1
        self._calls += calls

    def count_step(self, action: NDArray[np.float32], reward: float, success: bool, values: dict[str, float]) -> None:
        self.steps += 1
        self._actions.append(action)
        self._success |= success
        self._rewards = max(self._rewards[0], reward), reward
        self._measures = {name: (max(self._measures[name][0], value), value) for name, value in values.items()}

    def result(self) -> Episode:
        measures = {name: largest for name, (largest, _) in self._measures.items()}
        measures |= {f"final_{name}": last for name, (_, last) in self._measures.items()}
        measures["jitter"] = jitter(np.array(self._actions))
        return Episode(
            *self.key,
            initial_state=self._initial_state,
            max_reward=self._rewards[0],
            final_reward=self._rewards[1],
            measures=measures,
            success=self._success,
            steps=self.steps,
            nfe=whole(self._calls / self.chunks),
            chunks=self.chunks,
        )


class _Batch:
    """A batch of environments that works off a queue of episodes."""

    def __init__(
        self, env: VectorEnv, sampler: ChunkSampler, waiting: deque[EpisodeKey], camera: Camera | None
    ) -> None:
        self.env, self.sampler, self.waiting, self.camera = env, sampler, waiting, camera
        self.running: dict[int, _Running] = {}  # by row of the batch
        self.frames: deque[Observation] = deque(maxlen=sampler.n_obs_steps)
        self.step_limit = int(env.call("_max_episode_steps")[0])  # type: ignore[attr-defined]
        self.tasks = list(env.call("task_description"))  # type: ignore[attr-defined]
        self.fps = env.metadata["render_fps"]

    def run(self) -> Iterator[Episode]:
        while self.waiting or self.running:
            self._start_waiting()
            actions = self._next_chunks()
            for n in range(self.sampler.n_action_steps):
                yield from self._step(actions[:, n])
                if not self.running:
                    break

    def _start_waiting(self) -> None:
        idle = [row for row in range(self.env.num_envs) if row not in self.running]
        started = {row: self.waiting.popleft() for row in idle[: len(self.waiting)]}
        if not started:
            return
        mask = np.isin(np.arange(self.env.num_envs), list(started))
        seeds = [started[row].seed if row in started else None for row in range(self.env.num_envs)]
        observation, info = self.env.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True, "reset_mask": mask})  # type: ignore[arg-type]
        measures = _measures(info)
        for row, key in started.items():
            self.running[row] = _Running(key, _initial_state(info, row), measures)
        self._begin_history(observation, mask)
        self._film(started)

    def _begin_history(self, observation: Observation, mask: NDArray[np.bool_]) -> None:
        """An episode's first observation stands for those before it."""
        while len(self.frames) < self.sampler.n_obs_steps:
            self.frames.append(map_observation(np.copy, observation))
        for frame in self.frames:
            _overwrite(frame, observation, mask)

    def _next_chunks(self) -> NDArray[np.float32]:
        rows = sorted(self.running)
        noise = [self.running[row].noise for row in rows]
        observation_noise = [self.running[row].observation_noise for row in rows]
        tasks = [self.tasks[row] for row in rows]
        chunks, calls = self.sampler(list(self.frames), rows, tasks, noise, observation_noise)
        for row, count in zip(rows, calls, strict=True):
            self.running[row].count_chunk(count)
        actions = np.zeros((self.env.num_envs, *chunks.shape[1:]), dtype=np.float32)
        actions[rows] = chunks
        return actions

    def _step(self, actions: NDArray[np.float32]) -> Iterator[Episode]:
        observation, rewards, terminated, truncated, info = self.env.step(actions)
        self.frames.append(map_observation(np.copy, observation))
        self._film(self.running)
        measures = _measures(info)
        for row, episode in list(self.running.items()):
            values = {name: float(info[name][row]) for name in measures}
            episode.count_step(actions[row], float(rewards[row]), bool(info["is_success"][row]), values)
            if terminated[row] or truncated[row] or episode.steps >= self.step_limit:
                del self.running[row]
                yield self._finish(episode)

    def _film(self, rows: Iterable[int]) -> None:
        if self.camera:
            self.camera.film(self.env, {self.running[row].key: row for row in rows})

    def _finish(self, episode: _Running) -> Episode:
        if self.camera:
            self.camera.finish(episode.key, self.fps)
        return episode.result()


def _make_env(env_config: EnvConfig, n_envs: int, use_async_envs: bool) -> VectorEnv:
    suites = env_config.create_envs(n_envs, use_async_envs)
    envs = [env for tasks in suites.values() for env in tasks.values()]
    mode = envs[0].metadata.get("autoreset_mode")
    if len(envs) == 1 and mode == AutoresetMode.NEXT_STEP:
        return envs[0]
    for env in envs:
        env.close()
    if len(envs) > 1:
        raise ValueError(f"the environment holds {len(envs)} tasks, evaluate one at a time: {suites}")
    # In the other modes an ended environment's last observation and info are already the next episode's.
    raise ValueError(f"the environment must end episodes in gymnasium's mode NEXT_STEP, not {mode}")


def _measures(info: Info) -> list[str]:
    """Names of the task's own numbers, the floats of its info; refuses an info without the success."""
    if "is_success" not in info:
        raise ValueError(f"the environment's info lacks 'is_success', the success of a step; it has {sorted(info)}")
    arrays = {name: value for name, value in info.items() if isinstance(value, np.ndarray)}
    return [name for name, value in arrays.items() if value.dtype.kind == "f" and value.ndim == 1]


def _initial_state(info: Info, row: int) -> list[float] | None:
    return info["initial_state"][row].tolist() if "initial_state" in info else None


def _overwrite(target: Observation, source: Observation, mask: NDArray[np.bool_]) -> None:
    for name, value in source.items():
        if isinstance(value, dict):
            _overwrite(target[name], value, mask)
        else:
            target[name][mask] = value[mask]
