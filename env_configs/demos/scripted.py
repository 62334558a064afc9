"""Demonstrations of a scripted expert: tries it seed by seed on all cores, keeps the successes, writes a data set.

Which seeds are kept depends on nothing but the expert: the first successes in the order of the seeds, however many
processes tried them. Every attempt is put on the disk as soon as it ends, so that a killed recording goes on where
it was; the data set appears when it is complete.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from env_configs.demos.dataset import Episode, Features, write_dataset
from env_configs.demos.workers import in_order
from env_configs.experts.attempt import Attempt
from env_configs.extras import DISTRIBUTION, SIMULATORS

EXPERTS = {name: f"env_configs.experts.{name}" for name in ("kitchen", "handover", "transport")}
"""Task -> the module of its expert."""

PATIENCE = 100
"""So many attempts without one success, and the expert is taken to be broken."""


@dataclass(frozen=True)
class Recording:
    """What is to be recorded.

    Attributes:
        task: name of the task, "kitchen" say.
        expert: module that has `attempt(seed, options) -> Attempt`.
        options: the task's own, such as the kind of actions.
        fps: frames per second.
        features: the columns of the data set.
    """

    task: str
    expert: str
    options: Mapping[str, str]
    fps: int
    features: Features


def recording_of(task: str, options: Mapping[str, str]) -> Recording:
    """What is recorded of a task in `EXPERTS` with its options, `actions` and, for the kitchen, `layout`."""
    if task == "kitchen":
        from env_configs.demos.kitchen import features as kitchen_features
        from env_configs.kitchen_tasks import FPS as KITCHEN_FPS

        return Recording(
            task, EXPERTS[task], options, KITCHEN_FPS, kitchen_features(options["layout"], options["actions"])
        )
    from env_configs.demos.robomimic_hdf5 import features
    from env_configs.robosuite_models import TASKS
    from env_configs.robosuite_sim import FPS

    return Recording(task, EXPERTS[task], options, FPS, features(TASKS[task], options["actions"]))


def record(recording: Recording, root: Path, episodes: int, seed: int, workers: int) -> tuple[int, int]:
    """Writes the expert's first successes as a LeRobotDataset; `meta/scripted.json` says how they came about.

    Args:
        recording: what is recorded.
        root: folder to create; must not exist. Attempts are kept in `.NAME.attempts` beside it until it is complete.
        episodes: number of successes wanted.
        seed: of the first attempt; those after it take the next ones.
        workers: number of processes.

    Returns:
        Number of episodes and of frames.

    Raises:
        ValueError: `episodes`, `seed` or `workers` is too small; attempts of other settings are beside `root`; or
            the first `PATIENCE` attempts have no success.
        FileExistsError: `root` exists.
        ModuleNotFoundError: the task's simulator is not installed.
    """
    for name, value, least in (("episodes", episodes, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, not {value}")
    root = Path(root).absolute()
    if root.exists():
        raise FileExistsError(f"{root} exists already: name a new folder, or remove that one first")
    shelf = root.parent / f".{root.name}.attempts"
    settings = _settings(recording)
    _open_shelf(shelf, settings)
    tried = _try_until(recording, shelf, episodes, seed, workers)
    kept = [number for number, attempt in tried.items() if attempt["success"]]
    about = settings | {"seeds": kept, **_rates(list(tried.values()))}
    made = (_load_episode(shelf, number) for number in kept)
    counts = write_dataset(root, recording.fps, recording.features, made, len(kept), {"scripted": about})
    shutil.rmtree(shelf)
    print(f"{len(kept)} successes in {len(tried)} attempts; reached: {_shares(about['progress'])}")
    return counts


def _settings(recording: Recording) -> dict[str, Any]:
    packages = (DISTRIBUTION, *SIMULATORS[f"fm_{recording.task}"])
    return {
        "task": recording.task,
        "expert": recording.expert,
        "options": dict(recording.options),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _open_shelf(shelf: Path, settings: dict[str, Any]) -> None:
    """Makes the folder of attempts, or finds one that an earlier recording of the same settings left."""
    label = shelf / "settings.json"
    if label.exists():
        found = json.loads(label.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(f"{shelf} holds attempts of {found}, not of {settings}: remove it, or name another root")
        return
    shelf.mkdir(parents=True, exist_ok=True)
    _write(label, json.dumps(settings, indent=1).encode())


def _try_until(recording: Recording, shelf: Path, episodes: int, seed: int, workers: int) -> dict[int, dict[str, Any]]:
    """Attempts in the order of their seeds, the last of them the success that completes the number wanted."""
    tried: dict[int, dict[str, Any]] = {}
    successes = 0
    try_one = partial(_try, recording.expert, dict(recording.options), shelf)
    with tqdm(total=episodes, desc="recording", unit="success") as bar:
        for number, summary in in_order(try_one, seed, workers, ["__main__", __name__]):
            tried[number] = summary
            successes += summary["success"]
            bar.update(int(summary["success"]))
            bar.set_postfix_str(f"{successes / len(tried):.0%} of {len(tried)} attempts")
            if successes == episodes:
                break
            if successes == 0 and len(tried) == PATIENCE:
                reached = _shares(_rates(list(tried.values()))["progress"])
                raise ValueError(f"{PATIENCE} attempts from seed {seed} on have no success; reached: {reached}")
    return tried


def _try(expert: str, options: dict[str, str], shelf: Path, seed: int) -> dict[str, Any]:
    """One attempt, or what an earlier process put on the shelf of it."""
    summary = shelf / f"{seed}.json"
    if not summary.exists():
        attempt: Attempt = import_module(expert).attempt(seed, options)
        if attempt.success:
            _save_episode(shelf, seed, attempt)
        told = {"success": attempt.success, "steps": len(next(iter(attempt.columns.values())))}
        _write(summary, json.dumps(told | {"progress": attempt.progress}).encode())  # last: it vouches for the rest
    return json.loads(summary.read_text(encoding="utf-8"))


def _save_episode(shelf: Path, seed: int, attempt: Attempt) -> None:
    beside = shelf / f".{seed}.{os.getpid()}.npz"
    arrays: dict[str, Any] = {**attempt.columns, _TASK: np.array(attempt.task)}
    np.savez(beside, **arrays)
    beside.replace(shelf / f"{seed}.npz")


_TASK = "task in words"


def _load_episode(shelf: Path, seed: int) -> Episode:
    with np.load(shelf / f"{seed}.npz", allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    return Episode(columns, str(columns.pop(_TASK)))


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def _rates(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """How many attempts there were, and the share of them that reached each part of the task."""
    parts = attempts[0]["progress"]
    progress = {part: float(np.mean([attempt["progress"][part] for attempt in attempts])) for part in parts}
    return {"attempts": len(attempts), "progress": progress}


def _shares(progress: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in progress.items())
