"""The safety envelope: which observations a policy may see, and which actions a robot may get. Needs numpy alone.

Two kinds of trouble are told apart. A robot that does not fit the policy (a feature missing, of another shape or type)
raises `ConfigurationError`, but only until one observation has fitted. From then on nothing raises: trouble is an
event, counted in `Envelope.events` and logged, and the observation is refused or the action limited.

    misfit             an observation that no longer fits
    not_finite         NaN or infinity in an observation
    stale              an observation older than `max_age`, or as far in the future
    frozen             a camera that has repeated itself bit by bit for longer than `max_frozen`
    clock              the clock jumped backwards: ages, repetitions and velocities are measured anew from there; or it
                       told no time at all: then none has passed
    action_misfit      an action that has not one number for each of its dimensions, answered by the last one
    action_not_finite  an action with NaN or infinity, answered by the last one
    clipped            an action outside of the range of the data
    step_limited       an action further from the last one than a step, or the velocity, allows
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FALLBACKS = ("hold", "rest", "zero")
LIMITINGS = ("clipped", "step_limited")

Frame = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)


class ConfigurationError(ValueError):
    """Robot and policy do not belong together, or the settings make no sense."""


@dataclass(frozen=True)
class Limits:
    """What is allowed; numbers of an action in the robot's units, one for each of its dimensions.

    Args:
        low: Least action.
        high: Largest action.
        step: Largest change from one action to the next.
        velocity: Largest change per second, or None: no limit besides `step`.
        max_age: Seconds that an observation may be old, or None.
        max_frozen: Seconds that a camera may repeat itself, or None.
        deadline: Seconds that a chunk may take, or None; for the runner.
        fallback: What the runner does without a chunk: `hold` the last action, go on with the `rest` of the last chunk
            and then hold, or `zero`, for actions that are velocities or differences, where holding is no rest.
    """

    low: Sequence[float]
    high: Sequence[float]
    step: Sequence[float]
    velocity: Sequence[float] | None = None
    max_age: float | None = 0.5
    max_frozen: float | None = 1.0
    deadline: float | None = 0.5
    fallback: str = "hold"

    def __post_init__(self) -> None:
        names = ["low", "high", "step", *([] if self.velocity is None else ["velocity"])]
        numbers = {name: np.asarray(getattr(self, name), dtype=np.float64) for name in names}
        for name, value in numbers.items():
            if value.ndim != 1 or value.shape != numbers["low"].shape or not np.isfinite(value).all():
                raise ConfigurationError(f"limits: {name} needs a finite number for each of an action's, got {value}")
        if (numbers["low"] > numbers["high"]).any():
            raise ConfigurationError(f"limits: low must not exceed high, got {self.low} and {self.high}")
        for name in names[2:]:
            if (numbers[name] < 0).any():
                raise ConfigurationError(f"limits: {name} must not be negative, got {getattr(self, name)}")
        for name in ("max_age", "max_frozen", "deadline"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ConfigurationError(f"limits: {name} must be positive and finite, or null, got {seconds}")
        if self.fallback not in FALLBACKS:
            raise ConfigurationError(f"limits: fallback must be one of {list(FALLBACKS)}, got {self.fallback!r}")


class Envelope:
    """Checks observations and limits actions, one robot's, in the order of its control loop.

    Attributes:
        events: How often each kind of event happened.
        last: The last action, `(action_dim,)`, or None before the first one.
    """

    def __init__(
        self,
        features: Mapping[str, Mapping[str, Any]],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin an episode.

        Args:
            features: What an observation consists of: name to `kind`, `numbers` or `image`, and `shape`; an image is
                uint8, (height, width, channels).
            limits: What is allowed.
            clock: Seconds; timestamps of observations are read from the same clock.
        """
        self.features, self.limits, self.clock = features, limits, clock
        self.events: Counter[str] = Counter()
        self._cameras = [name for name, feature in features.items() if feature["kind"] == "image"]
        self._fits = False
        self._now = clock()
        self.reset()

    def reset(self, start: NDArray[Any] | Sequence[float] | None = None) -> None:
        """Begin an episode.

        Args:
            start: The action at which the robot rests now: the first step is measured from it, and it is held until
                there is another one. Without it the first action may be any within the range.

        Raises:
            ConfigurationError: If it is no action within the range; nothing has changed then.
        """
        rest = None if start is None else np.array(start, np.float64)
        low, high = (np.asarray(end, np.float64) for end in (self.limits.low, self.limits.high))
        if rest is not None and (rest.shape != low.shape or not ((low <= rest) & (rest <= high)).all()):
            raise ConfigurationError(f"the robot must start within {low} and {high}, got {rest}")
        self.last: NDArray[np.float64] | None = rest
        self._acted = self._time()
        self._pictures: Frame = {}
        self._changed: dict[str, float] = {}

    def count(self, event: str, detail: str) -> None:
        """Count an event and log it: what limits an action as information, everything else as a warning."""
        self.events[event] += 1
        logger.log(logging.INFO if event in LIMITINGS else logging.WARNING, "%s: %s", event, detail)

    def admit(self, observation: Mapping[str, Any] | None, timestamp: float | None = None) -> Frame | None:
        """Check an observation.

        Args:
            observation: One value for each feature; further ones are ignored.
            timestamp: When it was made, on the envelope's clock; its age is not checked without.

        Returns:
            A copy of the features, numbers as float32, or None: refused.

        Raises:
            ConfigurationError: If it does not fit the features, and none has before.
        """
        now = self._time()
        try:
            frame = {name: self._fit(name, observation) for name in self.features}
        except ConfigurationError as error:
            if not self._fits:
                raise
            self.count("misfit", str(error))
            return None
        self._fits = True
        frozen = [name for name in self._cameras if self._is_frozen(name, frame[name], now)]
        infinite = [name for name, value in frame.items() if not np.isfinite(value).all()]
        age = 0.0 if timestamp is None else now - timestamp
        if infinite:
            self.count("not_finite", f"{infinite} hold NaN or infinity")
        elif self.limits.max_age is not None and not abs(age) <= self.limits.max_age:
            self.count("stale", f"the observation is {age:.3f} s old, at most {self.limits.max_age} s are allowed")
        elif frozen:
            self.count("frozen", f"{frozen} have not changed for more than {self.limits.max_frozen} s")
        else:
            return frame
        return None

    def limit(self, action: NDArray[Any] | None) -> NDArray[np.float64] | None:
        """The nearest action that is allowed now, which becomes the last one.

        Args:
            action: `(action_dim,)` in the robot's units; None: the last one again.

        Returns:
            The action, in double precision, since rounding could exceed a limit; None if there is none to hold yet.
        """
        now = self._time()
        wanted = self.last if action is None else self._wanted(action)
        if wanted is None:
            return None
        allowed = np.clip(wanted, self.limits.low, self.limits.high)
        if (allowed != wanted).any():
            self.count("clipped", f"{wanted} to {allowed}")
        if self.last is not None:
            reach = self._reach(now)
            near = np.clip(allowed, self.last - reach, self.last + reach)
            if (near != allowed).any():
                self.count("step_limited", f"{allowed} to {near}, from {self.last}")
            allowed = near
        self._acted, self.last = now, allowed
        return allowed.copy()

    def _wanted(self, action: NDArray[Any]) -> NDArray[np.float64] | None:
        """The action in double precision; the last one in place of what is none."""
        try:
            wanted = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError):
            wanted = np.empty(0)
        if wanted.shape != np.shape(self.limits.low):
            self.count("action_misfit", f"{action!r} is not {len(self.limits.low)} numbers")
        elif not np.isfinite(wanted).all():
            self.count("action_not_finite", f"{wanted}")
        else:
            return wanted
        return self.last

    def _reach(self, now: float) -> NDArray[np.float64]:
        step = np.asarray(self.limits.step, dtype=np.float64)
        if self.limits.velocity is None:
            return step
        return np.minimum(step, np.asarray(self.limits.velocity) * (now - self._acted))

    def _fit(self, name: str, observation: Mapping[str, Any] | None) -> NDArray[Any]:
        """A copy of a feature, so that a buffer which a camera writes into again cannot change what was seen."""
        feature = self.features[name]
        value = observation.get(name) if isinstance(observation, Mapping) else None
        if value is None:
            raise ConfigurationError(f"the observation lacks '{name}'")
        try:
            array = np.array(value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"'{name}' is no array: {error}") from error
        shape, image = tuple(feature["shape"]), feature["kind"] == "image"
        fits = array.dtype == np.uint8 if image else array.dtype.kind in "fiu"
        if array.shape != shape or not fits:
            wanted = "uint8" if image else "real numbers"
            raise ConfigurationError(f"'{name}' must be {wanted} {shape}, got {array.dtype} {array.shape}")
        with np.errstate(over="ignore"):  # to infinity, which is refused
            return array if image else array.astype(np.float32)

    def _is_frozen(self, name: str, picture: NDArray[Any], now: float) -> bool:
        before = self._pictures.get(name)
        if before is None or not np.array_equal(before, picture):
            self._pictures[name], self._changed[name] = picture, now
        return self.limits.max_frozen is not None and now - self._changed[name] > self.limits.max_frozen

    def _time(self) -> float:
        now = self.clock()
        if not math.isfinite(now):
            self.count("clock", f"it says {now}")
            return self._now
        if now < self._now:
            self.count("clock", f"it went back by {self._now - now:.3f} s")
            self._acted = now
            self._changed = dict.fromkeys(self._changed, now)
        self._now = now
        return now
