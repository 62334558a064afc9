"""The Franka's hand in the kitchen: from where it shall be to joint positions, by damped least squares."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_configs.kitchen_tasks import JOINT_LIMITS
from env_configs.rotations import from_six

ARM = 7
_DAMPING = 0.03
_ITERATIONS = 3
_TURN = 0.3
"""Weight of a rad beside a metre: the place of the hand matters more than its turn."""


def frame(forward: NDArray, up: NDArray) -> NDArray[np.float64]:
    """The hand's rotation (3, 3) whose z axis points `forward` (3,) and whose x axis points as near `up` as it can."""
    z_first = from_six(np.concatenate([forward, up]))
    z, x = z_first[:, 0], z_first[:, 1]
    return np.stack([x, np.cross(z, x), z], axis=-1)


class Hand:
    """Forward and inverse kinematics of the site `end_effector`, on a copy of the simulator's data.

    Args:
        model: MuJoCo's model of the kitchen.
    """

    def __init__(self, model: Any) -> None:
        import mujoco

        self._model, self._data, self._mujoco = model, mujoco.MjData(model), mujoco
        self._site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "end_effector")

    def pose(self, joints: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Position (3,) in m and rotation (3, 3) for joints (7,) in rad."""
        self._data.qpos[:ARM] = joints
        self._mujoco.mj_kinematics(self._model, self._data)
        return self._data.site_xpos[self._site].copy(), self._data.site_xmat[self._site].reshape(3, 3).copy()

    def reach(self, joints: NDArray, position: NDArray, rotation: NDArray) -> NDArray[np.float64]:
        """Joints (7,) near `joints` (7,) that bring the hand to a position (3,) and a rotation (3, 3), or near it."""
        joints = np.array(joints, dtype=np.float64)
        linear, angular = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))
        for _ in range(_ITERATIONS):
            place, turn = self.pose(joints)
            self._mujoco.mj_comPos(self._model, self._data)
            self._mujoco.mj_jacSite(self._model, self._data, linear, angular, self._site)
            away = sum(np.cross(turn[:, axis], rotation[:, axis]) for axis in range(3)) / 2
            error = np.concatenate([position - place, _TURN * away])
            jacobian = np.vstack([linear[:, :ARM], _TURN * angular[:, :ARM]])
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + _DAMPING**2 * np.eye(6), error)
            joints = np.clip(joints + step, *JOINT_LIMITS[:ARM].T)
        return joints
