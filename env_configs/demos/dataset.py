"""The one way into a LeRobotDataset: episodes of arrays, written beside the target and renamed at the end."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

Features = dict[str, dict]
"""LeRobot's feature specification: name -> {"dtype", "shape", "names"}."""


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
        columns: name of each feature -> (T, *shape), all of the same T >= 1. Images are uint8 (T, H, W, 3).
        task: what is done, in words.
    """

    columns: dict[str, NDArray]
    task: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def write_dataset(
    root: Path,
    fps: int,
    features: Features,
    episodes: Iterable[Episode],
    total: int | None = None,
    notes: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """Writes episodes as a LeRobotDataset (format v3.0) that appears at `root` only when it is complete.

    Until then it grows in a folder beside it, `.NAME.unfinished-*`, that only a killed process leaves behind.

    Args:
        root: folder to create; must not exist.
        fps: frames per second of the recording.
        features: LeRobot's feature specification of every column. Use dtype "image" for lossless pictures.
        episodes: the demonstrations, in order; may be a generator that reads as it goes.
        total: number of episodes, for the progress bar.
        notes: name -> what is written as JSON to `meta/NAME.json`.

    Returns:
        Number of episodes and of frames written.

    Raises:
        FileExistsError: `root` exists.
        ValueError: there is no episode, or an episode does not fit the features.
    """
    root = Path(root).absolute()
    if root.exists():
        raise FileExistsError(f"{root} exists already: name a new folder, or remove that one first")
    root.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{root.name}.unfinished-", dir=root.parent))
    try:
        counts = _write(workshop / root.name, f"local/{root.name}", fps, features, episodes, total)
        for name, content in (notes or {}).items():
            file = workshop / root.name / "meta" / f"{name}.json"
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (workshop / root.name).rename(root)
    finally:
        shutil.rmtree(workshop)
    return counts


def _write(
    folder: Path, repo_id: str, fps: int, features: Features, episodes: Iterable[Episode], total: int | None
) -> tuple[int, int]:
    import datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # one bar per episode of its own, inside ours
    settings: dict[str, Any] = {"use_videos": False, "video_backend": "pyav"}  # LeRobot complains at length of others
    dataset = LeRobotDataset.create(repo_id, fps=fps, features=features, root=folder, **settings)
    try:
        for number, episode in enumerate(tqdm(episodes, total=total, desc="writing", unit="episode")):
            _check(number, episode, features)
            _add(dataset, episode)
    finally:
        dataset.finalize()
        if shown:
            datasets.enable_progress_bars()
    if dataset.meta.total_episodes == 0:
        raise ValueError("no episode to write")
    return dataset.meta.total_episodes, dataset.meta.total_frames


def _check(number: int, episode: Episode, features: Features) -> None:
    if set(episode.columns) != set(features):
        raise ValueError(f"episode {number} has columns {sorted(episode.columns)}, not {sorted(features)}")
    for name, column in episode.columns.items():
        expected = (len(episode), *features[name]["shape"])
        if column.shape != expected or len(column) == 0:
            raise ValueError(f"episode {number}: '{name}' has shape {column.shape}, expected {expected}, T > 0")
        if np.issubdtype(column.dtype, np.floating) and not np.isfinite(column).all():
            raise ValueError(f"episode {number}: '{name}' holds NaN or Inf")


def _add(dataset: "LeRobotDataset", episode: Episode) -> None:
    for step in range(len(episode)):
        frame = {name: column[step] for name, column in episode.columns.items()}
        dataset.add_frame(frame | {"task": episode.task})
    dataset.save_episode()
