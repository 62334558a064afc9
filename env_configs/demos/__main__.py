"""Command line: `python -m env_configs.demos TASK --source STORE --root FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reader:
    """Who converts the demonstrations of a task.

    Attributes:
        module: has `convert(source, root, **options, **settings)`, which returns the numbers of episodes and frames.
        what: which demonstrations, in words.
        source: what `--source` names.
        options: further options of the command: name -> settings of argparse.
        settings: fixed arguments of `convert`.
    """

    module: str
    what: str
    source: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


_ROBOSUITE_OPTIONS: dict[str, dict[str, Any]] = {
    "actions": {
        "choices": ["absolute", "delta"],
        "default": "absolute",
        "help": "poses in the world's frame, or ways from the present pose as recorded",
    },
    "mask": {"default": None, "help": "take only the demonstrations that the file's mask/MASK lists"},
}

READERS = {
    "pusht": Reader(
        "env_configs.demos.pusht_zarr",
        "Diffusion Policy's Push-T replay buffer (zarr)",
        "the zarr store: a folder or a zip",
        {"obs": {"choices": ["state", "image"], "default": "state", "help": "8 keypoints of the T, or pixels"}},
    ),
    "kitchen": Reader(
        "env_configs.demos.kitchen",
        "Franka Kitchen: a zarr store, HDF5 of D4RL or Minari, or the .npy files of Relay Policy Learning",
        "a zarr store (folder or zip), an HDF5 file, or a folder with observations_seq.npy",
        {
            "layout": {"choices": ["relay", "d4rl"], "default": "relay", "help": "60 or 59 observed numbers"},
            "actions": {
                "choices": ["joint_targets", "velocity"],
                "default": "joint_targets",
                "help": "joint positions to go to, or velocities as recorded",
            },
        },
    ),
    **{
        name: Reader(
            "env_configs.demos.robomimic_hdf5",
            f"{task}: recordings of robomimic or robosuite",
            "the HDF5 file",
            _ROBOSUITE_OPTIONS,
            {"name": name},
        )
        for name, task in (("lift", "Lift"), ("handover", "TwoArmHandover"), ("transport", "TwoArmTransport"))
    },
}
"""Task -> its reader."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts the demonstrations of one task; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    reader = READERS[given.pop("task")]
    convert = import_module(reader.module).convert  # late: help need not wait for LeRobot
    try:
        episodes, frames = convert(**given, **reader.settings)
    except (ValueError, FileExistsError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given['root']}: {episodes} episodes, {frames} frames")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m env_configs.demos", description="Demonstrations to LeRobotDataset."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, reader in READERS.items():
        task = tasks.add_parser(name, help=reader.what, description=reader.what)
        task.add_argument("--source", type=Path, required=True, help=reader.source)
        task.add_argument("--root", type=Path, required=True, help="folder of the data set to write; must not exist")
        for option, settings in reader.options.items():
            task.add_argument(f"--{option}", **settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
