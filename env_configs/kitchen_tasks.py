"""Franka Kitchen in numbers: what is observed, when a task is done, how far a joint moves in a step.

The simulator has 30 positions q (9 joints of the robot: 7 of the arm in rad, 2 fingers in m; 21 of the objects, the
kettle's position and quaternion last) and 29 velocities (9 of the robot, 20 of the objects).
"""

import numpy as np
from numpy.typing import NDArray

FPS = 12
"""What the simulator calls its rate; a step takes 0.08 s, which is 12.5 Hz. LeRobot wants a whole number."""

TASK_DESCRIPTION = (
    "In the kitchen, open the microwave, the slide cabinet and the hinge cabinet, move the kettle to the top left "
    "burner, switch the light on, turn the bottom burner and the top burner on."
)

TASKS: dict[str, tuple[list[int], list[float]]] = {
    "bottom_burner": ([11, 12], [-0.88, -0.01]),
    "top_burner": ([15, 16], [-0.92, -0.01]),
    "light_switch": ([17, 18], [-0.69, -0.05]),
    "slide_cabinet": ([19], [0.37]),
    "hinge_cabinet": ([20, 21], [0.0, 1.45]),
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
}
"""Name of each task -> which of the 30 positions it is about, and where they should be (Gupta et al. 2019)."""

NEAR = 0.3
"""A task is done as soon as its positions are nearer than this to their goal (Euclidean norm)."""

SCORED = 4
"""Tasks that count as a success: the human demonstrations do four."""

REACH = 0.16
"""Distance in rad (m for a finger) that a joint is told to move per step by velocity action 1: 2 rad/s for 0.08 s."""

JOINTS = ["joint1", "joint2", "joint3", "joint4", "joint5", "joint6", "joint7", "finger_right", "finger_left"]

JOINT_LIMITS = np.array(
    [*[[-2.9, 2.9], [-1.8, 1.8], [-2.9, 2.9], [-3.1, 0.0], [-2.9, 2.9], [0.0, 3.8], [-2.9, 2.9]], *[[0.0, 0.04]] * 2]
)
"""(9, 2), lowest and highest position that the simulator tells a joint to go to."""

LAYOUTS = {"relay": (9, 51), "d4rl": (18, 41)}
"""Name -> length of the robot's part and of the kitchen's part of an observation; see `observe`."""

ACTIONS = {"joint_targets": JOINTS, "velocity": [f"{joint}_velocity" for joint in JOINTS]}
"""What an action can be; see `FmKitchenEnv`."""


def observe(layout: str, positions: NDArray, velocities: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """The robot's part and the kitchen's part of an observation; one after the other they are the benchmark's.

    - "relay" (60 numbers, Relay Policy Learning and Diffusion Policy): the robot's 9 positions | the objects' 21,
      30 zeros. The zeros stand where those recordings kept a goal, which the benchmark hides.
    - "d4rl" (59 numbers, D4RL and Minari): the robot's 9 positions, 9 velocities | the objects' 21 positions, 20
      velocities.

    Args:
        layout: one of `LAYOUTS`.
        positions: (..., 30).
        velocities: (..., 29); only "d4rl" needs them.
    """
    robot, objects = positions[..., :9], positions[..., 9:]
    if layout == "relay":
        return robot, np.concatenate([objects, np.zeros_like(positions)], axis=-1)
    assert velocities is not None
    return (
        np.concatenate([robot, velocities[..., :9]], axis=-1),
        np.concatenate([objects, velocities[..., 9:]], axis=-1),
    )


def split(observed: NDArray) -> tuple[NDArray, NDArray]:
    """Positions (..., 30) and velocities (..., 29) of what the simulator observes: (..., 59), layout "d4rl"."""
    positions = np.concatenate([observed[..., :9], observed[..., 18:39]], axis=-1)
    return positions, np.concatenate([observed[..., 9:18], observed[..., 39:]], axis=-1)


def done_now(positions: NDArray) -> NDArray[np.bool_]:
    """Which tasks are done in positions (..., 30), whatever was before: (..., 7), in the order of `TASKS`."""
    distances = [np.linalg.norm(positions[..., index] - goal, axis=-1) for index, goal in TASKS.values()]
    return np.stack(distances, axis=-1) < NEAR


def score(tasks_completed: NDArray | float) -> NDArray:
    """Share of the four tasks that count: min(tasks/4, 1)."""
    return np.minimum(np.asarray(tasks_completed) / SCORED, 1)
