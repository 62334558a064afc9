"""The tasks of robosuite 1.5.1: what each is made of, what it observes, and how far it has come."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Progress = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A task of robosuite.

    Attributes:
        name: robosuite's name.
        description: what to do, in words.
        arms: number of Panda arms; two stand opposite each other.
        objects: length of robosuite's `object-state`, in whose order the objects are observed.
        episode_length: steps of 0.05 s after which an episode ends.
        progress: how far the simulator has come, by robosuite's observations; 0 or 1 for each part of the task.
        drawn: body whose size and weight are drawn anew for each episode; None: no such body.
        adopt: tells robosuite's own book-keeping the size of the drawn body in a recording, where it keeps
            one.
    """

    name: str
    description: str
    arms: int
    objects: int
    episode_length: int
    progress: Callable[[Any, dict[str, NDArray]], Progress]
    drawn: str | None = None
    adopt: Callable[[Any], None] | None = None

    @property
    def actions(self) -> dict[str, int]:
        """Numbers of an action, by the kind of actions."""
        return {"absolute": 10 * self.arms, "delta": 7 * self.arms}


def _lift(simulator: Any, _seen: dict[str, NDArray]) -> Progress:
    return {"grasped": float(simulator._check_grasp(simulator.robots[0].gripper, simulator.cube))}


def _handover(simulator: Any, _seen: dict[str, NDArray]) -> Progress:
    first, second, hammer, table = simulator._get_task_info()
    lifted = hammer - table > simulator.height_threshold
    return {
        "grasped": float(first or second),
        "lifted": float(lifted),
        "both_grasp": float(lifted and first and second),
    }


def _transport(simulator: Any, seen: dict[str, NDArray]) -> Progress:
    box = simulator.sim.data.get_body_xpos(simulator.transport.start_bin.root_body)
    aside = np.abs(seen["lid_handle_pos"] - box)[:2].max()
    return {
        "lid_off": float(aside > simulator.bin_size[0] / 2),
        "trash_in_bin": float(seen["trash_in_trash_bin"]),
        "payload_in_bin": float(seen["payload_in_target_bin"]),
    }


def _adopt_hammer(simulator: Any) -> None:
    model, hammer = simulator.sim.model, simulator.hammer
    radius, _, half_length = model.geom_size[model.geom_name2id("hammer_handle")]
    hammer.handle_radius, hammer.handle_length = radius, 2 * half_length
    hammer.head_halfsize = model.geom_size[model.geom_name2id("hammer_head")][1]


TASKS = {
    "lift": Task(
        name="Lift",
        description="Lift the cube off the table.",
        arms=1,
        objects=10,
        episode_length=400,  # robomimic's
        progress=_lift,
        drawn="cube_main",
    ),
    "handover": Task(
        name="TwoArmHandover",
        description="Pick up the hammer with the first arm and hand it over to the second.",
        arms=2,
        objects=16,
        episode_length=700,  # the longest of robosuite's seven demonstrations has 641 steps
        progress=_handover,
        drawn="hammer_root",
        adopt=_adopt_hammer,
    ),
    "transport": Task(
        name="TwoArmTransport",
        description="Move the hammer into the target bin, from arm to arm, and the trash into the trash bin.",
        arms=2,
        objects=41,
        episode_length=700,  # robomimic's
        progress=_transport,
    ),
}
"""Name of the task here -> the task."""
