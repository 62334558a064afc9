"""The recipes: LeRobot training configurations that pin every hyper-parameter of a result.

Each file is in LeRobot's own `--config_path` format, so it also works without this package's command line:

    lerobot-train --config_path=fm_policy/recipes/pusht_state.json --dataset.repo_id=lerobot/pusht_keypoints
    lerobot-train --config_path=fm_policy/recipes/pusht_state_finetune.json --policy.path=DIR --dataset.repo_id=...

A file is named `<env>_<obs>[_<net>][_<stage>].json`, where the velocity net is not the task's default one and the
stage not the first; `diffusion` is the net of the baseline `dp_ema`. Adding a recipe means adding a file: the command
line finds it.

A recipe of the first stage names every field of the policy that decides what is learned. One of a later stage changes
what the stage sets in the configuration of the policy that `--policy.path` names, its base, and so serves every net.
Its own `path` is read only where that flag is forgotten, in LeRobot's complaint.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

NETS = {"fm_ft": "unet", "dp_ema": "diffusion"}
"""Policies, and the net that each has in its recipes unless another one is asked for."""
DEFAULT_POLICY = "fm_ft"
DEFAULT_NET = NETS[DEFAULT_POLICY]
FIRST_STAGE = "pretrain"


class RecipeKey(NamedTuple):
    """What a recipe is for: the task, the kind of observation, the velocity net and the stage of training.

    In a later stage than the first `net` is None: the base's.
    """

    env: str
    obs: str
    net: str | None = DEFAULT_NET
    stage: str = FIRST_STAGE


def available(policy: str = DEFAULT_POLICY) -> dict[RecipeKey, Path]:
    """Return the path of every recipe of a policy in this folder, by what it is for."""
    files = sorted(Path(__file__).parent.glob("*.json"))
    policies = {file: json.loads(file.read_text())["policy"] for file in files}
    return {_key(file, fields): file for file, fields in policies.items() if _type(fields) == policy}


def _type(policy: dict[str, Any]) -> str:
    return policy.get("type", DEFAULT_POLICY)  # of a later stage, which only the default policy has, its base's


def _key(file: Path, policy: dict[str, Any]) -> RecipeKey:
    stage = policy.get("stage", FIRST_STAGE)
    env, obs, *net = file.stem.removesuffix(f"_{stage}").split("_")
    return RecipeKey(env, obs, *net) if stage == FIRST_STAGE else RecipeKey(env, obs, None, stage)
