"""A scripted expert for Franka Kitchen: four tasks, one after the other, by way of the hand.

Each task is a path of waypoints for the hand, near the handles of the kitchen, which always stands in the same place;
a smooth curve leads through them. The places, the pace and the order are drawn for each seed, so that the episodes
are not one trajectory. What the arm lags and sags is added to where the hand is sent, and a task that failed is tried
again while there is time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from env_configs.experts.attempt import Attempt
from env_configs.experts.kitchen_hand import ARM, Hand, frame
from env_configs.kitchen import Kitchen
from env_configs.kitchen_tasks import REACH, TASK_DESCRIPTION

STEPS = 280
"""Of an episode, as in the benchmark."""

OPEN, SHUT = 0.04, 0.0
"""Positions of a finger, m; shut, they hold what is between them."""

_JITTER = 0.004
"""Standard deviation of a waypoint's place, m."""

_PACE = (0.95, 1.2)
"""Range of the factor on the times of a task."""

_GAIN, _MOST = 0.2, 0.05
"""Share of the hand's error that is added to its goal in each step, and the most that it adds up to, m."""

_AFTER = 4
"""Steps that the episode goes on after the last task."""


@dataclass(frozen=True)
class Waypoint:
    """Where the hand shall be.

    Attributes:
        steps: steps of 0.08 s since the waypoint before.
        position: of the site `end_effector`, m.
        forward: the hand's z axis, along which the fingers point.
        up: the hand's x axis.
        fingers: position of each finger, m.
    """

    steps: int
    position: tuple[float, float, float]
    forward: tuple[float, float, float] = (0.0, 1.0, 0.0)
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)
    fingers: float = OPEN


_TO_DOOR, _PULL = (-0.22, 0.97, -0.08), (-0.5, 0.85, -0.1)
_TO_KETTLE, _CARRY = (0.45, 0.88, -0.15), (0.35, 0.93, 0.0)
_TO_SWITCH, _SWITCH_UP = (0.1, 0.96, 0.26), (0.02, -0.26, 0.96)
_TO_SLIDE, _SLIDE_UP = (0.45, 0.7, 0.55), (-0.22, -0.52, 0.83)

PATHS: dict[str, tuple[Waypoint, ...]] = {
    "microwave": (
        Waypoint(14, (-0.54, 0.23, 1.95)),
        Waypoint(9, (-0.605, 0.41, 1.88), _TO_DOOR),
        Waypoint(7, (-0.640, 0.495, 1.858), _TO_DOOR),
        Waypoint(4, (-0.645, 0.485, 1.857), _TO_DOOR, fingers=0.015),
        Waypoint(6, (-0.655, 0.36, 1.857), (-0.3, 0.95, -0.09), fingers=0.0),
        Waypoint(6, (-0.695, 0.23, 1.857), (-0.42, 0.9, -0.09), fingers=0.0),
        Waypoint(7, (-0.75, 0.09, 1.865), _PULL, fingers=0.01),
        Waypoint(5, (-0.69, 0.07, 1.852), (-0.42, 0.89, -0.13)),
    ),
    "kettle": (
        Waypoint(6, (-0.55, 0.09, 1.835), (0.0, 0.98, -0.15)),
        Waypoint(10, (-0.42, 0.235, 1.82), (0.41, 0.9, -0.14)),
        Waypoint(7, (-0.365, 0.34, 1.808), _TO_KETTLE),
        Waypoint(6, (-0.342, 0.395, 1.812), _TO_KETTLE, fingers=SHUT),
        Waypoint(8, (-0.31, 0.51, 1.905), _CARRY, fingers=SHUT),
        Waypoint(9, (-0.305, 0.68, 1.90), _CARRY, fingers=SHUT),
        Waypoint(8, (-0.31, 0.725, 1.82), (0.31, 0.95, 0.0), fingers=SHUT),
        Waypoint(4, (-0.315, 0.72, 1.815), (0.31, 0.95, 0.0)),
        Waypoint(7, (-0.33, 0.60, 1.815), (0.29, 0.95, -0.07)),
    ),
    "light_switch": (
        Waypoint(9, (-0.345, 0.42, 1.99), (0.33, 0.94, 0.03)),
        Waypoint(9, (-0.377, 0.37, 2.17), (0.17, 0.96, 0.2), (-0.05, -0.2, 0.98)),
        Waypoint(9, (-0.362, 0.48, 2.278), _TO_SWITCH, _SWITCH_UP),
        Waypoint(9, (-0.372, 0.59, 2.28), _TO_SWITCH, _SWITCH_UP, fingers=0.02),
        Waypoint(8, (-0.43, 0.578, 2.275), _TO_SWITCH, _SWITCH_UP, fingers=0.02),
        Waypoint(5, (-0.475, 0.555, 2.278), _TO_SWITCH, _SWITCH_UP, fingers=0.02),
        Waypoint(6, (-0.49, 0.47, 2.3), _TO_SWITCH, _SWITCH_UP),
    ),
    "slide_cabinet": (
        Waypoint(11, (-0.34, 0.412, 2.42), (0.31, 0.82, 0.47), (-0.08, -0.47, 0.88)),
        Waypoint(10, (-0.185, 0.50, 2.545), _TO_SLIDE, _SLIDE_UP),
        Waypoint(6, (-0.117, 0.575, 2.552), _TO_SLIDE, _SLIDE_UP),
        Waypoint(5, (-0.03, 0.615, 2.552), _TO_SLIDE, _SLIDE_UP, fingers=0.02),
        Waypoint(8, (0.14, 0.62, 2.555), (0.6, 0.6, 0.5), _SLIDE_UP, fingers=0.02),
        Waypoint(8, (0.31, 0.62, 2.56), (0.7, 0.5, 0.5), _SLIDE_UP, fingers=0.02),
    ),
}
"""Task -> the way of the hand."""

_DOOR, _KETTLE, _LIGHT, _SLIDE = PATHS
ORDERS = (
    (_DOOR, _KETTLE, _LIGHT, _SLIDE),
    (_KETTLE, _DOOR, _LIGHT, _SLIDE),
    (_KETTLE, _LIGHT, _DOOR, _SLIDE),
    (_LIGHT, _DOOR, _KETTLE, _SLIDE),
    (_LIGHT, _KETTLE, _DOOR, _SLIDE),
    (_SLIDE, _LIGHT, _DOOR, _KETTLE),
)
"""Orders of the tasks, drawn with equal chances: those in which the way from each task to the next is free."""


def attempt(seed: int, options: Mapping[str, str]) -> Attempt:
    """One attempt of four tasks.

    Args:
        seed: decides the noise of the observations, the order, the places and the pace.
        options: `layout` and `actions` of the environment.
    """
    kitchen, hand = _kitchen(options["layout"], options["actions"])
    episode = _Episode(kitchen, hand, seed, options["actions"])
    generator = np.random.default_rng(seed)
    order = ORDERS[generator.integers(len(ORDERS))]
    for task in order:
        while not (episode.over or episode.done(task)):
            episode.follow(_curve(PATHS[task], episode.pose, generator))
    return episode.attempt()


@cache
def _kitchen(layout: str, actions: str) -> tuple[Kitchen, Hand]:
    kitchen = Kitchen(layout=layout, actions=actions)
    return kitchen, Hand(kitchen.unwrapped.model)  # type: ignore[attr-defined]


def _curve(path: Sequence[Waypoint], start: NDArray, generator: np.random.Generator) -> NDArray[np.float64]:
    """Poses (T, 10) of the hand, one for each step: position 3, z axis 3, x axis 3, fingers 1, from `start` on."""
    from scipy.interpolate import PchipInterpolator  # late: every program of LeRobot imports the tasks

    poses = np.array([[*point.position, *point.forward, *point.up, point.fingers] for point in path])
    poses[:, :3] += generator.normal(0, _JITTER, (len(path), 3))
    times = np.cumsum([point.steps for point in path]) * generator.uniform(*_PACE)
    curve = PchipInterpolator([0, *times], np.vstack([start, poses]))
    return curve(np.arange(1, np.ceil(times[-1]) + 1).clip(max=times[-1]))


class _Episode:
    """An episode under way: steers the hand by the environment's own actions, and keeps what it saw.

    Attributes:
        pose: where the hand was last sent, as `_curve` has it.
        over: whether no further step is to be taken.
    """

    def __init__(self, kitchen: Kitchen, hand: Hand, seed: int, actions: str) -> None:
        self._kitchen, self._hand, self._actions = kitchen, hand, actions
        self._frames: list[dict[str, NDArray]] = []
        self._outcomes: list[tuple[float, bool]] = []
        self._seen, self._info = kitchen.reset(seed=seed)
        self._target = self._joints[:ARM]
        self._correction: NDArray[np.float64] = np.zeros(3)
        place, turn = hand.pose(self._target)
        self.pose = np.concatenate([place, turn[:, 2], turn[:, 0], [OPEN]])
        self.over, self._left = False, STEPS

    def done(self, task: str) -> bool:
        """Whether the environment calls a task done."""
        return bool(self._info[f"done_{task}"])

    def follow(self, poses: Iterable[NDArray]) -> None:
        """Leads the hand along a curve, as far as the episode goes."""
        for pose in poses:
            if not self.over:
                self._steer(pose)

    def attempt(self) -> Attempt:
        """What the episode was."""
        columns = {name: np.array([frame[name] for frame in self._frames], np.float32) for name in self._frames[0]}
        reward, success = (np.array(values)[:, None] for values in zip(*self._outcomes, strict=True))
        done = np.arange(len(reward))[:, None] == len(reward) - 1
        columns |= {"next.reward": reward.astype(np.float32), "next.done": done, "next.success": success}
        progress = {name: value for name, value in self._info.items() if name.startswith("done_")}
        return Attempt(columns, TASK_DESCRIPTION, bool(self._info["is_success"]), progress)

    @property
    def _joints(self) -> NDArray[np.float64]:
        return self._seen["agent_pos"][:9].copy()

    def _steer(self, pose: NDArray) -> None:
        place, _ = self._hand.pose(self._joints[:ARM])
        self._correction = np.clip(self._correction + _GAIN * (self.pose[:3] - place), -_MOST, _MOST)
        self.pose = pose
        self._target = self._hand.reach(self._target, pose[:3] + self._correction, frame(pose[3:6], pose[6:9]))
        self._act(np.concatenate([self._target, [pose[9]] * 2]))

    def _act(self, target: NDArray) -> None:
        action = target if self._actions == "joint_targets" else np.clip((target - self._joints) / REACH, -1, 1)
        seen = {"observation.state": "agent_pos", "observation.environment_state": "environment_state"}
        self._frames.append({column: self._seen[name] for column, name in seen.items()} | {"action": action})
        self._seen, reward, ended, _, self._info = self._kitchen.step(action)
        self._outcomes.append((reward, self._info["is_success"]))
        self._left = min(self._left, _AFTER + 1 if self._info["is_success"] else STEPS) - 1
        self.over = ended or self._left == 0
