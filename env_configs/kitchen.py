"""Franka Kitchen: a robot arm does four of seven tasks in a kitchen, in any order, in 280 steps of 0.08 s.

The physics, the observed noise and the goals are FrankaKitchen-v1 of gymnasium-robotics 1.4 (Gupta et al. 2019).
Added here: the two layouts of the benchmarks, joint positions as actions, a score, complete `info` dictionaries, and
a configuration that LeRobot counts exactly in batches, synchronous or asynchronous.
"""

import contextlib
import io
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from numpy.typing import NDArray

from env_configs.batches import BatchedEnvConfig
from env_configs.extras import not_installed
from env_configs.kitchen_tasks import (
    ACTIONS,
    FPS,
    LAYOUTS,
    REACH,
    SCORED,
    TASK_DESCRIPTION,
    TASKS,
    observe,
    score,
    split,
)
from env_configs.opengl import NoOpenGLError, drawing

TASK = "FrankaKitchen-v1"
ROBOT_NOISE, OBJECT_NOISE = 0.01, 0.0005
"""The simulator's own ratios of observation noise."""


def _simulator(**options: Any) -> gym.Env:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its import tells news of other tasks
            from gymnasium_robotics.envs.franka_kitchen import KitchenEnv
    except ModuleNotFoundError as error:
        raise not_installed(error, "kitchen") from error
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise NoOpenGLError(error, "kitchen") from error  # MuJoCo loads what MUJOCO_GL names as soon as it is imported
    simulator = KitchenEnv(render_mode="rgb_array", **options)
    # Without a graphics card shadows and smooth edges take 18 times as long as the rest of a picture.
    simulator.model.vis.quality.shadowsize = simulator.model.vis.quality.offsamples = 0
    return simulator


class Kitchen(gym.Wrapper):
    """FrankaKitchen-v1 with all seven tasks, LeRobot's observations and complete information.

    Observations: `agent_pos`, the robot's part, and `environment_state`, the kitchen's, both float64 with the
    simulator's noise: (9,) and (51,) for layout="relay", (18,) and (41,) for "d4rl"; see `kitchen_tasks.observe`.
    Nothing is drawn before `render` is called.

    Action (9,): for actions="joint_targets" the positions that the joints shall go to, rad and m; a joint is told
    to go at most 0.16 of them from where it was last observed (2 rad/s), farther targets are cut to that, each
    joint alone. For "velocity" the share of 2 rad/s, cut to [-1, 1]. Both are then cut to `JOINT_LIMITS`.

    A task is done once it has come near its goal, whatever happens later. `info` of `reset` and of each `step` has
    `is_success` (bool: four tasks are done, or more), `tasks_completed` (float, 0-7), `p1` to `p7` (float: 1 if so
    many are done; their means over episodes are the benchmark's p_k) and `done_<task>` (float, 0 or 1). The
    reward is the score so far, min(tasks_completed / 4, 1): its maximum, and its last value, score the episode.
    An episode goes on after four tasks, as in the benchmark, and ends when all seven are done.

    Attributes:
        task: the task's name.
        task_description: what to do, in words.
    """

    def __init__(
        self,
        layout: str = "relay",
        actions: str = "joint_targets",
        robot_noise_ratio: float = ROBOT_NOISE,
        object_noise_ratio: float = OBJECT_NOISE,
        render_size: int = 256,
    ):
        """Builds the simulator; for the arguments see `FmKitchenEnv`.

        Raises:
            ModuleNotFoundError: gymnasium-robotics or MuJoCo is not installed.
        """
        simulator = _simulator(
            robot_noise_ratio=robot_noise_ratio,
            object_noise_ratio=object_noise_ratio,
            width=render_size,
            height=render_size,
        )
        super().__init__(simulator)
        self.task = TASK
        self.task_description = TASK_DESCRIPTION
        self.observation_space, self.action_space = _spaces(layout, actions)
        self._layout, self._actions = layout, actions
        self._joints: NDArray = np.zeros(9)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode. The kitchen is always the same; the noise of all observations differs.

        Args:
            seed: decides the noise; None goes on in the running stream.
            options: ignored.
        """
        observation, _ = self.env.reset(seed=seed)
        return self._observe(observation), self._info()

    def step(self, action: NDArray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Moves the robot for 0.08 s.

        Raises:
            ValueError: the action is not nine finite numbers.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (9,) or not np.isfinite(action).all():
            raise ValueError(f"a Kitchen action is nine finite numbers, one for each joint, not {action}")
        if self._actions == "joint_targets":
            action = (action - self._joints) / REACH  # the simulator adds what it observed: the noise cancels
        observation, _, terminated, truncated, _ = self.env.step(action)
        info = self._info()
        return self._observe(observation), float(score(info["tasks_completed"])), terminated, truncated, info

    def render(self) -> Any:
        """A picture (height, width, 3), uint8.

        Raises:
            NoOpenGLError: this machine offers no OpenGL to MuJoCo.
        """
        with drawing("kitchen"):
            return self.env.render()

    def _observe(self, observation: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
        self._joints = observation["observation"][:9]
        agent, kitchen = observe(self._layout, *split(observation["observation"]))
        return {"agent_pos": agent, "environment_state": kitchen}

    def _info(self) -> dict[str, Any]:
        done = {name.replace(" ", "_") for name in self.unwrapped.episode_task_completions}  # type: ignore[attr-defined]
        return {
            "is_success": len(done) >= SCORED,
            "tasks_completed": float(len(done)),
            **{f"p{k}": float(len(done) >= k) for k in range(1, len(TASKS) + 1)},
            **{f"done_{name}": float(name in done) for name in TASKS},
        }


def _spaces(layout: str, actions: str) -> tuple[gym.spaces.Dict, gym.spaces.Box]:
    def numbers(count: int, limit: float = np.inf) -> gym.spaces.Box:
        return gym.spaces.Box(-limit, limit, (count,), np.float64)

    agent, kitchen = LAYOUTS[layout]
    seen = gym.spaces.Dict({"agent_pos": numbers(agent), "environment_state": numbers(kitchen)})
    return seen, numbers(9, 1 if actions == "velocity" else np.inf)


@EnvConfig.register_subclass("fm_kitchen")
@dataclass
class FmKitchenEnv(BatchedEnvConfig):
    """Franka Kitchen for LeRobot: `--env.type=fm_kitchen`.

    Attributes:
        task: always "FrankaKitchen-v1".
        fps: always 12, the rate that the simulator states (exactly it is 12.5).
        episode_length: steps after which an episode ends; 280 in the benchmark.
        layout: "relay" (60 numbers, without velocities) or "d4rl" (59 numbers, with them).
        actions: "joint_targets" (positions of the joints) or "velocity" (shares of 2 rad/s).
        robot_noise_ratio: noise of the robot's observed joints, in units of 0.1 rad (and rad/s), uniform; moves the
            robot too, because the simulator steers from what it observed. Relay Policy Learning: 0.1.
        object_noise_ratio: noise of the observed objects, in units of 0.0005 to 0.1 by object, uniform.
        render_size: side of the pictures that `render` gives, in pixels.
        features: derived from `layout`.
        features_map: names of the features in LeRobot.
    """

    GYM_ID: ClassVar[str] = f"fm_ft/{TASK}"

    task: str | None = TASK
    fps: int = FPS
    episode_length: int = 280
    layout: str = "relay"
    actions: str = "joint_targets"
    robot_noise_ratio: float = ROBOT_NOISE
    object_noise_ratio: float = OBJECT_NOISE
    render_size: int = 256
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "environment_state": OBS_ENV_STATE}
    )

    def __post_init__(self) -> None:
        known: dict[str, Collection[Any]] = {"task": [TASK], "fps": [FPS], "layout": LAYOUTS, "actions": ACTIONS}
        for name, choices in known.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(str, choices))}, not {value!r}")
        for name in ("episode_length", "render_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("robot_noise_ratio", "object_noise_ratio"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        self.features = self._features()

    def _features(self) -> dict[str, PolicyFeature]:
        agent, kitchen = LAYOUTS[self.layout]
        return {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(9,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(agent,)),
            "environment_state": PolicyFeature(type=FeatureType.ENV, shape=(kitchen,)),
        }

    @property
    def action_names(self) -> list[str]:
        """What the numbers of an action are."""
        return ACTIONS[self.actions]

    @property
    def gym_id(self) -> str:
        """Identifier in gymnasium's registry."""
        return self.GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `gymnasium.make`."""
        names = ("layout", "actions", "robot_noise_ratio", "object_noise_ratio", "render_size")
        return {"max_episode_steps": self.episode_length} | {name: getattr(self, name) for name in names}
