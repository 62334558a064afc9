"""A task on a clock: what the simulator does between observations and actions that come when they come.

Time is handed in, in seconds of any monotonic clock, and nothing here waits or runs by itself. A step of the simulator
covers [T, T + step) and is taken at its end with the newest action that has arrived by then, or else with the last one
again. So whoever answers an observation within one step acts as in the benchmark, where the world waits.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from env_configs.fm_sim.config_fm_sim import FmSimConfig
from env_configs.fm_sim.motors import Motors, readings


@dataclass
class Episode:
    """What became of one episode.

    Attributes:
        number: from 0 on.
        seed: of its start.
        score: the largest reward: Push-T's covered share / 0.95, Kitchen's tasks / 4, at most 1; success elsewhere.
        success: whether the task was done at any time.
        held: steps for which no new action had come, so that the robot held the last one.
        stops: emergency stops.
        ended: `success`, `time` or `disconnected`; empty as long as it goes on.
        actions: the action of every step.
        fresh: whether it was a new one.
        started: when the clock started.
    """

    number: int
    seed: int
    score: float = 0.0
    success: bool = False
    held: int = 0
    stops: int = 0
    ended: str = ""
    actions: list[NDArray[np.float64]] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    started: float = 0.0

    def row(self) -> dict[str, Any]:
        """The episode as a line of `episodes.jsonl`."""
        names = ("seed", "score", "success", "held", "stops", "ended")
        return {"episode": self.number, "steps": len(self.actions), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class _Frame:
    time: float
    numbers: NDArray[np.float64]
    picture: NDArray[np.uint8] | None


class World:
    """One episode after the other.

    Each stands still at its start until the first action comes; its clock then starts with the observation before.

    Args:
        env: the task.
        motors: its motors.
        config: delays, noise, lengths and seeds.
        on_end: is told every episode that has ended.
    """

    def __init__(self, env: gym.Env, motors: Motors, config: FmSimConfig, on_end: Callable[[Episode], None]) -> None:
        self._env, self._motors, self._config, self._on_end = env, motors, config, on_end
        self._limit = max(1, round(config.episode_s / motors.step))
        self._ready_at = -np.inf
        self._begin(0)

    def _begin(self, number: int) -> None:
        seed = self._config.seed + number
        self.episode = Episode(number, seed)
        self._rng = np.random.default_rng(seed)
        self._running = False
        self._seen_at = -np.inf
        self._target: NDArray[np.float64] | None = None
        self._coming: deque[tuple[float, NDArray[np.float64]]] = deque()
        observation, info = self._env.reset(seed=seed)
        self._now = readings(observation, info)
        self._frames: deque[_Frame] = deque()
        self._show(-np.inf, observation, lost=False)

    def advance(self, now: float) -> None:
        """Takes every step that is over by now."""
        while self._running and now >= self._next_end:
            self._step(self._next_end)

    def observe(self, now: float) -> tuple[NDArray[np.float64], NDArray[np.uint8] | None]:
        """The motors' readings, in the order of `Motors.measured`, and the camera's picture, if there is a camera."""
        self.advance(now)
        self._seen_at = now
        while len(self._frames) > 1 and self._frames[1].time <= now - self._config.observation_delay_s:
            self._frames.popleft()
        return self._frames[0].numbers, self._frames[0].picture

    def act(self, now: float, action: NDArray[np.float64]) -> None:
        """Takes an action, `(len(driven),)`, which is to be held until the next one; none between two episodes."""
        self.advance(now)
        if now < self._ready_at:
            return
        delay = self._config.action_delay_s
        if not self._running:
            self._running = True
            self.episode.started = max(self._seen_at, now - self._motors.step) + delay
        self._coming.append((now + delay, action))

    def stop(self, now: float) -> None:
        """Drops what is coming and holds the robot where it is; a motor that is not measured holds its last action."""
        self.advance(now)
        self.episode.stops += 1
        self._coming.clear()
        if self._target is not None:
            measured = dict(zip(self._motors.measured, self._now, strict=True))
            last = zip(self._motors.driven, self._target, strict=True)
            self._target = np.array([measured.get(name, value) for name, value in last])

    def close(self) -> None:
        """Ends an episode that is under way, and lets the simulator go."""
        if self._running:
            self._end("disconnected")
        self._env.close()

    @property
    def _next_end(self) -> float:
        return self.episode.started + (len(self.episode.actions) + 1) * self._motors.step

    def _step(self, time: float) -> None:
        fresh = False
        while self._coming and self._coming[0][0] <= time:
            self._target, fresh = self._coming.popleft()[1], True
        if self._target is None:  # stopped before the first action took effect
            self.episode.started += self._motors.step
            return
        observation, reward, _, _, info = self._env.step(self._target)
        episode = self.episode
        episode.actions.append(self._target)
        episode.fresh.append(fresh)
        episode.held += not fresh
        episode.score = max(episode.score, float(reward))
        episode.success |= bool(info["is_success"])
        self._now = readings(observation, info)
        self._show(time, observation, lost=self._rng.random() < self._config.drop_rate)
        done = episode.success and self._config.end_on_success
        if done or len(episode.actions) >= self._limit:
            self._end("success" if done else "time")
            self._ready_at = time + self._config.pause_s
            self._begin(episode.number + 1)

    def _show(self, time: float, observation: dict[str, NDArray], *, lost: bool) -> None:
        shown = self._now if self._config.motors == "all" else self._now[: len(self._motors.robot)]
        numbers = shown + self._config.noise * self._rng.standard_normal(len(shown))
        if not lost:
            self._frames.append(_Frame(time, numbers, observation.get("pixels")))

    def _end(self, why: str) -> None:
        self.episode.ended = why
        self._running = False
        self._on_end(self.episode)
