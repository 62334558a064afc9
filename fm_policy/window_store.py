"""Training windows from a memory-mapped copy of the data set.

LeRobot gathers the window of a sample frame by frame, which costs more than the whole step of a small net. Here
LeRobot is asked for single frames only (the configuration's delta indices are None), and a preprocessor step
gathers the windows of a batch at once, by the frames' `index`, from arrays that are built once per data set.
Equal, element by element, to LeRobot's own windows, and checked against its frames in every batch.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

FORMAT = 1
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


def open_store(
    meta: "LeRobotDatasetMetadata", observation_window: Sequence[int], action_window: Sequence[int]
) -> WindowStore:
    """Open the store of a data set, building it first if there is none that matches its fingerprint.

    Several processes may call this at once: one builds, the others wait. Stores live below LeRobot's home.
    """
    keys = [key for key in meta.features if key == ACTION or key.startswith(OBS_PREFIX)]
    folder = Path(HF_LEROBOT_HOME) / "fm_ft" / "windows" / fingerprint(Path(meta.root))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            build(meta, keys, folder)
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
    """Write the arrays of a data set to `folder`, which appears only when it is complete."""
    # Imported here because it takes seconds, and a robot that loads the processors never builds a store.
    from lerobot.datasets import LeRobotDataset

    logging.info(f"Building the window store of {meta.repo_id} in {folder}")
    dataset = LeRobotDataset(meta.repo_id, root=meta.root, revision=meta.revision, return_uint8=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for key in keys:
            _write_array(dataset, key, partial / f"{key}.npy")
        (partial / "store.json").write_text(json.dumps({"repo_id": meta.repo_id, "keys": list(keys)}))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_array(dataset: "LeRobotDataset", key: str, path: Path) -> None:
    array: np.memmap | None = None
    with tqdm(total=len(dataset), desc=f"Window store: {key}", unit="frame") as progress:
        for start, frames in _read(dataset, key):
            if array is None:
                shape = (len(dataset), *frames.shape[1:])
                array = np.lib.format.open_memmap(path, mode="w+", dtype=frames.dtype, shape=shape)
            array[start : start + len(frames)] = frames
            progress.update(len(frames))
    if array is None:
        raise ValueError(f"the data set {dataset.repo_id} holds no frames of '{key}'")
    array.flush()


def _read(dataset: "LeRobotDataset", key: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a feature in pieces, `(first index, frames)`: numbers as they are, images as uint8, channels first."""
    if key in dataset.meta.camera_keys:
        for index in range(len(dataset)):
            image = dataset[index][key]
            pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
            yield index, pixels.numpy()[None]
        return
    column = dataset.hf_dataset.select_columns(key)
    for start in range(0, len(dataset), FRAMES_PER_READ):
        rows = column[start : start + FRAMES_PER_READ][key]
        yield start, torch.stack(list(rows)).numpy()


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

    A batch of single frames is one with an action `(B, action_dim)` and an `index`, as LeRobot's loader makes it
    when it is asked for no windows.
    """

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Replace single frames by their windows and add the padding masks.

        Raises:
            ValueError: If no store is attached, or the batch is not of the data set that it was built from.
        """
        extras = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        action = transition.get(TransitionKey.ACTION)
        if "index" not in extras or action is None or action.ndim != 2:
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
    if loaded is None or not torch.equal(loaded.to(stored.device, stored.dtype), stored):
        raise ValueError(
            f"'{key}' of the loaded frames differs from the window store's: the store belongs to another data set, "
            "or dataset.image_transforms is on, which needs policy.window_store=false"
        )
