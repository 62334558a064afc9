"""robosuite 1.5.1 made repeatable: one seed is one start, and a recorded state can be taken up again.

robosuite draws from numpy's global random numbers; here they are seeded for each start, and put back. A start
builds the whole model anew (about 0.2 s): the sizes of the cube and of the hammer are drawn with it.
"""

import copy
import logging
import os
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_configs.extras import not_installed
from env_configs.opengl import drawing
from env_configs.robosuite_control import ControlLoop
from env_configs.robosuite_models import Progress, Task
from env_configs.rotations import to_six

FPS = 20
"""Control steps per second."""

_CAMERA = "frontview"
"""robosuite's camera for pictures."""

_OBSERVED = ("eef_pos", "eef_quat", "gripper_qpos")
"""What is observed of each arm, in robomimic's order: 3 + 4 (x, y, z, w, of the hand) + 2 numbers."""


class Simulator:
    """One of robosuite's tasks, its arms driven by operational space control (OSC_POSE) in the world's frame."""

    def __init__(self, task: Task, actions: str):
        """Builds the simulator.

        Args:
            task: a row of `TASKS`.
            actions: "absolute" or "delta", what the controllers are told.

        Raises:
            ModuleNotFoundError: robosuite or MuJoCo is not installed.
        """
        self.task = task
        self._recorded: ET.Element | None = None
        self._renderer: Any = None
        with _quiet(), _numpy_seeded(0):
            self._env = _build(task, actions)
        self._env.set_xml_processor(self._put_recorded)
        for observable in self._env._observables.values():
            observable.set_enabled(False)  # robosuite asks all of them at each of the 25 time steps of an action
        used = {f"robot{arm}_{name}" for arm in range(task.arms) for name in _OBSERVED}
        all_of_them = self._env._observables.items()
        self._observables = [seen for name, seen in all_of_them if seen.modality == "object" or name in used]
        self._loop = ControlLoop(self._env)

    def reset(self, seed: int, recorded: ET.Element | None = None) -> None:
        """Goes to the start that a seed stands for: robosuite's own after `numpy.random.seed(seed)`.

        Args:
            seed: from 0 to 2**32 - 1.
            recorded: the drawn body of a recording, instead of a new one; see `recorded_body`.
        """
        self._recorded = recorded
        self._close_renderer()  # it draws one model
        with _quiet(), _numpy_seeded(seed):
            self._env.reset()
        self._loop = ControlLoop(self._env)
        if recorded is not None and self.task.adopt is not None:
            self.task.adopt(self._env)

    @property
    def state(self) -> NDArray[np.float64]:
        """Time, positions and velocities of all joints, as robosuite records them."""
        return self._env.sim.get_state().flatten()

    @property
    def joints(self) -> list[str]:
        """Names of the joints, in the order of the state."""
        return [self._env.sim.model.joint_id2name(number) for number in range(self._env.sim.model.njnt)]

    def put(self, state: NDArray) -> None:
        """Goes to a state; the controllers take it for their start."""
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()
        for controller in self._controllers:
            controller.update_initial_joints(self._env.sim.data.qpos[controller.qpos_index])

    def step(self, action: NDArray) -> None:
        """Drives the arms for 0.05 s; for each arm position 3, axis times angle 3, gripper 1 (-1 opens, 1 closes)."""
        self._loop.step(action)

    @property
    def solved(self) -> bool:
        """Whether the task is done now."""
        return self._env.reward() > 0

    def observe(self) -> tuple[dict[str, NDArray[np.float64]], Progress]:
        """What LeRobot's keys hold now, and how far the task has come.

        robosuite's own observations of a step are those of its last time step but one, 0.002 s ago; these are of the
        present, as are those that robomimic computes from recorded states.
        """
        import mujoco

        mujoco.mj_kinematics(self._env.sim.model._model, self._env.sim.data._data)
        self._switch_observables(True)
        seen = self._env._get_observations(force_update=True)
        self._switch_observables(False)
        arms = [seen[f"robot{arm}_{name}"] for arm in range(self.task.arms) for name in _OBSERVED]
        observation = {"agent_pos": np.concatenate(arms), "environment_state": seen["object-state"]}
        return observation, self.task.progress(self._env, seen)

    def goals(self, action: NDArray) -> NDArray[np.float64]:
        """Poses (arms, 9) that a delta `action` (7 * arms,) asks for in the present state.

        They are the controllers' own goals: the positions and six numbers of the rotations of the grip sites.
        """
        poses = []
        for controller, command in zip(self._controllers, action.reshape(self.task.arms, 7), strict=True):
            controller.update(force=True)
            controller.set_goal(command[:6])
            poses.append(np.concatenate([controller.goal_pos, to_six(controller.goal_ori)]))
        return np.array(poses)

    def picture(self, size: int) -> NDArray[np.uint8]:
        """A view from the front (size, size, 3). Drawing changes nothing in the simulation.

        Raises:
            NoOpenGLError: this machine offers no OpenGL to MuJoCo.
        """
        import mujoco

        model, data = self._env.sim.model._model, self._env.sim.data._data
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        with drawing("transport"), _quiet():
            if self._renderer is None:
                self._renderer = mujoco.Renderer(model, size, size)
            self._renderer.update_scene(data, _CAMERA, self._visible())
            return self._renderer.render()

    def close(self) -> None:
        """Lets the simulation go."""
        self._close_renderer()
        self._env.close()

    @property
    def _controllers(self) -> list[Any]:
        return [robot.part_controllers["right"] for robot in self._env.robots]

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    @staticmethod
    def _visible() -> Any:
        import mujoco

        options = mujoco.MjvOption()
        options.geomgroup[0] = 0  # the shapes that collide
        return options

    def _switch_observables(self, on: bool) -> None:
        for observable in self._observables:
            observable.set_enabled(on)

    def _put_recorded(self, xml: str) -> str:
        """Gives the drawn body of a model the shapes and the weight of the recorded one."""
        if self._recorded is None:
            return xml
        model = ET.fromstring(xml)
        body = _find_body(model, self._recorded.get("name", ""))
        shapes = {shape.get("name"): shape.attrib for shape in self._recorded.iter("geom")}
        for shape in body.iter("geom"):
            recorded = shapes.get(shape.get("name"))
            if recorded is None:
                raise ValueError(f"the recorded body '{body.get('name')}' has no shape '{shape.get('name')}'")
            for name in _SHAPE:
                shape.attrib.pop(name, None)
            shape.attrib.update({name: recorded[name] for name in _SHAPE if name in recorded})
        body.extend(copy.deepcopy(self._recorded.findall("inertial")))
        return ET.tostring(model, encoding="unicode")


_SHAPE = ("size", "pos", "quat", "friction", "density", "mass")
"""What is taken from a recorded shape: numbers only, never the names of files that a model can hold."""


def recorded_body(model: str, name: str | None) -> ET.Element | None:
    """The body of a recorded model (MuJoCo's XML) that was drawn for its episode; None if `name` is None.

    Raises:
        ValueError: the text is no model, or lacks that body.
    """
    return None if name is None else _find_body(_parse(model), name)


def recorded_joints(model: str) -> list[str]:
    """Names of the joints of a recorded model in the order of its states, as robosuite 1.5 names them.

    Raises:
        ValueError: the text is no model.
    """
    world = _parse(model).find("worldbody")
    names = [joint.get("name", "") for joint in world.iter("joint")] if world is not None else []
    return [re.sub(r"^(gripper\d)_finger", r"\1_right_finger", name) for name in names]


def _parse(model: str) -> ET.Element:
    try:
        return ET.fromstring(model)
    except ET.ParseError as error:
        raise ValueError(f"the recorded model is no XML ({error})") from error


def _find_body(model: ET.Element, name: str) -> ET.Element:
    for body in model.iter("body"):
        if body.get("name") == name:
            return body
    raise ValueError(f"the model has no body '{name}'")


def _build(task: Task, actions: str) -> Any:
    robosuite, load_controllers = _import()
    controllers = load_controllers(controller="BASIC")
    arm = controllers["body_parts"]["right"] | {"input_ref_frame": "world", "input_type": actions}
    return robosuite.make(
        task.name,
        robots=["Panda"] * task.arms,
        controller_configs=controllers | {"body_parts": {"right": arm}},
        control_freq=FPS,
        ignore_done=True,  # the number of steps is gymnasium's affair
        hard_reset=True,
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        **({"env_configuration": "opposed"} if task.arms == 2 else {}),
    )


def _import() -> tuple[Any, Any]:
    chosen = os.environ.get("MUJOCO_GL")
    try:
        import robosuite
        from robosuite.controllers import load_composite_controller_config
    except ModuleNotFoundError as error:
        raise not_installed(error, "robosuite") from error
    finally:  # robosuite sets it, which would break MuJoCo in later processes where there is no EGL
        os.environ.pop("MUJOCO_GL", None)
        if chosen is not None:
            os.environ["MUJOCO_GL"] = chosen
    return robosuite, load_composite_controller_config


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out robosuite's notes on absent optional parts and on files that it reads."""
    logger = logging.getLogger("robosuite_logs")
    muted, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = muted


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seeds numpy's global random numbers, and puts them back."""
    before = np.random.get_state()  # noqa: NPY002  (robosuite draws from it)
    try:
        np.random.seed(seed)  # noqa: NPY002
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
