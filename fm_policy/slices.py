"""Work in slices of time: a clock, and a look at whose work it is that would be gone on with."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SAVE_SECONDS = 120.0
"""Most of the work that a kill can lose."""


class TimeIsUpError(Exception):
    """The program's minutes are over; what was done is saved."""


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float | None = None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def is_up(self) -> bool:
        """Whether it is all spent."""
        return time.monotonic() >= self._end


def check_settings(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse what other settings made.

    Raises:
        ValueError: If they differ, naming the first twenty that do.
    """
    there, here = dict(_leaves(found)), dict(_leaves(json.loads(json.dumps(wanted))))
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differing:
        told = ", ".join(f"{name} {there.get(name)!r} instead of {here.get(name)!r}" for name in differing[:20])
        raise ValueError(f"{file} was made with {told}: choose another --out, or remove it")


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield above + name, value
