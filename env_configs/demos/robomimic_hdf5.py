"""robosuite's tasks: from HDF5 recordings, robomimic's (Mandlekar et al. 2021) or robosuite's own, to episodes.

Each `data/demo_<n>` holds `states` (T, 1 + positions + velocities), `actions` (T, 7 * arms), ways from the present
pose, and its model as MuJoCo's XML; robomimic adds `obs` and `mask/<name>`, lists of demonstrations.

The states are always replayed into observations in the installed simulator, whether or not there is an `obs`: what a
policy learns from is then what it will see. (robomimic's older files have the way from the gripper to the cube with
the other sign than robosuite 1.5.) From the recorded model only the shapes and the weight of the object that was
drawn for the episode are taken; its files are never opened, the meshes are the installed robosuite's. The poses of
actions="absolute" are the goals that the controllers make of the recorded ways (Chi et al. 2023).

What the last action of an episode led to was not recorded: its `next.reward` and `next.success` repeat the last
state's own.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from env_configs.demos.dataset import Episode, Features, write_dataset
from env_configs.demos.hdf5_store import find_array, find_group, has, numbered, open_hdf5, read, read_text
from env_configs.demos.stores import StoreError
from env_configs.robosuite_models import TASKS, Task
from env_configs.robosuite_sim import FPS, Simulator, recorded_body, recorded_joints
from env_configs.robosuite_tasks import ACTIONS, ROBOT

if TYPE_CHECKING:
    import h5py

_SAME_PLACE = 1e-3
"""Farthest that a recorded gripper may be from where the installed simulator has it, m."""

_FACING = ("default", "opposed", "single-arm-opposed")
"""Names of the tasks' own placing of the arms, in robosuite 1.4 and 1.5; a file's states do not hold it."""

_CONTROLLER = {
    "input_max": 1.0,
    "input_min": -1.0,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150.0,
}
"""How far an action goes, and how stiffly: numbers of the installed controller, alike in robosuite 1.4 and 1.5."""

_ADVICE = {"input_ref_frame": "; robosuite 1.5 takes 'base' unless the controller's configuration says 'world'"}
"""Setting -> what a refusal adds."""

_ARM = ("x", "y", "z", "qx", "qy", "qz", "qw", "finger1", "finger2")
_COMMANDS = {
    "absolute": ("x", "y", "z", *(f"r{number}" for number in range(6)), "gripper"),
    "delta": ("dx", "dy", "dz", "rx", "ry", "rz", "gripper"),
}


def features(task: Task, actions: str) -> Features:
    """The columns of a data set, with the environment's own numbers."""
    arms = range(task.arms)
    robot = [f"arm{arm}.{name}" for arm in arms for name in _ARM]
    command = [f"arm{arm}.{name}" for arm in arms for name in _COMMANDS[actions]]
    return {
        "observation.state": {"dtype": "float32", "shape": (len(robot),), "names": robot},
        "observation.environment_state": {"dtype": "float32", "shape": (task.objects,), "names": None},
        "action": {"dtype": "float32", "shape": (len(command),), "names": command},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }


def convert(source: Path, root: Path, name: str, actions: str = "absolute", mask: str | None = None) -> tuple[int, int]:
    """Writes the demonstrations of a file as a LeRobotDataset.

    Args:
        source: the HDF5 file.
        root: folder to create; must not exist.
        name: the task, a name in `TASKS`.
        actions: "absolute" (poses in the world's frame) or "delta" (as recorded).
        mask: take only the demonstrations that `mask/<mask>` lists, in the file's order; None: all.

    Returns:
        Number of episodes and of frames.

    Raises:
        ValueError: unknown `actions`; or `StoreError`: the file is damaged, foreign, or of another task.
        FileExistsError: `root` exists.
        ModuleNotFoundError: robosuite or h5py is not installed.
    """
    if actions not in ACTIONS:
        raise ValueError(f"actions must be one of {ACTIONS}, not {actions!r}")
    with open_hdf5(source, "robosuite") as file:
        data = find_group(file, "data")
        _check_settings(data, TASKS[name])
        demos = [find_group(data, demo) for demo in _chosen(file, numbered(data, "demo_"), mask)]
        episodes = _episodes(demos, TASKS[name], actions)
        return write_dataset(root, FPS, features(TASKS[name], actions), episodes, total=len(demos))


def _episodes(demos: "list[h5py.Group]", task: Task, actions: str) -> Iterator[Episode]:
    simulator = Simulator(task, "delta")
    try:
        for demo in demos:
            yield Episode(_columns(demo, simulator, actions), task.description)
    finally:
        simulator.close()


def _columns(demo: "h5py.Group", simulator: Simulator, actions: str) -> dict[str, NDArray]:
    """One demonstration, replayed."""
    task = simulator.task
    states = read(find_array(demo, "states", (None, len(simulator.state))))
    commands = read(find_array(demo, "actions", (len(states), 7 * task.arms))).astype(np.float64)
    _take_up(demo, simulator)
    robot, objects, goals, solved = [], [], [], []
    for state, command in zip(states, commands, strict=True):
        simulator.put(state)
        seen, _ = simulator.observe()
        robot.append(seen["agent_pos"])
        objects.append(seen["environment_state"])
        solved.append(simulator.solved)
        goals.append(simulator.goals(command))
    _check_same_arms(demo, np.array(robot))
    grips = commands.reshape(len(commands), task.arms, 7)[:, :, 6:]
    absolute = np.concatenate([np.array(goals), grips], axis=-1).reshape(len(commands), -1)
    return {
        "observation.state": np.array(robot, dtype=np.float32),
        "observation.environment_state": np.array(objects, dtype=np.float32),
        "action": (absolute if actions == "absolute" else commands).astype(np.float32),
        **_outcome(np.array(solved)),
    }


def _outcome(solved: NDArray[np.bool_]) -> dict[str, NDArray]:
    """What each action led to, read off the next state; the last has none and repeats its own."""
    after = np.append(solved[1:], solved[-1])[:, None]
    done = np.zeros_like(after)
    done[-1] = True
    return {"next.reward": after.astype(np.float32), "next.done": done, "next.success": after}


def _take_up(demo: "h5py.Group", simulator: Simulator) -> None:
    """Makes the simulator's model the recorded one."""
    model = read_text(demo, "model_file")
    with _named(demo):
        joints = recorded_joints(model)
        if joints != simulator.joints:
            raise ValueError(f"its joints are {', '.join(joints)}, expected {', '.join(simulator.joints)}")
        simulator.reset(0, recorded_body(model, simulator.task.drawn))


def _check_same_arms(demo: "h5py.Group", robot: NDArray) -> None:
    """Refuses a recording whose own observations of the grippers are not those of its states."""
    for arm, numbers in enumerate(np.split(robot, robot.shape[1] // ROBOT, axis=1)):
        name = f"obs/robot{arm}_eef_pos"
        if has(demo, name):
            away = float(np.abs(read(find_array(demo, name, (len(robot), 3))) - numbers[:, :3]).max())
            if away > _SAME_PLACE:
                raise StoreError(
                    f"{demo.file.filename}: '{demo.name}/{name}' is up to {away:.3g} m from where the installed "
                    "robosuite has the gripper in the recorded states; was it recorded with another robot or place?"
                )


def _check_settings(data: "h5py.Group", task: Task) -> None:
    """Refuses recordings of another task, robot or controller."""
    name, settings = _settings(data)
    controller = _controller(settings.get("controller_configs") or {})
    robots, placing = settings.get("robots"), settings.get("env_configuration") or "default"
    found = {
        "env_name": name,
        "robots": [robots] if isinstance(robots, str) else robots,
        "env_configuration": "default" if placing in _FACING else placing,
        "control_freq": settings.get("control_freq", FPS),
        "controller": controller.get("type"),
        "control_delta": controller.get("control_delta", controller.get("input_type", "delta") == "delta"),
        "input_ref_frame": controller.get("input_ref_frame", "world"),  # robosuite 1.4 knew no other
        **{setting: _each(controller.get(setting, number)) for setting, number in _CONTROLLER.items()},
    }
    expected = {
        "env_name": task.name,
        "robots": ["Panda"] * task.arms,
        "env_configuration": "default",
        "control_freq": FPS,
        "controller": "OSC_POSE",
        "control_delta": True,
        "input_ref_frame": "world",
        **{setting: _each(number) for setting, number in _CONTROLLER.items()},
    }
    for setting, value in found.items():
        if value != expected[setting]:
            raise StoreError(
                f"{data.file.filename} was recorded with {setting} {value!r}, expected {expected[setting]!r} for "
                f"{task.name}{_ADVICE.get(setting, '')}"
            )


def _settings(data: "h5py.Group") -> tuple[Any, dict[str, Any]]:
    """The task's name and settings, as robomimic (`env_args`) or robosuite (`env_info`) writes them."""
    attribute = "env_args" if "env_args" in data.attrs else "env_info"
    try:
        told = json.loads(read_text(data, attribute))
        settings = told["env_kwargs"] if attribute == "env_args" else told
        return told["env_name"], dict(settings)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{data.file.filename}: attribute '{attribute}' of '{data.name}' does not tell env_name and its settings "
            f"({error!r})"
        ) from error


def _controller(configs: Any) -> dict[str, Any]:
    """The settings of the (first) arm's controller, in robosuite 1.4's form or in 1.5's."""
    controller: Any = configs[0] if isinstance(configs, list) and configs else configs
    for inner in ("body_parts", "arms", "right"):
        controller = controller.get(inner, controller) if isinstance(controller, dict) else {}
    return controller if isinstance(controller, dict) else {}


def _each(number: Any) -> Any:
    """A number of the controller for each of its six directions, as a file may have it for all; anything else as is."""
    try:
        return np.broadcast_to(np.asarray(number, np.float64), 6).tolist()
    except (TypeError, ValueError):
        return number


def _chosen(file: "h5py.File", demos: list[str], mask: str | None) -> list[str]:
    """Names of the demonstrations to convert."""
    if not demos:
        raise StoreError(f"{file.filename} has no demonstrations 'data/demo_0', 'data/demo_1', ...")
    if mask is None:
        return demos
    listed = _mask(file, mask)
    if not listed <= set(demos):
        raise StoreError(f"{file.filename}: 'mask/{mask}' lists absent {', '.join(sorted(listed - set(demos)))}")
    return [demo for demo in demos if demo in listed]


def _mask(file: "h5py.File", mask: str) -> set[str]:
    import h5py

    if not has(file, f"mask/{mask}"):
        known = list(find_group(file, "mask")) if has(file, "mask") else []
        raise StoreError(f"{file.filename} has no mask {mask!r}; it has {', '.join(known) or 'none'}")
    names = file["mask"][mask]
    if not isinstance(names, h5py.Dataset) or names.dtype.kind not in "SO" or names.is_virtual or names.external:
        raise StoreError(f"{file.filename}: 'mask/{mask}' must be a list of names inside this file")
    try:
        return set(names.asstr()[:].tolist())
    except (RuntimeError, OSError, UnicodeError, TypeError, ValueError) as error:
        raise StoreError(f"{file.filename}: 'mask/{mask}' is damaged, it cannot be read ({error})") from error


@contextmanager
def _named(demo: "h5py.Group") -> Iterator[None]:
    """Says of which demonstration an error tells."""
    try:
        yield
    except ValueError as error:
        raise StoreError(f"{demo.file.filename}: the model of '{demo.name}' cannot be used: {error}") from error
