"""A training run on disk: the checkpoints that LeRobot's trainer saved."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draccus.utils import DraccusException
from lerobot.configs.train import TRAIN_CONFIG_NAME, TrainPipelineConfig
from lerobot.utils.constants import CHECKPOINTS_DIR, PRETRAINED_MODEL_DIR
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fm_policy.evaluation.checkpoint import FILES
from fm_policy.modeling_fm_ft import FlowMatchingPolicy


@dataclass(frozen=True)
class SavedRun:
    """What a run left behind.

    Attributes:
        checkpoints: Folders of the policies, by the step's name (`001200`), in rising order.
        skipped: Why a checkpoint cannot be chosen, by the step's name; a kill while saving leaves such ones.
        config: What it was trained with.
    """

    checkpoints: dict[str, Path]
    skipped: dict[str, str]
    config: TrainPipelineConfig


def open_run(folder: Path) -> SavedRun:
    """Read the output folder of LeRobot's trainer, or the `checkpoints` in it.

    Raises:
        ValueError: If there is no usable checkpoint, one holds a policy of another type, or they were trained on
            different data.
    """
    root = folder / CHECKPOINTS_DIR if (folder / CHECKPOINTS_DIR).is_dir() else folder
    steps = [path for path in root.iterdir() if path.name.isdigit() and path.is_dir()] if root.is_dir() else []
    if not steps:
        raise ValueError(f"{folder} holds no checkpoints: expected some like {root / '001000' / PRETRAINED_MODEL_DIR}")
    folders = {path.name: path / PRETRAINED_MODEL_DIR for path in sorted(steps, key=lambda path: int(path.name))}
    for path in folders.values():
        _check_type(path)
    troubles = {step: _trouble(path) for step, path in folders.items()}
    skipped = {step: trouble for step, trouble in troubles.items() if trouble}
    whole = {step: path for step, path in folders.items() if step not in skipped}
    if not whole:
        raise ValueError("\n  ".join([f"{folder} holds no usable checkpoint:", *map(": ".join, skipped.items())]))
    _check_same_data(whole)
    return SavedRun(whole, skipped, _train_config(list(whole.values())[-1]))


def _check_type(folder: Path) -> None:
    try:
        kind = _read(folder / "config.json").get("type")
    except (OSError, ValueError):
        return  # not whole, which is another matter
    if kind != FlowMatchingPolicy.name:
        raise ValueError(f"{folder} holds a policy of type {kind!r}, expected {FlowMatchingPolicy.name!r}")


def _trouble(folder: Path) -> str | None:
    """Why a checkpoint cannot be chosen; None if it can."""
    missing = [name for name in (*FILES, TRAIN_CONFIG_NAME) if not (folder / name).is_file()]
    if missing:
        return f"it is not whole, it lacks {', '.join(missing)}"
    try:
        records = {file.name: _read(file) for file in sorted(folder.glob("*.json"))}
        steps = [step for name, record in records.items() if name.startswith("policy_") for step in record["steps"]]
        for state in (step["state_file"] for step in steps if "state_file" in step):
            _weights(folder / state)
        weights = _weights(folder / "model.safetensors")
    except (ValueError, OSError) as error:
        return f"it is not whole, {error}"
    infinite = [name for name, values in weights.items() if not values.isfinite().all()]
    return f"its training diverged: {len(infinite)} weights hold NaN or infinity" if infinite else None


def _weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error


def _check_same_data(checkpoints: dict[str, Path]) -> None:
    """Refuse a run that was resumed on other data: what one checkpoint never saw, another one may have."""
    named = {step: _read(path / TRAIN_CONFIG_NAME)["dataset"] for step, path in checkpoints.items()}
    (first, expected), *others = named.items()
    for step, data in others:
        differing = [name for name in ("repo_id", "episodes", "eval_split") if data.get(name) != expected.get(name)]
        if differing:
            pairs = [f"dataset.{name}: {expected.get(name)!r} at {first}, {data.get(name)!r}" for name in differing]
            raise ValueError(f"the run changed its data on the way: {'; '.join(pairs)} at {step}")


def _train_config(checkpoint: Path) -> TrainPipelineConfig:
    try:
        return TrainPipelineConfig.from_pretrained(checkpoint)
    except (DraccusException, ValueError) as error:
        raise ValueError(f"{checkpoint / TRAIN_CONFIG_NAME} cannot be read: {error}") from error
