"""The tasks' numbers as motors: their names, and how far each may be driven."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from env_configs.demos.motors import motor_names
from env_configs.kitchen_tasks import JOINT_LIMITS
from env_configs.presets import make_env_config
from env_configs.pusht_geometry import BOARD, keypoints
from env_configs.robosuite_models import TASKS

_ROBOSUITE_LIMITS = np.array([*[[-1.5, 1.5]] * 2, [0.5, 2.0], *[[-1.0, 1.0]] * 7])
"""Of one arm: x, y, z in m (the tables' tops are 0.8 m high), six numbers of a rotation, the gripper."""

_KITCHEN_STEP = 0.08


@dataclass(frozen=True)
class Motors:
    """What a task measures and drives.

    Attributes:
        robot: names of the robot's own motors, `<number>.pos`.
        objects: names of the objects' numbers.
        driven: names of an action's numbers. One that is also among `robot` drives what that one measures.
        limits: (len(driven), 2), lowest and highest value of each.
        step: seconds of one step of the simulator.
    """

    robot: tuple[str, ...]
    objects: tuple[str, ...]
    driven: tuple[str, ...]
    limits: NDArray[np.float64]
    step: float

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of everything that is measured."""
        return self.robot + self.objects


def motors_of(task: str) -> Motors:
    """The motors of a task, named as in its data sets; positions are what is driven, never velocities."""
    robot, objects, driven = map(tuple, motor_names(_features(task)))
    if task == "pusht":
        limits = np.tile([0.0, BOARD], (2, 1))
    elif task == "kitchen":
        limits = JOINT_LIMITS
    else:
        limits = np.tile(_ROBOSUITE_LIMITS, (TASKS[task].arms, 1))
    step = _KITCHEN_STEP if task == "kitchen" else 1 / make_env_config(task).fps
    return Motors(robot, objects, driven, limits, step)


def _features(task: str) -> dict[str, dict]:
    from env_configs.demos import kitchen, pusht_zarr, robomimic_hdf5  # late: a robot is registered without them

    if task == "pusht":
        return pusht_zarr.features("state")
    if task == "kitchen":
        return kitchen.features("relay", "joint_targets")
    return robomimic_hdf5.features(TASKS[task], "absolute")


def make_env(task: str, camera: bool) -> gym.Env:
    """The simulator of a task, with pictures for a camera.

    Raises:
        ModuleNotFoundError: the simulator is not installed.
    """
    return make_env_config(task, **({"obs": "image"} if camera else {})).make()


def readings(observation: dict[str, NDArray], info: dict[str, Any]) -> NDArray[np.float64]:
    """Everything that a task observed in numbers, in the order of `Motors.measured`."""
    objects = observation.get("environment_state")
    if objects is None:  # Push-T gives either the corners or pictures
        objects = keypoints(info["block_pose"][None])[0]
    return np.concatenate([observation["agent_pos"], objects]).astype(np.float64)
