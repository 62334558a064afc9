"""Random observations through a runner, good and bad, on a clock that jumps: does any action leave its limits?"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fm_policy.deploy.envelope import FALLBACKS
from fm_policy.deploy.runner import Compute, Runner, blank, onnx_session, read_settings

EPISODE = 50
"""Ticks between two resets."""
PERIOD = 0.1
"""Seconds of a tick, where the clock does not jump."""
ROUNDING = 1e-12
"""Of a difference of two actions, by the size of the limits."""
BAD = 0.3
"""Share of observations, and of chunks, that something is wrong with."""


@dataclass
class Result:
    """What came out.

    Attributes:
        observations: How many there were.
        actions: How many were answered by an action, and not by None.
        events: Of the runners.
        violations: Every action that left its limits, in words; should be empty.
    """

    observations: int
    actions: int = 0
    events: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def fuzz(folder: Path, observations: int, seed: int = 0) -> Result:
    """Drive an exported folder's runner, with each kind of fallback, with and without a limit of the velocity.

    Args:
        folder: The folder.
        observations: How many.
        seed: Of them, and of what is wrong with them.
    """
    settings, result = read_settings(folder), Result(observations)
    compute = onnx_session(folder, settings, threads=1)
    kinds = [(fallback, velocity) for fallback in FALLBACKS for velocity in (None, settings["limits"]["step"])]
    for i, (fallback, velocity) in enumerate(kinds):
        limits = settings["limits"] | {"fallback": fallback, "velocity": velocity, "deadline": None}
        trial = Trial(settings | {"limits": limits}, compute, np.random.default_rng([seed, i]))
        for _ in range(i, observations, len(kinds)):
            trial.tick(result)
        result.events += trial.runner.events
    return result


class Trial:
    """A runner with its clock, and what it is driven through."""

    def __init__(self, settings: dict[str, Any], compute: Compute, rng: np.random.Generator) -> None:
        self.rng, self.compute, self.now, self.ticks = rng, compute, 0.0, 0
        self.runner = Runner(settings, self._chunk, noise=rng.standard_normal, clock=lambda: self.now)
        self.runner.act(blank(settings))  # from the first observation that fits, nothing raises
        limits = self.runner.envelope.limits
        self.low, self.high, self.step = (np.asarray(numbers) for numbers in (limits.low, limits.high, limits.step))
        self.velocity = None if limits.velocity is None else np.asarray(limits.velocity)
        self.frame = blank(settings)

    def tick(self, result: Result) -> None:
        """One observation, and a look at the action that answers it."""
        if self.ticks % EPISODE == 0:
            # Every other episode starts from a known action.
            start = self.rng.uniform(self.low, self.high) if self.ticks % (2 * EPISODE) else None
            self.runner.reset(start)
        before, then = self.runner.envelope.last, self.now
        self.now += self.rng.choice([PERIOD, PERIOD * self.rng.random(), 1e3, -1e3], p=[0.9, 0.08, 0.01, 0.01])
        self.ticks += 1
        action = self.runner.act(self._observation(), self._timestamp())
        if action is None:
            return
        result.actions += 1
        if not ((self.low <= action) & (action <= self.high)).all():
            result.violations.append(f"tick {self.ticks}: {action} is not within {self.low} and {self.high}")
        if before is not None:
            reach = self.step
            if self.velocity is not None:
                reach = np.minimum(reach, self.velocity * max(0.0, self.now - then))
            if (np.abs(action - before) > reach + ROUNDING * np.abs(self.high)).any():
                result.violations.append(f"tick {self.ticks}: {action} is further than {reach} from {before}")

    def _timestamp(self) -> float | None:
        ages = [None, 0.0, 0.1, -0.1, 10.0, -10.0, math.nan, math.inf]
        age = ages[self.rng.choice(len(ages), p=[0.3, 0.3, 0.2, 0.1, 0.03, 0.03, 0.02, 0.02])]
        return None if age is None else self.now - age

    def _observation(self) -> Any:
        if self.rng.random() > 0.2:  # else it repeats itself
            self.frame = {name: self._feature(value) for name, value in self.frame.items()}
        if self.rng.random() > BAD:
            return self.frame
        name = self.rng.choice(list(self.frame))
        wrong = self._wrong(self.frame[name])
        choice = int(self.rng.integers(len(wrong) + 2))
        return [*({**self.frame, name: value} for value in wrong), None, {}][choice]

    def _wrong(self, value: NDArray[Any]) -> list[Any]:
        """A feature, spoilt in every way: its numbers, its type, its shape."""
        spoilt = [value.astype(np.float64) for _ in range(5)]
        for array, number in zip(spoilt, (np.nan, np.inf, -np.inf, 1e30, 1e300), strict=True):
            array.flat[self.rng.integers(array.size)] = number
        types = [None, "text", value.astype(str), value.astype(complex), value.astype(object), value > 0]
        return [*spoilt, *types, value[..., None], value[:0], [[1.0], [2.0, 3.0]]]

    def _feature(self, value: NDArray[Any]) -> NDArray[Any]:
        if value.dtype == np.uint8:
            return self.rng.integers(256, size=value.shape, dtype=np.uint8)
        return (self.rng.standard_normal(value.shape) * 10.0 ** self.rng.integers(-3, 6)).astype(np.float32)

    def _chunk(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        if self.rng.random() > BAD:
            return self.compute(inputs)
        kind = self.rng.integers(4)
        if kind == 0:
            raise RuntimeError("a fault in the graph")
        chunk = self.compute(inputs) * self.rng.choice([1e3, -1e3, 1e30])
        if kind == 1:
            chunk[self.rng.integers(len(chunk))] = self.rng.choice([np.nan, np.inf])
        return chunk
