"""Expert for TwoArmHandover: the first arm picks the hammer up and holds it out, the second takes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from env_configs.experts.arm import Hand, Pose, Step, downward, turned
from env_configs.experts.attempt import Attempt
from env_configs.experts.hammer import Hammer, bring, leave, take
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
    place = rng.uniform((-0.06, -0.09, 1.06), (0.06, -0.03, 1.1))
    tilts = rng.uniform(0.3, 0.5, 2)  # without a tilt neither arm reaches as far as the other one's hand
    held = Pose(place, downward(turned(first.front, rng.uniform(-0.25, 0.25)), tilts[0]))
    done: set[str] = set()

    def give() -> Step:
        yield from bring(first, hammer, rng.uniform(0.1, 0.16), held, rng)
        done.add("held out")
        yield from first.wait_until(lambda: "taken" in done)
        yield from leave(first)
        yield from first.go(Pose(first.position - 0.15 * first.front, first.rotation), within=0.05)

    def receive() -> Step:
        ready = place - 0.2 * second.front + rng.uniform(-0.03, 0.03, 3)
        yield from second.go(Pose(ready, downward(second.front, tilts[1])).up(0.08), within=0.03)
        yield from second.wait_until(lambda: "held out" in done)
        yield from take(second, hammer, tilts[1])
        done.add("taken")
        yield from second.wait(60)

    return give(), receive()
