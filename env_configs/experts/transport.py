"""Expert for TwoArmTransport: lid aside, hammer out of its bin, over to the other arm and into the target bin.

The second arm throws the trash away while the first one works.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_configs.experts.arm import SLOW, GaveUpError, Hand, Pose, Step, Vector, downward, turned
from env_configs.experts.attempt import Attempt
from env_configs.experts.hammer import OFF_FLOOR, TRIES, Hammer, bring, leave, take
from env_configs.experts.two_arms import Script, perform

_ABOVE = 0.2
"""How far above the floor of a bin, or the table, things are carried, m; its walls are 0.15 high."""

_BOW = 0.15
"""How far to the front hands go around their own arm's base, m: near it, the elbow cannot fold enough."""

_ACROSS = 0.8
"""How far the hand turns before it lays the hammer into the bin, rad: it fits best from corner to corner."""


def attempt(seed: int, options: Mapping[str, str]) -> Attempt:
    """Tries the task once.

    Args:
        seed: of the start and of everything drawn here; one seed is one attempt.
        options: `actions`, "absolute" or "delta".

    Raises:
        ValueError: unknown `actions`.
        ModuleNotFoundError: robosuite or MuJoCo is not installed.
    """
    return perform("transport", _plan, seed, options)


def _plan(simulator: Any, first: Hand, second: Hand, rng: np.random.Generator) -> tuple[Script, Script]:
    things = simulator.transport
    hammer = Hammer(simulator, things.payload)
    place = rng.uniform((-0.04, -0.055, 1.04), (0.04, -0.015, 1.09))
    tilts = rng.uniform(0.25, 0.45, 2)  # without a tilt neither arm reaches as far as the other one's hand
    held = Pose(place, downward(turned(first.front, rng.uniform(-0.2, 0.2)), tilts[0]))
    done: set[str] = set()

    def give() -> Step:
        yield from _put_lid_aside(first, simulator, rng)
        yield from bring(first, hammer, rng.uniform(0.2, 0.24), held, rng)
        done.add("held out")
        yield from first.wait_until(lambda: "taken" in done)
        yield from leave(first)
        done.add("let go")
        yield from first.go(Pose(first.position - 0.15 * first.front, first.rotation), within=0.05)

    def receive() -> Step:
        yield from _throw_away(second, simulator, rng)
        ready = place - 0.2 * second.front + rng.uniform(-0.03, 0.03, 3)
        yield from second.go(Pose(ready, downward(second.front, tilts[1])).up(0.08), within=0.03)
        yield from second.wait_until(lambda: "held out" in done)
        yield from take(second, hammer, tilts[1])
        done.add("taken")
        yield from second.wait_until(lambda: "let go" in done)
        yield from _put_into(second, hammer, things.target_bin_pos, tilts[1])

    return give(), receive()


def _put_lid_aside(hand: Hand, simulator: Any, rng: np.random.Generator) -> Step:
    """Lifts the lid by its handle, lays it down beside the bin, and comes up again, away from its arm's base."""
    things = simulator.transport
    detour = np.array([0.0, 0.0, _ABOVE]) + _BOW * hand.front
    aside = _table(simulator, 0) + np.array([rng.uniform(-0.22, -0.18), rng.uniform(-0.03, 0.03), 0.06])
    for _ in range(TRIES):
        rotation = downward(hand.front, rng.uniform(0.0, 0.1))
        start = Pose(np.array(things.lid_handle_pos), rotation)
        yield from hand.go(start.up(rng.uniform(0.03, 0.05)), within=0.03)
        yield from hand.go(start, SLOW, within=0.01, patience=60)
        yield from hand.grip(things.lid.handle_geoms)
        yield from hand.go(start.up(0.05), within=0.03)
        if hand.holds(things.lid.handle_geoms):
            yield from hand.go(Pose(aside, rotation), within=0.03, detour=detour)
            yield from hand.let_go()
            yield from hand.go(Pose(aside + detour / 2, rotation), within=0.04)
            return
        yield from hand.let_go()
    raise GaveUpError


def _throw_away(hand: Hand, simulator: Any, rng: np.random.Generator) -> Step:
    """Takes the trash out of the target bin and drops it into the trash bin."""
    things = simulator.transport
    detour = np.array([0.0, 0.0, _ABOVE]) + _BOW * hand.front
    for _ in range(TRIES):
        rotation = downward(_side(_rotation(simulator, things.trash.root_body), hand.front), rng.uniform(0.0, 0.1))
        trash = Pose(np.array(things.trash_pos), rotation).up(OFF_FLOOR)
        yield from hand.go(trash.up(rng.uniform(0.05, 0.07)), within=0.03, detour=detour)
        yield from hand.go(trash, SLOW, within=0.01, patience=80)
        yield from hand.grip(things.trash.contact_geoms)
        yield from hand.go(trash.up(_ABOVE), within=0.03)
        if hand.holds(things.trash.contact_geoms):
            over = Pose(np.array(things.trash_bin_pos), rotation).up(_ABOVE)
            yield from hand.go(over, within=0.04, detour=_BOW * hand.front)
            yield from hand.let_go()
            return
        yield from hand.let_go()
    raise GaveUpError


def _put_into(hand: Hand, hammer: Hammer, bin_position: Vector, tilt: float) -> Step:
    """Carries the hammer over a bin, across it, and lowers it until it may fall."""
    rotation = downward(turned(hand.front, _ACROSS), tilt)

    def over(height: float) -> Pose:
        return Pose(hand.position + np.array(bin_position) - hammer.position, rotation).up(height)

    yield from hand.go(lambda: over(_ABOVE + 0.05), within=0.04)
    yield from hand.go(lambda: over(0.12), within=0.03)
    yield from hand.let_go()
    yield from hand.go(Pose(hand.position, rotation).up(0.15), within=0.03)


def _table(simulator: Any, number: int) -> Vector:
    """The middle of a table's top, (3,), m."""
    return np.array(simulator.table_offsets[number], dtype=np.float64)


def _rotation(simulator: Any, body: str) -> NDArray[np.float64]:
    return simulator.sim.data.get_body_xmat(body).reshape(3, 3).copy()


def _side(rotation: NDArray[np.float64], front: Vector) -> Vector:
    """Of the horizontal directions in which a cube's sides look, (3,), the one nearest to `front`."""
    sides = np.concatenate([rotation.T, -rotation.T])
    return sides[np.argmax(sides @ front)]
