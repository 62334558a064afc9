"""Opens zarr stores of demonstrations and refuses what is damaged, foreign or of the wrong shape."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from env_configs.demos.stores import Shape, StoreError, check_finite, check_kind, show_shape
from env_configs.extras import not_installed

if TYPE_CHECKING:
    import zarr
    from zarr.storage import LocalStore, ZipStore

_DAMAGE = (RuntimeError, SystemError, ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile, zlib.error)
"""What zarr and its codecs raise when a byte of a store is not what was written."""


@contextmanager
def open_store(source: Path, extra: str = "pusht") -> "Iterator[zarr.Group]":
    """Opens a zarr store for reading: a folder, or all of its files in a zip.

    Args:
        source: the store.
        extra: the extra of this project that installs zarr for the task.

    Raises:
        StoreError: `source` is absent, neither of the two, or its description damaged.
        ModuleNotFoundError: zarr is not installed.
    """
    try:
        from zarr.storage import LocalStore, ZipStore
    except ModuleNotFoundError as error:
        raise not_installed(error, extra) from error
    source = Path(source)
    if not source.exists():
        raise StoreError(f"{source} does not exist; expected a zarr store, a folder or a zip file")
    if source.is_file() and not zipfile.is_zipfile(source):
        raise StoreError(f"{source} is neither a folder nor a whole zip file; is it a complete zarr store?")
    store = LocalStore(source, read_only=True) if source.is_dir() else ZipStore(source, mode="r")
    try:
        yield _root(store, source)
    finally:
        store.close()


def _root(store: "LocalStore | ZipStore", source: Path) -> "zarr.Group":
    import zarr

    try:
        return zarr.open_group(store, mode="r")
    except zarr.errors.GroupNotFoundError as error:
        raise StoreError(f"{source} is not a zarr store: it has no group at its root") from error
    except _DAMAGE as error:
        raise StoreError(f"{source} is damaged, its description cannot be read ({error})") from error


def find_array(group: "zarr.Group", name: str, shape: Shape) -> "zarr.Array":
    """The array `name`, not read yet, whose shape fits; None in `shape` stands for any length.

    Raises:
        StoreError: it is absent, not an array of numbers, of another shape, or lacks some of its chunks
            (which zarr would read as zeros).
    """
    import zarr

    try:
        array = group.get(name)
    except _DAMAGE as error:
        raise StoreError(f"{group.store}: '{name}' is damaged, its description cannot be read ({error})") from error
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{group.store} has no array '{name}' of shape {show_shape(shape)}")
    check_kind(f"{group.store}: '{name}'", array.dtype, array.shape, shape)
    if array.nchunks_initialized != array.nchunks:
        raise StoreError(
            f"{group.store}: '{name}' is incomplete, {array.nchunks_initialized} of {array.nchunks} chunks"
        )
    return array


def read(array: "zarr.Array", start: int = 0, stop: int | None = None) -> NDArray:
    """Rows `start` to `stop` of an array.

    Raises:
        StoreError: a chunk cannot be decoded, or a value is NaN or Inf.
    """
    name = f"{array.store}: '{array.path}'"
    try:
        values = np.asarray(array[start:stop])
    except _DAMAGE as error:
        raise StoreError(f"{name} is damaged, its chunks cannot be read ({error})") from error
    check_finite(name, values)
    return values


def read_ends(group: "zarr.Group", frames: int) -> NDArray[np.int64]:
    """`meta/episode_ends`: for each episode the index after its last frame, (E,).

    Raises:
        StoreError: they are no whole numbers that increase from above 0 to `frames`.
    """
    ends = read(find_array(group, "meta/episode_ends", (None,)))
    whole = np.issubdtype(ends.dtype, np.integer) and len(ends) > 0
    if not whole or ends[0] <= 0 or (np.diff(ends.astype(np.int64)) <= 0).any() or ends[-1] != frames:
        raise StoreError(
            f"{group.store}: 'meta/episode_ends' must be whole numbers that increase from above 0 "
            f"to {frames}, the number of frames; it is {_brief(ends)}"
        )
    return ends.astype(np.int64)


def _brief(values: NDArray) -> str:
    return np.array2string(values, threshold=6, edgeitems=3)
