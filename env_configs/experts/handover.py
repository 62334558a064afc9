"""Expert for TwoArmHandover: the first arm picks the hammer up and holds it out, the second takes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from env_configs.experts.arm import Hand, Pose, Try, downward
from env_configs.experts.attempt import Attempt
from env_configs.experts.hammer import Hammer, hold_out, pick_up, release, take
from env_configs.experts.two_arms import Script, perform


def attempt(seed: int, options: Mapping[str, str]) -> Attempt:
    """Tries the task once.

    Args:
        seed: of the start and of everything drawn here; one seed is one attempt.
        options: `actions`, "absolute" or "delta".

    Raises:
        ValueError: unknown `actions`.
        ModuleNotFoundError: robosuite or MuJoCo is not installed.
    """
    return perform("handover", _plan, seed, options)


def _plan(simulator: Any, first: Hand, second: Hand, rng: np.random.Generator) -> tuple[Script, Script]:
    hammer = Hammer(simulator, simulator.hammer)
    place = rng.uniform((-0.06, -0.06, 1.06), (0.06, 0.0, 1.12))
    done: set[str] = set()

    def give() -> Try:
        if not (yield from pick_up(first, hammer, rng.uniform(0.1, 0.16), rng)):
            return False
        if not (yield from hold_out(first, hammer, place, rng.uniform(-0.25, 0.25), rng.uniform(0.2, 0.4))):
            return False
        done.add("held out")
        yield from first.wait_until(lambda: "taken" in done)
        yield from first.pause()
        yield from release(first, lambda: Pose(first.position - 0.15 * first.front, first.rotation))
        return True

    def receive() -> Try:
        ready = place - 0.2 * second.front + rng.uniform(-0.03, 0.03, 3)
        yield from second.go(Pose(ready, downward(second.front)).up(0.08), within=0.03)
        yield from second.wait_until(lambda: "held out" in done)
        if not (yield from take(second, hammer, rng.uniform(0.05, 0.25))):
            return False
        done.add("taken")
        yield from second.wait(60)
        return True

    return give(), receive()
