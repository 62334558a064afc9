"""Work in slices of time: a clock, and files of tensors that are there whole or not at all.

Knows torch and safetensors only.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file, and the folders above it; each entry of `about` becomes JSON in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(file.name + ".part")
    contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contents, draft, {name: json.dumps(value) for name, value in about.items()})
    os.replace(draft, file)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of such a file.

    Raises:
        OSError: If it cannot be read.
        safetensors.SafetensorError: If it is no safetensors file, or cut off.
        ValueError: If its metadata are no JSON.
    """
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(value) for name, value in (opened.metadata() or {}).items()}


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
