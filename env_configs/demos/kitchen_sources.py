"""Recordings of Franka Kitchen out of the forms in which they are published, recognised by what is there.

- A zarr store, a folder or a zip: `data/state` (N, 59), `data/action` (N, 9), `meta/episode_ends` (E,).
- HDF5 of Minari, or the folder of such a data set: `episode_<i>/observations/observation` (T+1, 59), `actions` (T, 9).
- HDF5 of D4RL: `observations` (N, 59 or 60), `actions` (N, 9), `terminals` (N,) and, where kept, `timeouts` (N,).
- A folder of Relay Policy Learning: `observations_seq.npy` (T, E, 60), `actions_seq.npy` (T, E, 9) and
  `existence_mask.npy` (T, E), 1 where an episode has a frame. Copies that begin with the episodes, (E, T, ...), are
  read as well: time runs along the axis along which the mask only falls.

An observation of 59 numbers has the layout "d4rl", one of 60 "relay" (its last 30, a goal, are dropped); see
`kitchen_tasks.observe`. Actions are velocities: shares of 2 rad/s.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from env_configs.demos.hdf5_store import find_array, find_group, has, numbered, open_hdf5, read
from env_configs.demos.stores import Shape, StoreError, check_finite, check_kind
from env_configs.demos.zarr_store import find_array as find_zarr_array
from env_configs.demos.zarr_store import open_store, read_ends
from env_configs.demos.zarr_store import read as read_zarr
from env_configs.kitchen_tasks import JOINT_LIMITS, split

if TYPE_CHECKING:
    import h5py

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MINARI = Path("data", "main_data.hdf5")
_RELAY = ("observations_seq.npy", "actions_seq.npy", "existence_mask.npy")


@dataclass(frozen=True)
class Recording:
    """One demonstration.

    Attributes:
        positions: (T, 30), or (T+1, 30) where the last action's outcome was recorded.
        velocities: (T or T+1, 29); None where they were not recorded.
        actions: (T, 9), velocities as shares of 2 rad/s.
    """

    positions: NDArray
    velocities: NDArray | None
    actions: NDArray


def recordings(source: Path) -> list[Recording]:
    """All demonstrations of a source, in its order.

    Raises:
        StoreError: the source is absent, of no known form, damaged, of the wrong shape, or holds no Kitchen.
        ModuleNotFoundError: the reader of its form is not installed.
    """
    source = Path(source)
    found = _reader(source)(source)
    if not found:
        raise StoreError(f"{source} holds no episode")
    for number, recording in enumerate(found):
        _check(f"{source}: episode {number}", recording)
    return found


def _reader(source: Path) -> Callable[[Path], list[Recording]]:
    if source.is_dir():
        if any((source / name).exists() for name in _RELAY):
            return _read_relay
        if (source / _MINARI).exists():
            return lambda folder: _read_hdf5(folder / _MINARI)
        return _read_zarr
    if source.is_file():
        with source.open("rb") as file:
            if file.read(len(_HDF5)) == _HDF5:
                return _read_hdf5
        if zipfile.is_zipfile(source):
            return _read_zarr
    raise StoreError(
        f"{source} is no Kitchen recording; expected a whole zarr store (a folder or a zip), a whole HDF5 file of "
        f"D4RL or Minari, or a folder with {', '.join(_RELAY)}"
    )


def _read_zarr(source: Path) -> list[Recording]:
    with open_store(source, "kitchen") as group:
        seen = read_zarr(find_zarr_array(group, "data/state", (None, 59)))
        actions = read_zarr(find_zarr_array(group, "data/action", (len(seen), 9)))
        return _cut(seen, actions, read_ends(group, len(seen)))


def _read_hdf5(source: Path) -> list[Recording]:
    with open_hdf5(source, "kitchen") as file:
        if names := numbered(file, "episode_"):
            return [_minari(find_group(file, name)) for name in names]
        if has(file, "observations"):
            return _d4rl(file)
        raise StoreError(f"{source} is no recording of Minari (no 'episode_0') or D4RL (no 'observations')")


def _minari(episode: "h5py.Group") -> Recording:
    actions = read(find_array(episode, "actions", (None, 9)))
    seen = read(find_array(episode, "observations/observation", (len(actions) + 1, 59)))
    return Recording(*split(seen), actions)


def _d4rl(file: "h5py.File") -> list[Recording]:
    goal = find_array(file, "observations", (None, None)).shape[1] == 60
    seen = read(find_array(file, "observations", (None, 60 if goal else 59)))
    actions = read(find_array(file, "actions", (len(seen), 9)))
    last = np.zeros(len(seen), dtype=bool)
    for name in ("terminals", "timeouts"):
        if name == "terminals" or has(file, name):
            last |= read(find_array(file, name, (len(seen),), kinds="fiub")).astype(bool)
    if not last.any():
        raise StoreError(f"{file.filename}: neither 'terminals' nor 'timeouts' marks the end of an episode")
    last[-1] = True
    return _cut(seen, actions, np.flatnonzero(last) + 1)


def _read_relay(folder: Path) -> list[Recording]:
    seen = _load(folder / _RELAY[0], (None, None, 60))
    actions = _load(folder / _RELAY[1], (*seen.shape[:2], 9))
    mask = _load(folder / _RELAY[2], seen.shape[:2], kinds="fiub").astype(bool)
    time_first, time_second = _is_time(mask), _is_time(mask.T)
    if not (time_first or time_second):
        raise StoreError(f"{folder / _RELAY[2]}: an episode must begin with its first frame and have no gap")
    # Of one episode, or of several that are equally long or ever shorter, the mask fits both ways: the joints tell.
    if not time_first or (time_second and _change(np.swapaxes(seen, 0, 1), mask.T) < _change(seen, mask)):
        seen, actions, mask = (np.swapaxes(array, 0, 1) for array in (seen, actions, mask))
    return [_recording(seen[:end, i], actions[:end, i]) for i, end in enumerate(mask.sum(axis=0))]


def _is_time(mask: NDArray[np.bool_]) -> bool:
    """Whether each column of the mask is true from its beginning on, until the episode ends."""
    return len(mask) > 0 and bool(mask[0].all() and (mask[1:] <= mask[:-1]).all())


def _change(seen: NDArray, mask: NDArray[np.bool_]) -> float:
    """How far the joints go from one frame to the next along the first axis, in the mean; infinite if there is none."""
    steps = np.abs(np.diff(seen[..., :9], axis=0))[mask[1:]]
    return float(steps.mean()) if steps.size else np.inf


def _load(path: Path, shape: Shape, kinds: str = "fiu") -> NDArray:
    try:
        # Mapped, so that a header that lies about the size is found out before memory is asked for.
        values: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is no whole .npy file of numbers ({error})") from error
    if not isinstance(values, np.ndarray):
        raise StoreError(f"{path} is no .npy file but a zip of several")
    check_kind(str(path), values.dtype, values.shape, shape, kinds)
    check_finite(str(path), values)
    return np.array(values)


def _cut(seen: NDArray, actions: NDArray, ends: NDArray) -> list[Recording]:
    starts = [0, *ends[:-1]]
    return [_recording(seen[start:end], actions[start:end]) for start, end in zip(starts, ends, strict=True)]


def _recording(seen: NDArray, actions: NDArray) -> Recording:
    if seen.shape[1] == 60:
        return Recording(seen[:, :30], None, actions)
    return Recording(*split(seen), actions)


def _check(where: str, recording: Recording) -> None:
    """Refuses numbers that another robot, another order or another kind of action would give."""
    if len(recording.actions) == 0:
        raise StoreError(f"{where} has no frame")
    joints = recording.positions[:, :9]
    if (joints < JOINT_LIMITS[:, 0] - 0.2).any() or (joints > JOINT_LIMITS[:, 1] + 0.2).any():
        raise StoreError(f"{where} is not Franka Kitchen: a joint is beyond its limits by more than 0.2")
    turned = np.linalg.norm(recording.positions[:, 26:], axis=1)
    if (np.abs(turned - 1) > 0.1).any():
        raise StoreError(f"{where} is not Franka Kitchen: the kettle's quaternion, positions 26-29, is not of length 1")
    if (np.mean(np.abs(recording.actions) > 1, axis=0) > 0.5).any():
        raise StoreError(f"{where}: most actions of a joint are beyond [-1, 1]; expected velocities, shares of 2 rad/s")
