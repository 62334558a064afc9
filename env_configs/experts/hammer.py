"""A hammer goes from hand to hand: picked up at one end of its handle, held out, taken at the other end."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_configs.experts.arm import SLOW, Hand, Pose, Step, Try, Vector, downward

_AT_HEAD, _AT_TAIL = 0.014, 0.008
"""Nearest that a hand's middle comes to the head and to the other end, m; a finger is 2 cm wide."""

_WALLS = 0.16
"""Height up to which walls may stand around a hammer, m."""

_APART = 0.11
"""Distance between the two hands on the handle where it is long enough, m."""


class Hammer:
    """The hammer in a simulation that has just been reset. Its far end is the one held out to the second hand.

    Attributes:
        handle: names of the handle's shapes.
        shapes: names of all its shapes.
    """

    def __init__(self, simulator: Any, model: Any):
        """Takes robosuite's environment and its model of the hammer."""
        self.handle, self.shapes = model.handle_geoms, model.contact_geoms
        self._data = simulator.sim.data
        self._geom = simulator.sim.model.geom_name2id(self.handle[0])
        self._half = float(simulator.sim.model.geom_size[self._geom][2])
        self._far = 1.0

    @property
    def position(self) -> Vector:
        """The middle of the handle, (3,), m."""
        return self._data.geom_xpos[self._geom].copy()

    @property
    def outward(self) -> Vector:
        """Unit vector (3,) along the handle towards the far end."""
        return self._far * self._data.geom_xmat[self._geom].reshape(3, 3)[:, 2]

    @property
    def near(self) -> Vector:
        """Where the first hand grips, (3,), m."""
        return self.position - min(_APART / 2, self._free(-self._far)) * self.outward

    @property
    def far(self) -> Vector:
        """Where the second hand grips, (3,), m."""
        return self.position + min(_APART / 2, self._free(self._far)) * self.outward

    def turn_far_end(self, front: Vector) -> None:
        """Takes for the far end the one that points to `front`."""
        if self.outward @ front < 0:
            self._far = -self._far

    def _free(self, end: float) -> float:
        return self._half - (_AT_HEAD if end > 0 else _AT_TAIL)


def pick_up(hand: Hand, hammer: Hammer, rise: float, rng: np.random.Generator, tries: int = 3) -> Try:
    """Grips the lying hammer near its near end and lifts it.

    Args:
        hand: the first hand.
        hammer: the hammer.
        rise: how high to lift, m.
        rng: decides the tilt and the height of the approach.
        tries: how often it is tried.

    Returns:
        Whether the hand has it.
    """
    for _ in range(tries):
        hammer.turn_far_end(hand.front)
        rotation = downward(hammer.outward, rng.uniform(0.05, 0.2))

        def goal(rotation: NDArray[np.float64] = rotation) -> Pose:
            return Pose(hammer.near, rotation)

        yield from hand.go(goal().up(rng.uniform(0.08, 0.12)), within=0.02)
        yield from hand.pause()
        yield from hand.go(goal, SLOW, within=0.006, patience=60)
        yield from hand.grip()
        start = Pose(hand.position, rotation)
        yield from hand.go(start.up(min(rise, _WALLS)), SLOW, within=0.03)  # fast, an arm sways into the walls
        yield from hand.go(start.up(rise), within=0.03)
        if hand.holds(hammer.shapes):
            return True
        yield from hand.let_go()
    return False


def hold_out(hand: Hand, hammer: Hammer, place: Vector, turn: float, tilt: float) -> Try:
    """Brings the hammer's middle to a place, its far end to the front.

    Args:
        hand: the hand that holds it.
        hammer: the hammer.
        place: (3,), m.
        turn: angle of the hand from its front about the vertical, rad.
        tilt: of the hand, rad.

    Returns:
        Whether the hand still has it.
    """
    c, s = np.cos(turn), np.sin(turn)
    rotation = downward(np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ hand.front, tilt)

    def goal() -> Pose:
        return Pose(hand.position + place - hammer.position, rotation)

    yield from hand.go(goal, within=0.02)
    return hand.holds(hammer.shapes)


def take(hand: Hand, hammer: Hammer, tilt: float, tries: int = 3) -> Try:
    """Grips the far end of the hammer that the other hand holds out.

    Returns:
        Whether the hand has its handle.
    """
    for _ in range(tries):

        def goal(back: float = 0.0) -> Pose:
            return Pose(hammer.far, downward(-hammer.outward, tilt)).back(back)

        yield from hand.go(lambda: goal(0.1), within=0.025)
        yield from hand.pause()
        yield from hand.go(goal, SLOW, within=0.008, patience=80)
        yield from hand.grip()
        if hand.holds(hammer.handle):
            return True
        yield from hand.let_go()
    return False


def release(hand: Hand, away: Callable[[], Pose]) -> Step:
    """Lets go of the hammer and draws back, the way the fingers point and then to a pose."""
    yield from hand.let_go()
    yield from hand.go(Pose(hand.position, hand.rotation).back(0.1), within=0.03)
    yield from hand.go(away(), within=0.05)
