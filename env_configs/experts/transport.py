"""Expert for TwoArmTransport: lid aside, hammer out of its bin, over to the other arm and into the target bin.

The second arm throws the trash away while the first one works.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_configs.experts.arm import SLOW, Hand, Pose, Try, Vector, downward
from env_configs.experts.attempt import Attempt
from env_configs.experts.hammer import Hammer, hold_out, pick_up, release, take
from env_configs.experts.two_arms import Script, perform

_ABOVE = 0.2
"""How far above the floor of a bin things are carried, m; its walls are 0.15 high."""


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
    place = np.array([rng.uniform(-0.04, 0.04), rng.uniform(-0.05, 0.02), rng.uniform(1.12, 1.18)])
    done: set[str] = set()

    def give() -> Try:
        if not (yield from _put_lid_aside(first, simulator, rng)):
            return False
        if not (yield from pick_up(first, hammer, rng.uniform(0.26, 0.3), rng)):
            return False
        if not (yield from hold_out(first, hammer, place, rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.4))):
            return False
        done.add("held out")
        yield from first.wait_until(lambda: "taken" in done)
        yield from first.pause()
        yield from release(first, lambda: Pose(first.position - 0.15 * first.front, first.rotation))
        done.add("let go")
        return True

    def receive() -> Try:
        if not (yield from _throw_away(second, simulator, rng)):
            return False
        ready = place - 0.2 * second.front + rng.uniform(-0.03, 0.03, 3)
        yield from second.go(Pose(ready, downward(second.front)).up(0.08), within=0.03)
        yield from second.wait_until(lambda: "held out" in done)
        if not (yield from take(second, hammer, rng.uniform(0.05, 0.25))):
            return False
        done.add("taken")
        yield from second.wait_until(lambda: "let go" in done)
        return (yield from _put_into(second, hammer, things.target_bin_pos))

    return give(), receive()


def _put_lid_aside(hand: Hand, simulator: Any, rng: np.random.Generator, tries: int = 3) -> Try:
    """Lifts the lid by its handle and lays it down beside the bin."""
    things = simulator.transport
    aside = np.array([rng.uniform(-0.2, -0.14), rng.uniform(-0.03, 0.03), 0.0])
    for _ in range(tries):
        rotation = downward(hand.front, rng.uniform(0.0, 0.1))
        start = Pose(np.array(things.lid_handle_pos), rotation)
        yield from hand.go(start.up(rng.uniform(0.07, 0.1)), within=0.02)
        yield from hand.go(start, SLOW, within=0.006, patience=60)
        yield from hand.grip()
        yield from hand.go(start.up(0.08), within=0.03)
        if hand.holds(things.lid.handle_geoms):
            above = Pose(_table(simulator, 0) + aside, rotation)
            yield from hand.go(Pose(np.array([*above.position[:2], hand.position[2]]), rotation), within=0.04)
            yield from hand.go(above.up(0.06), within=0.02, patience=60)
            yield from hand.let_go()
            yield from hand.go(Pose(hand.position, rotation).up(0.12), within=0.03)
            return True
        yield from hand.let_go()
    return False


def _throw_away(hand: Hand, simulator: Any, rng: np.random.Generator, tries: int = 3) -> Try:
    """Takes the trash out of the target bin and drops it into the trash bin."""
    things = simulator.transport
    for _ in range(tries):
        rotation = downward(_side(_rotation(simulator, things.trash.root_body), hand.front), rng.uniform(0.0, 0.1))
        trash = Pose(np.array(things.trash_pos), rotation)
        yield from hand.go(trash.up(_ABOVE), within=0.03)
        yield from hand.go(trash, SLOW, within=0.008, patience=80)
        yield from hand.grip()
        yield from hand.go(trash.up(_ABOVE), within=0.03)
        if hand.holds(things.trash.contact_geoms):
            over = Pose(np.array(things.trash_bin_pos), rotation).up(_ABOVE)
            yield from hand.go(over, within=0.03)
            yield from hand.go(over.up(-rng.uniform(0.02, 0.08)), within=0.03)
            yield from hand.let_go()
            yield from hand.go(over.up(0.05), within=0.05)
            return True
        yield from hand.let_go()
    return False


def _put_into(hand: Hand, hammer: Hammer, bin_position: Vector) -> Try:
    """Carries the hammer over a bin and lowers it until it may fall."""
    rotation = hand.rotation

    def over(height: float) -> Pose:
        return Pose(hand.position + np.array(bin_position) - hammer.position, rotation).up(height)

    yield from hand.go(lambda: over(_ABOVE + 0.1), within=0.04, patience=200)
    yield from hand.go(lambda: over(0.12), within=0.03)
    yield from hand.let_go()
    yield from hand.go(Pose(hand.position, rotation).up(0.15), within=0.03)
    return True


def _table(simulator: Any, number: int) -> Vector:
    """The middle of a table's top, (3,), m."""
    return np.array(simulator.table_offsets[number], dtype=np.float64)


def _rotation(simulator: Any, body: str) -> NDArray[np.float64]:
    return simulator.sim.data.get_body_xmat(body).reshape(3, 3).copy()


def _side(rotation: NDArray[np.float64], front: Vector) -> Vector:
    """Of the horizontal directions in which a cube's sides look, (3,), the one nearest to `front`."""
    sides = np.concatenate([rotation.T, -rotation.T])
    return sides[np.argmax(sides @ front)]
