"""Command line: `python -m env_configs.demos TASK --source STORE --root FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts the demonstrations of one task; returns the exit status."""
    options = _parser().parse_args(arguments)
    from env_configs.demos import pusht_zarr

    try:
        episodes, frames = pusht_zarr.convert(options.source, options.root, options.obs)
    except (ValueError, FileExistsError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.root}: {episodes} episodes, {frames} frames")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m env_configs.demos", description="Demonstrations to LeRobotDataset."
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    pusht = tasks.add_parser("pusht", help="Diffusion Policy's Push-T replay buffer (zarr)")
    pusht.add_argument("--source", type=Path, required=True, help="the zarr store: a folder or a zip")
    pusht.add_argument("--root", type=Path, required=True, help="folder of the data set to write; must not exist")
    pusht.add_argument("--obs", choices=["state", "image"], default="state", help="8 keypoints of the T, or pixels")
    return parser


if __name__ == "__main__":
    sys.exit(main())
