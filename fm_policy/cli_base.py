"""The pre-trained policy that a later stage starts from: what its config.json tells before LeRobot is imported."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from fm_policy import recipes
from fm_policy.cli_usage import UsageError, value_of


def base_features(key: recipes.RecipeKey, flags: Sequence[str]) -> Collection[str] | None:
    """Return the features that the policy named by `--policy.path` sees; None if it is not in a local folder.

    Raises:
        UsageError: No policy is named, or one that this stage of this task cannot start from.
    """
    path = value_of(flags, "policy.path")
    if not path:
        raise UsageError(
            f"stage={key.stage} starts from a pre-trained policy, --policy.path=DIR; for a training by its loss "
            f"from scratch, to compare with: stage={recipes.FIRST_STAGE} --policy.stage={key.stage} "
            "--policy.finetune_lr=..."
        )
    if not Path(path).is_dir():
        _check_is_hub_id(path)
        return None
    features = _features(Path(path))
    _check_observations(features, path, key)
    return features


def _check_is_hub_id(path: str) -> None:
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UsageError(f"there is no folder {path}, which --policy.path names")
    owner, slash, _ = path.partition("/")
    if slash and Path(owner).is_dir():
        raise UsageError(
            f"there is no folder {path}, which --policy.path names, though there is one {owner}: for a policy of that "
            "name on the Hub, call this from another folder"
        )


def _features(folder: Path) -> Collection[str]:
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder} holds no policy (no config.json); a run's are in checkpoints/*/pretrained_model")
    try:
        config = json.loads(file.read_text())
        kind, features = config["type"], config.get("input_features")
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{file} is broken, perhaps cut off when it was copied: {error!r}") from error
    if kind != "fm_ft":
        raise UsageError(f"{folder} holds a policy of type {kind!r}, expected 'fm_ft'")
    if not isinstance(features, dict):
        raise UsageError(f"{file} names no input_features, got {features!r}")
    return features.keys()


def _check_observations(features: Collection[str], path: str, key: recipes.RecipeKey) -> None:
    unseen = set(features) - _shown(key.env, key.obs)
    if unseen:
        words = sorted({other.obs for other in recipes.available() if other.env == key.env})
        fitting = [f"obs={obs}" for obs in words if set(features) <= _shown(key.env, obs)]
        advice = f": say {' or '.join(fitting)}" if fitting else ""
        raise UsageError(f"{path} sees {', '.join(sorted(unseen))}, which obs={key.obs} does not show{advice}")


def _shown(env: str, obs: str) -> set[str]:
    recipe = recipes.available()[recipes.RecipeKey(env, obs)]
    return set(json.loads(recipe.read_text())["policy"]["input_features"])
