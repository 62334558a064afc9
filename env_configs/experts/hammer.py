"""A hammer goes from hand to hand: picked up near the middle, held out, taken at the end of its handle."""

from typing import Any

import numpy as np

from env_configs.experts.arm import SLOW, GaveUpError, Hand, Pose, Step, Try, Vector, downward

_AT_HEAD, _AT_TAIL = 0.014, 0.008
"""Nearest that a hand's middle comes to the head and to the other end, m; a finger is 2 cm wide."""

_OVER_WALLS, _BOW = 0.16, 0.15
"""How far up and to the front a hand goes around the walls that may stand by a hammer and its own arm's base, m."""

_OUT, _APART = 0.08, 0.11
"""Distances of the second hand from the handle's middle and between the hands, m, where the handle is long enough."""

OFF_FLOOR = 0.007
"""How far above the middle of a lying thing it is gripped, m: the tips would rub along the floor."""

TRIES = 3
"""How often a hand tries before it gives up."""


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
        """Where the first hand grips, (3,), m: not so near to its arm's base that its elbow cannot fold enough."""
        return self.position + max(self._out - _APART, -self._free(-self._far)) * self.outward

    @property
    def far(self) -> Vector:
        """Where the second hand grips, (3,), m."""
        return self.position + self._out * self.outward

    def turn_far_end(self, front: Vector) -> None:
        """Takes for the far end the one that points to `front`."""
        if self.outward @ front < 0:
            self._far = -self._far

    @property
    def _out(self) -> float:
        return min(_OUT, self._free(self._far))

    def _free(self, end: float) -> float:
        return self._half - (_AT_HEAD if end > 0 else _AT_TAIL)


def bring(hand: Hand, hammer: Hammer, rise: float, held: Pose, rng: np.random.Generator) -> Step:
    """Picks the hammer up and holds it out; what falls on the way is picked up again.

    Args:
        hand: the first hand.
        hammer: the hammer.
        rise: how high to lift, m.
        held: see `hold_out`.
        rng: see `pick_up`.

    Raises:
        GaveUpError: the hammer was not brought.
    """
    for _ in range(TRIES):
        if (yield from pick_up(hand, hammer, rise, rng)) and (yield from hold_out(hand, hammer, held)):
            return
        yield from hand.let_go()
    raise GaveUpError


def pick_up(hand: Hand, hammer: Hammer, rise: float, rng: np.random.Generator) -> Try:
    """Grips the lying hammer and lifts it.

    Args:
        hand: the first hand.
        hammer: the hammer.
        rise: how high to lift, m.
        rng: decides the tilt and the height of the approach.

    Returns:
        Whether the hand has it.
    """
    hammer.turn_far_end(hand.front)
    rotation = downward(hammer.outward, rng.uniform(-0.15, -0.05))
    detour = np.array([0.0, 0.0, _OVER_WALLS]) + _BOW * hand.front
    height = rng.uniform(0.05, 0.07)

    def goal() -> Pose:
        return Pose(hammer.near, rotation).up(OFF_FLOOR)

    yield from hand.go(lambda: goal().up(height), within=0.03, detour=detour)
    yield from hand.pause()
    yield from hand.go(goal, SLOW, within=0.01, patience=60)
    yield from hand.grip(hammer.handle)
    yield from hand.go(Pose(hand.position, rotation).up(rise), within=0.03, patience=60)
    return hand.holds(hammer.shapes)


def hold_out(hand: Hand, hammer: Hammer, held: Pose) -> Try:
    """Brings the hammer to where the other hand can take it.

    Args:
        hand: the hand that holds it.
        hammer: the hammer.
        held: the position of the hammer's middle and the rotation of the hand.

    Returns:
        Whether the hand still has it.
    """

    def goal() -> Pose:
        return Pose(hand.position + held.position - hammer.position, held.rotation)

    yield from hand.go(goal, within=0.03)
    return hand.holds(hammer.shapes)


def take(hand: Hand, hammer: Hammer, tilt: float) -> Step:
    """Grips the far end of the hammer that the other hand holds out.

    Raises:
        GaveUpError: the hand did not get it.
    """
    for _ in range(TRIES):

        def goal(back: float = 0.0) -> Pose:
            return Pose(hammer.far, downward(-hammer.outward, tilt)).back(back)

        yield from hand.go(lambda: goal(0.1), within=0.025)
        yield from hand.pause()
        yield from hand.go(goal, SLOW, within=0.012, patience=60)
        yield from hand.grip(hammer.handle)
        if hand.holds(hammer.handle):
            return
        yield from hand.let_go()
    raise GaveUpError


def leave(hand: Hand) -> Step:
    """Leaves the hammer to the other hand: straight up, or the head would catch on the fingers."""
    yield from hand.let_go()
    yield from hand.go(Pose(hand.position, hand.rotation).up(0.1), within=0.04)
