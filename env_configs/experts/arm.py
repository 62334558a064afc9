"""What one arm's hand does: goes to a pose, grips, lets go. Each is a generator of one command for each step.

A command (7,) is a way from the present pose, as robosuite's delta actions have it but in m and rad: position 3, axis
times angle 3, then the gripper, -1 opens, 1 closes. The way is at most what a delta action can ask for, so both kinds
of actions say the same; and as it leads from where the hand is, what the hand does follows from what is observed.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Step = Generator[Vector, None, None]
"""Something the hand does."""
Try = Generator[Vector, None, bool]
"""Something the hand does that tells whether it came off."""

OPEN, CLOSED = -1.0, 1.0

FAST, SLOW = 0.05, 0.02
"""Longest ways of one command, m. The hand settles at some six times as much for each second."""

_TURN = 0.15
"""Longest turn of one command, rad. A delta action can ask for 0.5, but then a folded arm's hand sways by 10 cm."""

_GAIN = 2.0
"""Way commanded for each way that is left. With 1 the joints' friction stops the hand 1 to 2.5 cm short."""

_SURGE = 0.01
"""Most that the way of a command grows from one step to the next, m."""

_CREEP, _CREEP_AT_MOST, _NEAR = 0.15, 0.02, 0.03
"""Share of what is left that is added with each step (at most 2 cm) once the hand is near (m): the rest of friction."""

_STILL = 0.002
"""Way of one step up to which friction holds the hand, m; to add up what is left while it moves would overshoot."""

_OVER, _BOW = 0.01, 0.09
"""How far a hand on a detour is from its last, straight leg when it turns into it, and how much farther before, m."""

_FINGERS, _FIRM, _FREE = 12, 2, 6
"""Steps in which the fingers close, after which what they touch is held, and in which they open enough to leave."""


class GaveUpError(Exception):
    """A hand has tried something as often as it may; the attempt has failed."""


@dataclass(frozen=True)
class Pose:
    """A pose of the grip site in the world's frame.

    Attributes:
        position: (3,), m.
        rotation: (3, 3); the fingers move along its first column and point along its third.
    """

    position: Vector
    rotation: NDArray[np.float64]

    def back(self, way: float) -> "Pose":
        """The pose from which the fingers come here by going `way` (m) straight on."""
        return Pose(self.position - way * self.rotation[:, 2], self.rotation)

    def up(self, way: float) -> "Pose":
        """The pose that is `way` (m) higher."""
        return Pose(self.position + np.array([0.0, 0.0, way]), self.rotation)

    def by_way_of(self, detour: Vector, hand: Vector) -> "Pose":
        """The pose displaced by `detour` (3,), m, or by less where `hand` (3,) is near the line from there to here."""
        aside = float(np.linalg.norm(np.cross(detour, hand - self.position)) / np.linalg.norm(detour))
        share = min(1.0, max(0.0, aside - _OVER) / _BOW)
        return Pose(self.position + share * detour, self.rotation)


def downward(facing: Vector, tilt: float = 0.0) -> NDArray[np.float64]:
    """The rotation (3, 3) of a hand that points down, its back behind it and its fingers moving sideways.

    Args:
        facing: (3,), where the hand's front looks; only its horizontal direction counts.
        tilt: angle by which the fingers point forward, rad.
    """
    ahead = np.array([facing[0], facing[1], 0.0]) / np.hypot(facing[0], facing[1])
    sideways = np.array([-ahead[1], ahead[0], 0.0])
    along = np.sin(tilt) * ahead - np.cos(tilt) * np.array([0.0, 0.0, 1.0])
    return np.stack([sideways, np.cross(along, sideways), along], axis=1)


def turned(direction: Vector, angle: float) -> Vector:
    """A direction (3,) turned about the vertical by an angle, rad."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ direction


class Hand:
    """One arm's hand in a simulation that has just been reset.

    Attributes:
        front: (3,), horizontal, from its arm's base to the other's.
    """

    def __init__(self, simulator: Any, arm: int, rng: np.random.Generator):
        """Takes hold of robosuite's environment.

        Args:
            simulator: robosuite's environment.
            arm: 0 or 1.
            rng: decides how long the hand pauses, and how fast it is.
        """
        self.front = np.array([0.0, 1.0 if arm == 0 else -1.0, 0.0])
        self._simulator, self._robot, self._rng = simulator, simulator.robots[arm], rng
        self._site = self._robot.eef_site_id["right"]
        self._goal = Pose(self.position, self.rotation)
        self._grip = OPEN
        self._last = self.position
        self._way: Vector = np.zeros(3)
        self._creep: Vector = np.zeros(3)
        self._pace = rng.uniform(0.85, 1.0)

    @property
    def position(self) -> Vector:
        """Where the grip site is, (3,), m."""
        return self._simulator.sim.data.site_xpos[self._site].copy()

    @property
    def rotation(self) -> NDArray[np.float64]:
        """How the grip site is turned, (3, 3)."""
        return self._simulator.sim.data.site_xmat[self._site].reshape(3, 3).copy()

    def holds(self, shapes: list[str]) -> bool:
        """Whether both fingertips touch one of these shapes."""
        return bool(self._simulator._check_grasp(self._robot.gripper, shapes))

    def stay(self) -> Vector:
        """The command that keeps to the last goal."""
        return self._towards(self._goal, SLOW)

    def go(
        self,
        goal: Pose | Callable[[], Pose],
        longest: float = FAST,
        within: float = 0.015,
        patience: int = 120,
        detour: Vector | None = None,
    ) -> Try:
        """Goes to a pose.

        Args:
            goal: the pose, or what tells it anew for each step.
            longest: longest way of one command, m: the speed.
            within: how near is near enough, m; and ten times as much in rad.
            patience: steps after which the hand gives up.
            detour: (3,), m, by how much the hand comes in a bow around what stands in the way.

        Returns:
            Whether it is there.
        """
        for _ in range(patience):
            target = goal() if callable(goal) else goal
            if self._is_at(target, within):
                return True
            yield self._towards(target if detour is None else target.by_way_of(detour, self.position), longest)
        return False

    def grip(self, shapes: list[str]) -> Step:
        """Closes the fingers until they hold one of these shapes, or are closed."""
        self._grip = CLOSED
        for _ in range(_FINGERS):
            yield self.stay()
            if self.holds(shapes):
                break
        yield from self.wait(_FIRM)

    def let_go(self, steps: int = _FREE) -> Step:
        """Opens the fingers."""
        self._grip = OPEN
        yield from self.wait(steps)

    def wait(self, steps: int) -> Step:
        """Keeps to the last goal."""
        for _ in range(steps):
            yield self.stay()

    def wait_until(self, happened: Callable[[], bool]) -> Step:
        """Keeps to the last goal until something is so."""
        while not happened():
            yield self.stay()

    def pause(self, most: int = 3) -> Step:
        """Keeps to the last goal for up to `most` steps."""
        yield from self.wait(int(self._rng.integers(most + 1)))

    def _is_at(self, goal: Pose, within: float) -> bool:
        near = np.linalg.norm(goal.position - self.position) < within
        return bool(near and np.linalg.norm(self._turn_to(goal)) < 10 * within)

    def _turn_to(self, goal: Pose) -> Vector:
        from scipy.spatial.transform import Rotation  # late: every program of LeRobot imports the tasks

        return Rotation.from_matrix(goal.rotation @ self.rotation.T).as_rotvec()

    def _towards(self, goal: Pose, longest: float) -> Vector:
        """The command that leads towards a pose: faster from step to step, slower as it comes near."""
        if np.linalg.norm(goal.position - self._goal.position) > _NEAR:
            self._creep = np.zeros(3)
        moved = float(np.linalg.norm(self.position - self._last))
        self._goal, self._last = goal, self.position
        left = goal.position - self.position
        if np.linalg.norm(left) < _NEAR and moved < _STILL:
            self._creep = _at_most(self._creep + _CREEP * left, _CREEP_AT_MOST)
        wanted = _at_most(_GAIN * left, self._pace * longest)
        self._way = self._way + _at_most(wanted - self._way, _SURGE)
        way = np.clip(self._way + self._creep, -FAST, FAST)
        return np.concatenate([way, _at_most(_GAIN * self._turn_to(goal), _TURN), [self._grip]])


def _at_most(vector: Vector, length: float) -> Vector:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
