"""Tasks by name, as evaluations and tables call them."""

from dataclasses import fields
from typing import Any

from lerobot.envs.configs import EnvConfig

from env_configs.pusht import FmPushtEnv

PRESETS: dict[str, tuple[type[EnvConfig], dict[str, Any]]] = {
    "pusht": (FmPushtEnv, {"block_range": (100, 400)}),
    "pusht_a": (FmPushtEnv, {"block_range": (200, 300)}),
    "pusht_b": (FmPushtEnv, {"block_range": (100, 400)}),
}
"""Name -> type and settings of the environment. `pusht` is range b, the usual benchmark; a is narrow."""


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
    return config(**settings | overrides)
