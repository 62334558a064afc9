"""robosuite's Lift, TwoArmHandover and TwoArmTransport with Panda arms, at 20 Hz, observed in numbers.

The physics, the starts and the successes are robosuite 1.5.1's (Zhu et al. 2020), the observations and their order
robomimic's (Mandlekar et al. 2021). Added here: actions as poses, one start for each seed, complete `info`
dictionaries, and configurations that LeRobot counts exactly in batches, synchronous or asynchronous.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from numpy.typing import NDArray

from env_configs.batches import BatchedEnvConfig
from env_configs.robosuite_models import TASKS, Task
from env_configs.robosuite_sim import FPS, Simulator, recorded_body
from env_configs.rotations import to_rotation_vector

ACTIONS = ("absolute", "delta")
"""Kinds of actions; see `RobosuiteTask`."""

ROBOT = 9
"""Observed numbers of each arm."""

_SEEDS = 2**32


class RobosuiteTask(gym.Env):
    """One of robosuite's tasks with LeRobot's observations and complete information.

    Observations, float64: `agent_pos` (9 * arms,), for each arm the hand's position 3 in m and quaternion 4 (x, y,
    z, w) and its fingers' positions 2; `environment_state` (10, 16 or 41,), robosuite's `object-state`, of the
    present (see `Simulator.observe`). Nothing is drawn before `render` is called.

    Action, for each arm in turn: for actions="absolute" (10,), the pose that the grip site shall go to, in the
    world's frame: position 3 in m and rotation 6 (Zhou et al. 2019, see `rotations`), then the gripper 1, -1 opens,
    1 closes; a turned hand is observed in another frame, that of its body. For "delta" (7,), robosuite's own: the
    way from the present pose, 3 numbers of 0.05 m and 3 (axis times angle) of 0.5 rad, each cut to [-1, 1], then
    the gripper.

    `info` of `reset` and of each `step` has `is_success` (bool) and how far the task has come, 0.0 or 1.0 each:
    `grasped` for Lift; `grasped`, `lifted`, `both_grasp` for the handover; `lid_off`, `trash_in_bin`,
    `payload_in_bin` for the transport; that of `reset` also `initial_state`, time, positions and velocities as
    robosuite records them. The reward is 1 for a success, else 0; a success ends the episode.

    Attributes:
        task: robosuite's name of the task.
        task_description: what to do, in words.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012  (gymnasium declares it so)
    render_mode = "rgb_array"

    def __init__(self, name: str, actions: str = "absolute", render_size: int = 256):
        """Builds the simulator.

        Args:
            name: a name in `TASKS`.
            actions: "absolute" or "delta".
            render_size: side of the pictures that `render` gives, in pixels.

        Raises:
            ModuleNotFoundError: robosuite or MuJoCo is not installed.
        """
        row = TASKS[name]
        self.task, self.task_description = row.name, row.description
        self.observation_space = Dict({"agent_pos": _any(ROBOT * row.arms), "environment_state": _any(row.objects)})
        self.action_space = _any(row.actions[actions])
        self._row, self._actions, self._render_size = row, actions, render_size
        self._simulator = Simulator(row, actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: decides the start: robosuite's own after `numpy.random.seed(seed)`; None goes on in the running
                stream of starts.
            options: `reset_to_state` gives the state itself, as `initial_state` does, and `model_file` the recorded
                model (MuJoCo's XML) whose cube or hammer is to be used; others are ignored.

        Raises:
            ValueError: the seed is 2**32 or more, the state is not as many finite numbers as the simulator has, or
                the model has no such object.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(_SEEDS))
        if seed >= _SEEDS:
            raise ValueError(f"the seed of a robosuite task must be below 2**32, not {seed}")
        options = options or {}
        model, state = options.get("model_file"), options.get("reset_to_state")
        self._simulator.reset(seed, None if model is None else recorded_body(model, self._row.drawn))
        if state is not None:
            self._put(np.asarray(state, dtype=np.float64))
        observation, info = self._outcome()
        return observation, info | {"initial_state": self._simulator.state}

    def step(self, action: NDArray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Drives the arms for 0.05 s.

        Raises:
            ValueError: the action is not as many finite numbers as it should be, or six of them mean no rotation.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            wanted = f"{self._row.actions[self._actions]} finite numbers, {self._actions}"
            raise ValueError(f"an action of {self.task} is {wanted}, not {action}")
        self._simulator.step(_commands(action) if self._actions == "absolute" else action)
        observation, info = self._outcome()
        return observation, float(info["is_success"]), info["is_success"], False, info

    def render(self) -> Any:
        """A picture (render_size, render_size, 3), uint8.

        Raises:
            RuntimeError: this machine offers no OpenGL to MuJoCo.
        """
        return self._simulator.picture(self._render_size)

    def close(self) -> None:
        """Lets the simulator go."""
        self._simulator.close()

    def _put(self, state: NDArray[np.float64]) -> None:
        wanted = self._simulator.state.shape
        if state.shape != wanted or not np.isfinite(state).all():
            raise ValueError(f"reset_to_state must be {wanted[0]} finite numbers for {self.task}, not {state}")
        self._simulator.put(state)

    def _outcome(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
        observation, progress = self._simulator.observe()
        return observation, {"is_success": self._simulator.solved, **progress}


def _commands(action: NDArray[np.float64]) -> NDArray[np.float64]:
    """Absolute actions (10 * arms,) as robosuite takes them, (7 * arms,): axis times angle for the rotations."""
    arms = action.reshape(-1, 10)
    return np.hstack([arms[:, :3], to_rotation_vector(arms[:, 3:9]), arms[:, 9:]]).ravel()


def _any(size: int) -> Box:
    return Box(-np.inf, np.inf, (size,), np.float64)


@dataclass
class RobosuiteEnv(BatchedEnvConfig):
    """What the configurations of robosuite's tasks have in common.

    Attributes:
        task: robosuite's name of the task.
        fps: always 20, the rate of the controllers.
        episode_length: steps after which an unsolved episode ends.
        actions: "absolute" (poses in the world's frame) or "delta" (ways from the present pose).
        render_size: side of the pictures that `render` gives, in pixels.
        features: derived from the task and `actions`.
        features_map: names of the features in LeRobot.
    """

    BATCH_SIZE: ClassVar[int] = 16  # each holds a model of its own, of up to 230 MB
    NAME: ClassVar[str]

    fps: int = FPS
    episode_length: int = 0
    actions: str = "absolute"
    render_size: int = 256
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "environment_state": OBS_ENV_STATE}
    )

    def __post_init__(self) -> None:
        if self.task != self.row.name:
            raise ValueError(f"task must be {self.row.name}, not {self.task!r}")
        if self.fps != FPS:
            raise ValueError(f"fps must be {FPS}, the rate of the controllers, not {self.fps}")
        if self.actions not in ACTIONS:
            raise ValueError(f"actions must be one of {', '.join(ACTIONS)}, not {self.actions!r}")
        for name, value in (("episode_length", self.episode_length), ("render_size", self.render_size)):
            if value < 1:
                raise ValueError(f"{name} must be positive, not {value}")
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(self.row.actions[self.actions],)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(ROBOT * self.row.arms,)),
            "environment_state": PolicyFeature(type=FeatureType.ENV, shape=(self.row.objects,)),
        }

    @property
    def row(self) -> Task:
        """The task."""
        return TASKS[self.NAME]

    @property
    def gym_id(self) -> str:
        """Identifier in gymnasium's registry."""
        return f"fm_ft/{self.row.name}-v0"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of `gymnasium.make`."""
        return {
            "max_episode_steps": self.episode_length,
            "actions": self.actions,
            "render_size": self.render_size,
        }


@EnvConfig.register_subclass("fm_lift")
@dataclass
class FmLiftEnv(RobosuiteEnv):
    """robosuite's Lift for LeRobot: `--env.type=fm_lift`. For the fields see `RobosuiteEnv`."""

    NAME: ClassVar[str] = "lift"

    task: str | None = TASKS["lift"].name
    episode_length: int = TASKS["lift"].episode_length


@EnvConfig.register_subclass("fm_handover")
@dataclass
class FmHandoverEnv(RobosuiteEnv):
    """robosuite's TwoArmHandover for LeRobot: `--env.type=fm_handover`. For the fields see `RobosuiteEnv`."""

    NAME: ClassVar[str] = "handover"

    task: str | None = TASKS["handover"].name
    episode_length: int = TASKS["handover"].episode_length


@EnvConfig.register_subclass("fm_transport")
@dataclass
class FmTransportEnv(RobosuiteEnv):
    """robosuite's TwoArmTransport for LeRobot: `--env.type=fm_transport`. For the fields see `RobosuiteEnv`."""

    NAME: ClassVar[str] = "transport"

    task: str | None = TASKS["transport"].name
    episode_length: int = TASKS["transport"].episode_length


CONFIGS: tuple[type[RobosuiteEnv], ...] = (FmLiftEnv, FmHandoverEnv, FmTransportEnv)
"""One configuration for each task."""
