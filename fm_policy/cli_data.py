"""Which demonstrations the command line trains on."""

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from fm_policy import recipes
from fm_policy.cli_usage import UsageError, value_of
from fm_policy.sources import source_fingerprint

# Where the folder FM_DATA keeps the human demonstrations of each task.
HUMAN_DEMOS = {
    "pusht": "pusht/pusht_cchi_v7_replay.zarr.zip",
    "kitchen": "kitchen/kitchen_complete_v2.zarr.zip",
    "lift": "robomimic/lift_ph_10demos_low_dim.hdf5",
    "handover": "robomimic/two_arm_handover_7demos.hdf5",
    "transport": "robomimic/transport_ph_low_dim.hdf5",
}
SHIPPED_DEMOS = ("pusht",)


def choose_data(key: recipes.RecipeKey, features: Collection[str] | None, flags: Sequence[str]) -> list[str]:
    """Return flags that name the demonstrations, none where `flags` do; say which ones are taken and why.

    Args:
        key: What is trained.
        features: The features that it learns from, if they are known.
        flags: LeRobot's flags from the command line.

    Raises:
        UsageError: The demonstrations lack a feature, or could not be converted.
    """
    for flag in ("dataset.repo_id", "dataset.root"):
        named = value_of(flags, flag)
        if named is not None:
            print(f"Data: {named}, as --{flag} says.", flush=True)
            return []
    root, why = _human_demos(key) or _shipped_demos(key.env)
    print(f"Data: {root}, {why}.", flush=True)
    _check_features(root, features or ())
    return [f"--dataset.repo_id=local/{root.name}", f"--dataset.root={root}"]


def _human_demos(key: recipes.RecipeKey) -> tuple[Path, str] | None:
    source = _human_source(key.env)
    if source is None or not source.is_file():
        return None
    options = _options(key)
    mirrored = " and their mirror images" if "--mirror" in options else ""
    root = _convert_once(source, key, options)
    return root, f"the human demonstrations{mirrored} of {source}, which FM_DATA leads to"


def _human_source(env: str) -> Path | None:
    folder = os.environ.get("FM_DATA")
    return Path(folder).absolute() / HUMAN_DEMOS[env] if folder and env in HUMAN_DEMOS else None


def _shipped_demos(env: str) -> tuple[Path, str]:
    from fm_policy.assets import default_demos

    folder = os.environ.get("FM_DATA")
    reason = f"FM_DATA={folder} holds none of this task" if folder else "FM_DATA is not set"
    if env not in SHIPPED_DEMOS:
        raise UsageError(
            f"no demonstrations of {env} ship with fm_policy, and {reason}: set FM_DATA to a folder that holds "
            f"{HUMAN_DEMOS[env]}, or name a data set by --dataset.repo_id=... (python -m env_configs.demos {env} -h)"
        )
    return default_demos(), f"the demonstrations shipped with fm_policy; for human ones, {reason}"


def _options(key: recipes.RecipeKey) -> list[str]:
    """Of the conversion, where the task has them: what is observed, and every demonstration mirrored, too."""
    from env_configs.demos.__main__ import READERS

    wanted = {"obs": f"--obs={key.obs}", "mirror": "--mirror"}
    return [flag for option, flag in wanted.items() if option in READERS[key.env].options]


def _convert_once(source: Path, key: recipes.RecipeKey, options: list[str]) -> Path:
    """Return the LeRobotDataset made from `source`, converted unless this very file was converted so before.

    The folder's name carries the fingerprint of the file, of the options and of the code that converts it, and the
    converter writes it whole or not at all, so that a folder that exists is the right one. Of several runs that
    start together one converts and the others wait.
    """
    from filelock import FileLock
    from lerobot.utils.constants import HF_LEROBOT_HOME

    root = HF_LEROBOT_HOME / "fm_ft" / f"{key.env}_{key.obs}_{_fingerprint(source, options)}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f"{root.name}.lock")):
        if not root.exists():
            _convert(key.env, source, root, options)
    return root


def _convert(env: str, source: Path, root: Path, options: list[str]) -> None:
    from env_configs.demos.__main__ import main as convert

    arguments = [env, f"--source={source}", f"--root={root}", *options]
    print(shlex.join(["python", "-m", "env_configs.demos", *arguments]), flush=True)
    if convert(arguments) != 0:
        raise UsageError(f"{source} could not be converted; name another data set by --dataset.root=...")


def _fingerprint(source: Path, options: list[str]) -> str:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(shlex.join(options).encode())
    digest.update(source_fingerprint(["env_configs"]).encode())
    return digest.hexdigest()[:12]


def _check_features(root: Path, features: Collection[str]) -> None:
    held = json.loads((root / "meta" / "info.json").read_text())["features"]
    missing = sorted(set(features) - set(held))
    if missing:
        raise UsageError(
            f"{root} lacks {', '.join(missing)}, from which the policy learns: "
            "set FM_DATA to the folder of the human demonstrations, or name others by --dataset.repo_id=..."
        )
