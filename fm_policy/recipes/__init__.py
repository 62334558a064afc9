"""The recipes: LeRobot training configurations that pin every hyper-parameter of a result.

Each file is in LeRobot's own `--config_path` format, so it also works without this package's command line:

    lerobot-train --config_path=fm_policy/recipes/pusht_state.json --dataset.repo_id=lerobot/pusht_keypoints

A file is named `<env>_<obs>.json`, or `<env>_<obs>_<net>.json` where the velocity net is not the task's
default one. Adding a recipe means adding a file: the command line reads the names.
"""

from pathlib import Path
from typing import NamedTuple

DEFAULT_NET = "unet"


class RecipeKey(NamedTuple):
    """What a recipe is for: the task, the kind of observation, and the velocity net."""

    env: str
    obs: str
    net: str = DEFAULT_NET


def available() -> dict[RecipeKey, Path]:
    """Return the path of every recipe in this folder, by what it is for."""
    files = sorted(Path(__file__).parent.glob("*.json"))
    return {RecipeKey(*file.stem.split("_")): file for file in files}
