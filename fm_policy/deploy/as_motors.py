"""A policy that was trained on a task's numbers, as one for a robot's motors: the same weights, other names.

A robot of LeRobot gives every number as a motor, in `observation.state`; a simulated task splits them into
`observation.state` and `observation.environment_state`. The encoder puts one after the other, so only the names and
the statistics change, and not what the policy does.

    python -m fm_policy.deploy.as_motors --policy DIR --out DIR2
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE

from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.files import new_folder
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors


def as_motors(path: Path, out: Path) -> None:
    """Write a checkpoint whose `observation.state` holds all observed numbers, and whose actions are named as motors.

    Args:
        path: The checkpoint.
        out: Folder to create.

    Raises:
        FileExistsError: If `out` exists.
        ValueError: If `path` is no checkpoint of this policy, or does not observe two vectors, the
            robot's first, normalised alike.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new folder")
    checkpoint = load_checkpoint(path)
    old, config = checkpoint.policy.config, copy.deepcopy(checkpoint.policy.config)
    features, modes = old.input_features or {}, old.normalization_mapping
    if not {OBS_STATE, OBS_ENV_STATE} <= set(features) or modes["STATE"] != modes["ENV"]:
        raise ValueError(f"{path} must observe '{OBS_STATE}' and '{OBS_ENV_STATE}', normalised alike; got {features}")
    if list(features).index(OBS_STATE) > list(features).index(OBS_ENV_STATE):
        raise ValueError(f"{path} puts '{OBS_ENV_STATE}' before '{OBS_STATE}', expected the robot's numbers first")
    numbers = sum(features[name].shape[0] for name in (OBS_STATE, OBS_ENV_STATE))
    images = {name: feature for name, feature in features.items() if feature.type is FeatureType.VISUAL}
    config.input_features = {OBS_STATE: PolicyFeature(FeatureType.STATE, (numbers,)), **images}
    config.action_feature_names = [f"{name}.pos" for name in old.action_feature_names or []] or None
    policy = FlowMatchingPolicy(config)
    policy.load_state_dict(checkpoint.policy.state_dict())
    with new_folder(out) as draft:
        for part in (policy, *make_fm_ft_pre_post_processors(config, _statistics(checkpoint.preprocessor))):
            part.save_pretrained(draft)


def _statistics(preprocessor: Any) -> dict[str, Any]:
    stats = dict(next(step.stats for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep)))
    robot, objects = stats[OBS_STATE], stats.pop(OBS_ENV_STATE)
    both = [name for name in robot if name in objects and name != "count"]
    joined = {name: np.concatenate([np.asarray(robot[name]), np.asarray(objects[name])]) for name in both}
    return stats | {OBS_STATE: joined}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fm_policy.deploy.as_motors", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", type=Path, default=default_policy(), help="the checkpoint (default: the shipped)")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    given = parser.parse_args(arguments)
    try:
        as_motors(given.policy, given.out)
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
