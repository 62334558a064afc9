"""Command line: `python -m env_configs.demos TASK --source STORE --root FOLDER`, or `--scripted` for a source."""

import argparse
import os
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
        scripted: whether the task has a scripted expert, see `scripted.EXPERTS`.
    """

    module: str
    what: str
    source: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    scripted: bool = False


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
        {
            "obs": {"choices": ["state", "image"], "default": "state", "help": "8 keypoints of the T, or pixels"},
            "mirror": {
                "action": "store_true",
                "help": "write each demonstration twice, as recorded and mirrored about the target's axis; "
                "--dataset.eval_split=0.053 then holds out whole pairs",
            },
        },
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
        scripted=True,
    ),
    **{
        name: Reader(
            "env_configs.demos.robomimic_hdf5",
            f"{task}: recordings of robomimic or robosuite",
            "the HDF5 file",
            _ROBOSUITE_OPTIONS,
            {"name": name},
            scripted=name != "lift",
        )
        for name, task in (("lift", "Lift"), ("handover", "TwoArmHandover"), ("transport", "TwoArmTransport"))
    },
    "motors": Reader(
        "env_configs.demos.motors",
        "any task's data set as a robot would have recorded it: every observed number is a motor",
        "the folder of the LeRobotDataset",
    ),
}
"""Task -> its reader; and `motors`, of every task."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts or records the demonstrations of one task; returns the exit status."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    try:
        episodes, frames = _record(given, parser) if given.pop("scripted", False) else _convert(given, parser)
    except (ValueError, FileExistsError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given['root']}: {episodes} episodes, {frames} frames")
    return 0


def _convert(given: dict[str, Any], parser: argparse.ArgumentParser) -> tuple[int, int]:
    for name in _RECORDING:
        if given.pop(name, None) is not None:
            parser.error(f"--{name} belongs to --scripted, not to --source")
    reader = READERS[given.pop("task")]
    return import_module(reader.module).convert(**given, **reader.settings)  # late: help need not wait for LeRobot


def _record(given: dict[str, Any], parser: argparse.ArgumentParser) -> tuple[int, int]:
    if given.pop("mask", None) is not None:
        parser.error("--mask belongs to --source, not to --scripted")
    from env_configs.demos.scripted import record, recording_of

    chosen = {name: default if given[name] is None else given[name] for name, (default, _) in _RECORDING.items()}
    options = {name: given[name] for name in READERS[given["task"]].options if name in given}
    return record(recording_of(given["task"], options), given["root"], **chosen)


_RECORDING = {
    "episodes": (100, "successes that are recorded (default 100)"),
    "seed": (0, "of the first attempt; the next ones follow (default 0)"),
    "workers": (os.cpu_count() or 1, "processes (default: the number of cores)"),
}
"""Options of a recording: name -> default and help."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m env_configs.demos", description="Demonstrations to LeRobotDataset."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, reader in READERS.items():
        task = tasks.add_parser(name, help=reader.what, description=reader.what)
        origin = task.add_mutually_exclusive_group(required=True)
        origin.add_argument("--source", type=Path, help=reader.source)
        if reader.scripted:
            origin.add_argument("--scripted", action="store_true", help="record the scripted expert instead")
            for option, (_, what) in _RECORDING.items():
                task.add_argument(f"--{option}", type=int, help=f"with --scripted: {what}")
        task.add_argument("--root", type=Path, required=True, help="folder of the data set to write; must not exist")
        for option, settings in reader.options.items():
            task.add_argument(f"--{option}", **settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
