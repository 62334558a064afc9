"""What checkpoints are compared by: the held-out reconstruction error, or the score in the run's own task."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from env_configs.doctor import PACKAGES
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.episodes import read_episodes
from fm_policy.evaluation.held_out_windows import HeldOutWindows
from fm_policy.evaluation.runs import Run, evaluate_into
from fm_policy.evaluation.statistics import table
from fm_policy.select.saved_run import SavedRun


@dataclass(frozen=True)
class Measurement:
    """A criterion, measured.

    Attributes:
        values: By the checkpoint's step, `(held-out episodes, draws)` or `(seeds, repeats)`.
        details: What else there is to say of each checkpoint, its fingerprint above all.
        settings: How it was measured, for the record.
        sample: The same in words.
    """

    values: dict[str, NDArray[np.float64]]
    details: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    sample: str


def measure_error(run: SavedRun, samples: int, draws: int, seed: int, device: str) -> Measurement:
    """Held-out reconstruction errors; see `HeldOutWindows`."""
    windows = HeldOutWindows(run.config, samples, draws, seed)
    values, details = {}, {}
    with tqdm(total=len(windows.rows) * len(run.checkpoints), unit="window") as progress:
        for step, path in run.checkpoints.items():
            progress.set_description(step)
            checkpoint = load_checkpoint(path, device)
            values[step] = windows.errors(checkpoint, progress)
            details[step] = {"fingerprint": checkpoint.fingerprint}
    episodes = len(next(iter(values.values())))
    data = run.config.dataset
    settings = {
        "dataset": {name: getattr(data, name) for name in ("repo_id", "root", "episodes", "eval_split")},
        "held_out_episodes": episodes,
        "windows": len(windows.rows),
        "draws": draws,
        "seed": seed,
    }
    sample = f"{episodes} held-out episodes, {len(windows.rows)} windows x {draws} draws of noise"
    return Measurement(values, details, settings, sample)


def measure_coverage(run: SavedRun, seed: int, episodes: int, repeats: int, folder: Path, device: str) -> Measurement:
    """Largest rewards in the run's own task, evaluated into a folder for each step, and continued there to more.

    Raises:
        ValueError: If the run has no task, or the folder holds other evaluations.
    """
    task = run.config.env
    if task is None:
        raise ValueError("the run has no task (its env is null): choose --by error, or train with --env.type")
    plan = Run(seed=seed, episodes=episodes, repeats=repeats, packages=PACKAGES)
    values, details = {}, {}
    for step, path in run.checkpoints.items():
        summary = evaluate_into(folder / step, load_checkpoint(path, device), task, plan, resume=True)
        values[step] = table(read_episodes(folder / step / "episodes.jsonl"), "max_reward")
        names = ("score", "score_interval", "success", "success_interval", "nfe", "head_nfe")
        details[step] = {"fingerprint": summary["policy"]["fingerprint"]} | {name: summary[name] for name in names}
    settings = {"task": summary["task"], "seed": seed, "episodes": episodes, "repeats": repeats}
    return Measurement(values, details, settings, f"{episodes} seeds from {seed} on x {repeats} repeats")
