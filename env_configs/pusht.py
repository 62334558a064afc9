"""Push-T: push a T-shaped block onto its target, at 10 Hz on a board of 512 x 512 pixels (y downwards).

The physics, the reward (share of the target covered / 0.95, clipped to [0, 1]) and the success (more than
0.95 covered, which ends the episode) are gym-pusht 0.1.8's. Added here: the choice of the starts, complete
`info` dictionaries, and a configuration that LeRobot counts exactly in batches, synchronous or asynchronous.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_STATE
from numpy.typing import NDArray

from env_configs.batches import BatchedEnvConfig
from env_configs.extras import not_installed
from env_configs.pusht_geometry import BOARD, coverage

Range = tuple[int, int]

FPS = 10
TASK_DESCRIPTION = "Push the T-shaped block onto the T-shaped target."

_OBS_TYPES = {"state": "environment_state_agent_pos", "image": "pixels_agent_pos"}
_PIXELS = (96, 96, 3)


def _draw_gymnasium(rng: np.random.Generator, agent: Range, block: Range) -> list[float]:
    """Draws as gym-pusht's own reset does: for its ranges the same seed gives the same start."""
    places = [int(rng.integers(*limits)) for limits in (agent, agent, block, block)]
    return [*places, rng.uniform(-np.pi, np.pi)]


def _draw_random_state(rng: np.random.RandomState, agent: Range, block: Range) -> list[float]:
    """Draws as Diffusion Policy's environment does (Chi et al. 2023): its seeds give its starts."""
    places = [rng.randint(*limits) for limits in (agent, agent, block, block)]
    return [*places, rng.randn() * 2 * np.pi - np.pi]


_STARTS: dict[str, tuple[Callable[[int | None], Any], Callable[[Any, Range, Range], list[float]]]] = {
    "gymnasium": (lambda seed: seeding.np_random(seed)[0], _draw_gymnasium),
    "random_state": (np.random.RandomState, _draw_random_state),
}
"""Name -> how a seed becomes a generator, and how a start is drawn from it."""


def _one_of(name: str, value: object, known: dict[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _check_range(name: str, limits: Range) -> None:
    whole = len(limits) == 2 and all(isinstance(limit, int) for limit in limits)
    if not whole or not 0 <= limits[0] < limits[1] <= BOARD:
        raise ValueError(f"{name} must be whole numbers [low, high), 0 <= low < high <= {BOARD}, not {limits}")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be positive, not {value}")


def _simulator(obs_type: str, render_size: int) -> gym.Env:
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # pygame's, on import
            from gym_pusht.envs.pusht import PushTEnv
    except ModuleNotFoundError as error:
        raise not_installed(error, "pusht") from error

    class Simulator(PushTEnv):
        def _get_coverage(self) -> float:
            # gym-pusht's own sums areas in the order of a set: the last bit differs between two instances.
            return float(coverage(np.array([[*self.block.position, self.block.angle]]))[0])

    return Simulator(obs_type=obs_type, visualization_width=render_size, visualization_height=render_size)


class PushT(gym.Wrapper):
    """gym-pusht with chosen starts and complete information.

    Observations: `agent_pos` (2,) float64 in pixels and, for obs="state", `environment_state` (16,) float64,
    the block's 8 corners x0, y0, x1, ...; for obs="image", `pixels` (96, 96, 3) uint8. Nothing is drawn for
    obs="state" before `render` is called. Action: (2,), the target position of the agent in pixels; not
    clipped, as in the benchmark.

    `info` of `reset` and of each `step` has `is_success` (bool) and `coverage` (float); that of `reset` also
    `initial_state` (5,) float64: agent x, y, block x, y and angle as asked of gym-pusht's `reset_to_state`.
    In that legacy convention the block is placed first and then turned about its centre of mass, so that it
    does not lie where x, y say; the ranges of the benchmark and the starts of the human recordings are in it.

    Attributes:
        task: the task's name.
        task_description: what to do, in words.
    """

    def __init__(
        self,
        obs: str = "state",
        starts: str = "gymnasium",
        block_range: Range = (100, 400),
        agent_range: Range = (50, 450),
        render_size: int = 384,
    ):
        """Builds the simulator; for the arguments see `FmPushtEnv`.

        Raises:
            ModuleNotFoundError: gym-pusht is not installed.
        """
        super().__init__(_simulator(_OBS_TYPES[obs], render_size))
        self.task = "PushT-v0"
        self.task_description = TASK_DESCRIPTION
        self._ranges = (agent_range, block_range)
        self._make_rng, self._draw = _STARTS[starts]
        self._rng = self._make_rng(None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: decides the start; None goes on in the running stream of starts.
            options: `reset_to_state` (5,) gives the start itself; others are ignored.

        Raises:
            ValueError: `reset_to_state` is not five finite numbers.
        """
        if seed is not None:
            self._rng = self._make_rng(seed)
        state = self._start((options or {}).get("reset_to_state"))
        observation, info = self.env.reset(seed=seed, options={"reset_to_state": state})
        covered = float(coverage(info["block_pose"][None])[0])
        return observation, info | {"is_success": False, "coverage": covered, "initial_state": state}

    def step(self, action: NDArray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Moves the agent towards `action` (2,), in pixels, for 0.1 s.

        Raises:
            ValueError: the action is not two finite numbers.
        """
        action = np.asarray(action)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"a Push-T action is two finite numbers, x and y in pixels, not {action}")
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), terminated, truncated, info

    def _start(self, asked: Any) -> NDArray[np.float64]:
        state = np.array(self._draw(self._rng, *self._ranges) if asked is None else asked, dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise ValueError(f"reset_to_state must be finite agent x, y, block x, y, angle, not {asked}")
        return state


@EnvConfig.register_subclass("fm_pusht")
@dataclass
class FmPushtEnv(BatchedEnvConfig):
    """Push-T for LeRobot: `--env.type=fm_pusht`.

    Attributes:
        task: always "PushT-v0".
        fps: always 10, the rate of the simulator.
        episode_length: steps after which an unsolved episode ends; 300 in the benchmark.
        obs: "state" (the block's 8 corners and the agent) or "image" (96 x 96 pixels and the agent).
        block_range: [low, high) of the block's start in pixels, both axes: (100, 400) is range b of the paper
            and the usual benchmark, (200, 300) its range a. The angle is any.
        agent_range: [low, high) of the agent's start in pixels, both axes.
        starts: "gymnasium" (gym-pusht's start for the same seed) or "random_state" (Diffusion Policy's).
        render_size: side of the pictures that `render` gives, in pixels.
        features: derived from `obs`.
        features_map: names of the features in LeRobot.
    """

    GYM_ID: ClassVar[str] = "fm_ft/PushT-v0"

    task: str | None = "PushT-v0"
    fps: int = FPS
    episode_length: int = 300
    obs: str = "state"
    block_range: tuple[int, int] = (100, 400)
    agent_range: tuple[int, int] = (50, 450)
    starts: str = "gymnasium"
    render_size: int = 384
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            "environment_state": OBS_ENV_STATE,
            "pixels": OBS_IMAGE,
        }
    )

    def __post_init__(self) -> None:
        _one_of("task", self.task, {"PushT-v0": None})
        if self.fps != FPS:
            raise ValueError(f"fps must be {FPS}, the rate of the simulator, not {self.fps}")
        _one_of("obs", self.obs, _OBS_TYPES)
        _one_of("starts", self.starts, _STARTS)
        _check_range("block_range", self.block_range)
        _check_range("agent_range", self.agent_range)
        _check_positive("episode_length", self.episode_length)
        _check_positive("render_size", self.render_size)
        self.features = self._features()

    def _features(self) -> dict[str, PolicyFeature]:
        seen = {
            "state": {"environment_state": PolicyFeature(type=FeatureType.ENV, shape=(16,))},
            "image": {"pixels": PolicyFeature(type=FeatureType.VISUAL, shape=_PIXELS)},
        }[self.obs]
        return {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(2,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(2,)),
            **seen,
        }

    @property
    def gym_id(self) -> str:
        """Identifier in gymnasium's registry."""
        return self.GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `gymnasium.make`."""
        return {
            "max_episode_steps": self.episode_length,
            "obs": self.obs,
            "starts": self.starts,
            "block_range": tuple(self.block_range),
            "agent_range": tuple(self.agent_range),
            "render_size": self.render_size,
        }
