"""What is installed, what each task still needs, and the command that mends it.

Nothing is imported to find out: versions come from the metadata of the installed packages, and what a task
needs from this project's own.
"""

import ctypes.util
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from env_configs.extras import DISTRIBUTION, install_command
from env_configs.presets import PRESETS

EXTRAS = {
    "pusht": "pusht",
    "kitchen": "kitchen",
    "lift": "robosuite",
    "handover": "robosuite",
    "transport": "robosuite",
}
"""Task -> the extra that installs its simulator."""

PACKAGES = (
    *("torch", "torchvision", "lerobot", "torchdiffeq", "diffusers", "numpy", "gymnasium"),
    *("gym-pusht", "pymunk", "pygame", "shapely", "zarr"),
    *("mujoco", "gymnasium-robotics", "robosuite", "h5py"),
    *("cvxpy", "onnx", "onnxruntime"),
)

_LIBRARIES = {
    "egl": ("EGL", "apt install libegl1 libegl-mesa0 libgl1-mesa-dri"),
    "osmesa": ("OSMesa", "apt install libosmesa6"),
}
"""Value of MUJOCO_GL -> the system's library and the command that installs it on Debian and Ubuntu."""


def main(tasks: Sequence[str] = ()) -> int:
    """Prints the report.

    Args:
        tasks: names out of `EXTRAS`; none stands for all of them.

    Returns:
        0 if everything that the tasks need is installed, else 1.

    Raises:
        ValueError: a task is unknown.
    """
    unknown = [task for task in tasks if task not in EXTRAS]
    if unknown:
        raise ValueError(f"unknown task {', '.join(unknown)}; known are {', '.join(EXTRAS)}")
    troubles = {task: missing(EXTRAS[task]) for task in tasks or EXTRAS}
    print(_section("versions", _versions()))
    print(_section("rendering", _rendering()))
    print(_section("tasks", [_verdict(task, lacking) for task, lacking in troubles.items()]), end="")
    return int(any(troubles.values()))


def missing(extra: str) -> list[str]:
    """What the project with an extra asks for and is absent or of another version, in words; else empty."""
    if installed(DISTRIBUTION) is None:  # LeRobot finds policies and tasks by the installed distribution
        return [f"{DISTRIBUTION} is missing"]
    found = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    asked = [needed for needed in found if not needed.marker or needed.marker.evaluate({"extra": extra})]
    return [trouble for needed in asked if (trouble := _trouble(needed))]


def installed(package: str) -> str | None:
    """Version of an installed package; None if it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _trouble(needed: Requirement) -> str:
    have = installed(needed.name)
    if have is None:
        return f"{needed.name} is missing"
    return (
        "" if needed.specifier.contains(have, prereleases=True) else f"{needed.name} {have} is not {needed.specifier}"
    )


def _versions() -> list[tuple[str, str]]:
    python = [("python", f"{platform.python_version()} on {platform.platform()}")]
    return python + [(package, installed(package) or "-") for package in (DISTRIBUTION, *PACKAGES)]


def _rendering() -> list[tuple[str, str]]:
    chosen = os.environ.get("MUJOCO_GL")
    sdl = "pictures are drawn in memory: no display needed" if installed("pygame") else install_command("pusht")
    return [
        ("Push-T (SDL)", sdl),
        ("MUJOCO_GL", chosen or "not set (the MuJoCo tasks need it for pictures only: egl or osmesa)"),
        *((f"  {name}", _library(*library)) for name, library in _LIBRARIES.items()),
    ]


def _library(name: str, command: str) -> str:
    return ctypes.util.find_library(name) or f"not found: {command}"


def _verdict(task: str, lacking: list[str]) -> tuple[str, str]:
    if lacking:
        return task, f"{'; '.join(lacking)}: {install_command(EXTRAS[task])}"
    return task, "ready" if task in PRESETS else "simulator ready; the task is not part of this version yet"


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows), ""])
