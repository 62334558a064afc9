"""robosuite's control loop without its detours: the same torques bit for bit, in half of the time.

At each of the 25 time steps of an action robosuite's operational space controllers (Khatib 1987) look up names, compute
every Jacobian three times, the mass matrix once for each arm, and reward and observations that nobody asked for. Here
the first time step, in which the controllers take their goals, is robosuite's own; in the others each quantity is
computed once, and robosuite's formulas are applied to it in robosuite's order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ControlLoop:
    """Drives the arms of a simulation that has just been reset. A reset builds a new model: it needs a new loop."""

    def __init__(self, simulator: Any):
        """Takes hold of robosuite's environment.

        Args:
            simulator: the environment; its arms stand on fixed bases, with operational space control of the pose in
                the world's frame, position apart from orientation, fixed gains and no interpolation.
        """
        self._simulator = simulator
        self._model, self._data = simulator.sim.model._model, simulator.sim.data._data
        self._arms = [_Arm(robot, self._model, self._data) for robot in simulator.robots]
        self._inertia = np.zeros((self._model.nv, self._model.nv))
        self._substeps = int(simulator.control_timestep / simulator.model_timestep)

    def step(self, action: NDArray[np.float64]) -> None:
        """Takes one action of the environment (7 * arms,), as the environment's `step` does, but observes nothing."""
        import mujoco

        mujoco.mj_step1(self._model, self._data)
        self._simulator._pre_action(action, policy_step=True)
        mujoco.mj_step2(self._model, self._data)
        for _ in range(1, self._substeps):
            mujoco.mj_step1(self._model, self._data)
            mujoco.mj_fullM(self._model, self._inertia, self._data.qM)
            for arm in self._arms:
                arm.push(self._inertia)
            mujoco.mj_step2(self._model, self._data)
        self._simulator.timestep += 1
        self._simulator.cur_time += self._simulator.control_timestep


class _Arm:
    """One arm on its way to its controller's goal. What drives its fingers stays the same during an action."""

    def __init__(self, robot: Any, model: Any, data: Any):
        from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

        self._matrices, self._null_torques, self._turn = opspace_matrices, nullspace_torques, orientation_error
        self._model, self._data = model, data
        self._controller = robot.part_controllers["right"]
        self._positions, self._velocities = (
            _span(found) for found in (self._controller.qpos_index, self._controller.qvel_index)
        )
        self._motors = _span(robot._ref_actuators_indexes_dict["right"])
        self._least, self._most = model.actuator_ctrlrange[self._motors].T
        self._site = robot.sim.model.site_name2id(self._controller.ref_name)
        # Views: MuJoCo writes anew into the same arrays at each time step.
        self._qpos, self._qvel, self._bias, self._ctrl = data.qpos, data.qvel, data.qfrc_bias, data.ctrl
        self._place, self._frame = data.site_xpos[self._site], data.site_xmat[self._site].reshape(3, 3)
        self._along, self._about = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self._jacobian = np.zeros((6, model.nv))[:, self._velocities].copy()

    def push(self, inertia: NDArray[np.float64]) -> None:
        """Sets the motors' torques for the present state; `inertia` (nv, nv) is that of all joints in it."""
        import mujoco

        goal, jacobian = self._controller, self._jacobian
        mujoco.mj_jacSite(self._model, self._data, self._along, self._about, self._site)
        jacobian[:3], jacobian[3:] = self._along[:, self._velocities], self._about[:, self._velocities]
        force = (goal.goal_pos - self._place) * goal.kp[:3] - np.dot(self._along, self._qvel) * goal.kd[:3]
        turn = self._turn(goal.goal_ori, self._frame.copy())
        torque = turn * goal.kp[3:6] - np.dot(self._about, self._qvel) * goal.kd[3:6]
        own = np.asfortranarray(inertia[self._velocities, self._velocities])  # its order decides the last bits
        _, linear, angular, null = self._matrices(own, jacobian, jacobian[:3], jacobian[3:])
        torques = np.dot(jacobian.T, np.concatenate([np.dot(linear, force), np.dot(angular, torque)]))
        torques += self._bias[self._velocities]
        posture = self._qpos[self._positions], self._qvel[self._velocities]
        torques += self._null_torques(own, null, goal.initial_joint, *posture)
        self._ctrl[self._motors] = np.minimum(np.maximum(torques, self._least), self._most)


def _span(numbers: Sequence[int]) -> slice:
    """Consecutive numbers as a slice, which numpy takes faster.

    Raises:
        ValueError: they are not consecutive.
    """
    span = slice(numbers[0], numbers[-1] + 1)
    if list(numbers) != list(range(span.start, span.stop)):
        raise ValueError(f"the joints of an arm must follow one another in the simulation, not be {list(numbers)}")
    return span
