"""Training windows from a memory-mapped copy of the data set.

LeRobot gathers the window of a sample frame by frame, which costs more than the whole step of a small net. Here
LeRobot is asked for single frames only (the configuration's delta indices are None), and a preprocessor step
gathers the windows of a batch at once, by the frames' `index`, from arrays that are built once per data set.
Equal, element by element, to LeRobot's own windows, and checked against its frames in every batch.
"""

import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import ACTION, HF_LEROBOT_HOME, OBS_PREFIX
from torch import Tensor
from tqdm import tqdm

from fm_policy.windows import WindowedConfig

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

FORMAT = 2
FRAMES_PER_READ = 4096


class WindowStore:
    """The frames of one data set as memory-mapped arrays, and the windows that training reads from them.

    Args:
        folder: Where `build` put the arrays.
        windows: For each feature its window, steps relative to the present, e.g. `[-1, 0]`.
        episode_ends: For each episode the index after its last frame, ascending.
    """

    def __init__(self, folder: Path, windows: Mapping[str, Sequence[int]], episode_ends: np.ndarray) -> None:
        self.windows = {key: np.asarray(window) for key, window in windows.items()}
        self.arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in windows}
        self.ends = np.asarray(episode_ends)
        self.starts = np.concatenate([[0], self.ends[:-1]])

    def frames(self, key: str, index: np.ndarray) -> Tensor:
        """Frames of a feature, `(*index.shape, *shape)` float32; images in [0, 1], channels first."""
        frames = torch.from_numpy(self.arrays[key][index])
        return frames.float() / 255 if frames.dtype == torch.uint8 else frames

    def gather(self, key: str, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows of a feature around the frames `index`.

        Steps beyond the episode repeat its first or last frame and are marked as padding, as LeRobot's are.

        Args:
            key: Name of the feature.
            index: Absolute frame indices, `(B,)`.

        Returns:
            The windows `(B, window, *shape)` and the padding mask `(B, window)`.
        """
        episode = np.searchsorted(self.ends, index, side="right")
        first, last = self.starts[episode, None], self.ends[episode, None] - 1
        wanted = index[:, None] + self.windows[key]
        inside = np.clip(wanted, first, last)
        return self.frames(key, inside), torch.from_numpy(wanted != inside)


def of_policy(meta: "LeRobotDatasetMetadata", config: WindowedConfig, features: Iterable[str]) -> WindowStore:
    """The store of what a policy sees, and of the actions, see `open_store`.

    Where the policy knows a feature by another name than the data set (LeRobot's rename_map), of all observations.
    """
    seen = [*features, ACTION]
    known = all(key in meta.features for key in seen)
    return open_store(meta, config.observation_window, config.action_window, seen if known else None)


def open_store(
    meta: "LeRobotDatasetMetadata",
    observation_window: Sequence[int],
    action_window: Sequence[int],
    keys: Sequence[str] | None = None,
) -> WindowStore:
    """Open the store of a data set, building first what it lacks.

    Several processes may call this at once: one builds, the others wait. Stores live below LeRobot's home.

    Args:
        meta: Of the data set.
        observation_window: Steps of the observations, relative to the present.
        action_window: Steps of the actions.
        keys: Features to hold; all observations and the action if not given.

    Raises:
        ValueError: The disk has no room for it, or it is damaged.
    """
    keys = keys or [key for key in meta.features if key == ACTION or key.startswith(OBS_PREFIX)]
    folder = Path(HF_LEROBOT_HOME) / "fm_ft" / "windows" / fingerprint(Path(meta.root))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if lacking := [key for key in keys if not (folder / f"{key}.npy").is_file()]:
            build(meta, lacking, folder)
    windows = {key: action_window if key == ACTION else observation_window for key in keys}
    ends = np.asarray(meta.episodes["dataset_to_index"])
    try:
        return WindowStore(folder, windows, ends)
    except (OSError, ValueError) as error:
        raise ValueError(f"the window store in {folder} is damaged ({error}): delete that folder") from error


def fingerprint(root: Path) -> str:
    """Hash of a data set: name, size and time of every file, and the content of its description."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for path in sorted(p for part in ("meta", "data", "videos") for p in (root / part).rglob("*") if p.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update((root / "meta" / "info.json").read_bytes())
    return digest.hexdigest()[:32]


def build(meta: "LeRobotDatasetMetadata", keys: Sequence[str], folder: Path) -> None:
    """Write arrays of a data set to `folder`, where each appears only when it is complete; one process at a time."""
    # Imported here because it takes seconds, and a robot that loads the processors never builds a store.
    from lerobot.datasets import LeRobotDataset

    _remove_leftovers(folder)
    _check_room(meta, keys, folder)
    dataset = LeRobotDataset(meta.repo_id, root=meta.root, revision=meta.revision, return_uint8=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as partial:
        _write_arrays(dataset, keys, Path(partial))
        folder.mkdir(exist_ok=True)
        for key in keys:
            os.replace(Path(partial, f"{key}.npy"), folder / f"{key}.npy")


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of this store: nobody else builds it now."""
    for partial in folder.parent.glob(f"{folder.name}.*"):
        if partial.is_dir():
            shutil.rmtree(partial)


def _check_room(meta: "LeRobotDatasetMetadata", keys: Sequence[str], folder: Path) -> None:
    sizes = {
        key: np.dtype(np.uint8 if key in meta.camera_keys else meta.features[key]["dtype"]).itemsize for key in keys
    }
    needed = sum(meta.total_frames * math.prod(meta.features[key]["shape"]) * size for key, size in sizes.items())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ValueError(
            f"the window store of {meta.repo_id} needs {needed / 1e9:.1f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f}: set HF_LEROBOT_HOME to a larger disk, or train without it, --policy.window_store=false"
        )
    logging.info(f"Building the window store of {meta.repo_id}, {needed / 1e6:.0f} MB in {folder}")


def _write_arrays(dataset: "LeRobotDataset", keys: Sequence[str], folder: Path) -> None:
    arrays: dict[str, np.memmap] = {}
    passes = len({key in dataset.meta.camera_keys for key in keys})
    with tqdm(total=passes * len(dataset), desc="Window store", unit="frame") as progress:
        for start, pieces in _pieces(dataset, keys):
            for key, frames in pieces.items():
                if key not in arrays:
                    shape, path = (len(dataset), *frames.shape[1:]), folder / f"{key}.npy"
                    arrays[key] = np.lib.format.open_memmap(path, mode="w+", dtype=frames.dtype, shape=shape)
                arrays[key][start : start + len(frames)] = frames
            progress.update(len(frames))
    if not arrays:
        raise ValueError(f"the data set {dataset.repo_id} holds no frames")
    for array in arrays.values():
        array.flush()


def _pieces(dataset: "LeRobotDataset", keys: Sequence[str]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield features in pieces, `(first index, frames)`: numbers as they are, images as uint8, channels first."""
    cameras = [key for key in keys if key in dataset.meta.camera_keys]
    numbers = [key for key in keys if key not in cameras]
    table = dataset.hf_dataset.select_columns(numbers)
    for start in range(0, len(dataset) if numbers else 0, FRAMES_PER_READ):
        rows = table[start : start + FRAMES_PER_READ]
        # A feature of shape (1,) comes as scalars.
        yield start, {key: torch.stack(list(rows[key])).numpy().reshape(-1, *_shape(dataset, key)) for key in numbers}
    for index in range(len(dataset) if cameras else 0):
        frame = dataset[index]  # decodes all cameras
        yield index, {key: _pixels(frame[key]).numpy()[None] for key in cameras}


def _shape(dataset: "LeRobotDataset", key: str) -> tuple[int, ...]:
    return tuple(dataset.meta.features[key]["shape"])


def _pixels(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)


_store: WindowStore | None = None


def attach(store: WindowStore) -> None:
    """Make this the store that `WindowStoreStep` reads.

    LeRobot's trainer shows the data set to the policy but not to its preprocessor, least of all when that is
    loaded from a checkpoint. So the policy, when it is built for training, leaves the store here.
    """
    global _store
    _store = store


@ProcessorStepRegistry.register("fm_ft_window_store")
class WindowStoreStep(ProcessorStep):
    """Turns a training batch of single frames into windows; every other batch passes untouched.

    A batch of single frames is one with an action and an `index`, but no mask of the actions' padding, as LeRobot's
    loader makes it when it is asked for no windows.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Replace single frames by their windows and add the padding masks.

        Raises:
            ValueError: If no store is attached, or the batch is not of the data set that it was built from.
        """
        extras = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        action = transition.get(TransitionKey.ACTION)
        if "index" not in extras or action is None or f"{ACTION}_is_pad" in extras:
            return transition
        if _store is None:
            raise ValueError(
                "the batch holds single frames, and there is no window store: load the windows with the data "
                "set's delta_timestamps, or build the policy with window_store=true and its dataset_meta"
            )
        index = extras["index"].cpu().numpy()
        values = {**(transition.get(TransitionKey.OBSERVATION) or {}), ACTION: action}
        masks: dict[str, Tensor] = {}
        for key in _store.windows:
            _check_frames(_store, key, index, values.get(key))
            values[key], masks[f"{key}_is_pad"] = _store.gather(key, index)
        result: Any = transition.copy()
        result[TransitionKey.ACTION] = values.pop(ACTION)
        result[TransitionKey.OBSERVATION] = values
        result[TransitionKey.COMPLEMENTARY_DATA] = {**extras, **masks}
        return result

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Features stay what they are."""
        return features


def _check_frames(store: WindowStore, key: str, index: np.ndarray, loaded: Tensor | None) -> None:
    """Compare what LeRobot loaded with what the store holds for the same frames."""
    stored = store.frames(key, index)
    if loaded is not None and loaded.ndim == stored.ndim - 1:  # LeRobot drops the axis of a feature of shape (1,)
        loaded = loaded.unsqueeze(-1)
    if loaded is None or not torch.equal(loaded.to(stored.device, stored.dtype), stored):
        raise ValueError(
            f"'{key}' of the loaded frames differs from the window store's: the store belongs to another data set, "
            "or its videos are decoded by another library (dataset.video_backend; the store takes LeRobot's default), "
            "or dataset.image_transforms is on; the last two need policy.window_store=false"
        )
