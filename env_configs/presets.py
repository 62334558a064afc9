"""Tasks by name, as evaluations and tables call them."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lerobot.envs.configs import EnvConfig

from env_configs.kitchen import FmKitchenEnv
from env_configs.pusht import FmPushtEnv
from env_configs.robosuite_tasks import FmHandoverEnv, FmLiftEnv, FmTransportEnv

PRESETS: dict[str, tuple[type[EnvConfig], dict[str, Any]]] = {
    "pusht": (FmPushtEnv, {"block_range": (100, 400), "starts": "random_state"}),
    "pusht_a": (FmPushtEnv, {"block_range": (200, 300), "starts": "random_state"}),
    "pusht_b": (FmPushtEnv, {"block_range": (100, 400), "starts": "random_state"}),
    "kitchen": (FmKitchenEnv, {}),
    "lift": (FmLiftEnv, {}),
    "handover": (FmHandoverEnv, {}),
    "transport": (FmTransportEnv, {}),
}
"""Name -> type and settings of the environment. `pusht` is range b, the usual benchmark; a is narrow; both with
Diffusion Policy's starts."""


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Fields of an environment from words `name=value`; a value is JSON, or else itself a string.

    Raises:
        ValueError: a word has no `=`.
    """
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"an option of a task is NAME=VALUE, as in starts=gymnasium, not {word!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def make_env_config(name: str, **overrides: Any) -> EnvConfig:
    """The configuration of a task by its name.

    Args:
        name: one of `PRESETS`.
        overrides: fields to set otherwise than the preset does.

    Raises:
        ValueError: the name, or the name or value of a field, is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown task {name!r}; known are {', '.join(PRESETS)}")
    config, settings = PRESETS[name]
    known = [field.name for field in fields(config)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"task {name!r} has no option {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return config(**settings | overrides)
    except TypeError as error:
        raise ValueError(f"task {name!r} has an option of the wrong kind in {overrides}: {error}") from error
