"""Opens HDF5 files of demonstrations and refuses what is damaged, foreign, of the wrong shape, or elsewhere.

A file from a stranger can name other files of this machine: by links, by external storage, by virtual data sets.
None of them is followed: only what the file itself holds is read.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from env_configs.demos.stores import Shape, StoreError, check_finite, check_kind, show_shape
from env_configs.extras import not_installed

if TYPE_CHECKING:
    import h5py

_DAMAGE = (RuntimeError, OSError, KeyError, ValueError, TypeError, UnicodeError, MemoryError)
"""What h5py raises where a file is broken."""


@contextmanager
def open_hdf5(source: Path, extra: str) -> "Iterator[h5py.File]":
    """Opens an HDF5 file for reading.

    Args:
        source: the file.
        extra: the extra of this project that installs h5py for the task.

    Raises:
        StoreError: `source` is absent, no file, no HDF5 file, or cut off.
        ModuleNotFoundError: h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise not_installed(error, extra) from error
    source = Path(source)
    if not source.is_file():
        raise StoreError(f"{source} is not a file; expected an HDF5 file")
    if not h5py.is_hdf5(source):
        raise StoreError(f"{source} is not an HDF5 file, or has lost its beginning")
    try:
        file = h5py.File(source, "r")
    except _DAMAGE as error:
        raise StoreError(f"{source} is damaged or cut off ({error})") from error
    with file:
        yield file


def find_group(group: "h5py.Group", name: str) -> "h5py.Group":
    """The group `name` (a path within `group`).

    Raises:
        StoreError: it is absent, no group, or reached through a link.
    """
    import h5py

    found = _find(group, name)
    if not isinstance(found, h5py.Group):
        raise StoreError(f"{_file(group)} has no group '{_path(group, name)}'")
    return found


def has(group: "h5py.Group", name: str) -> bool:
    """Whether there is a group or an array `name`.

    Raises:
        StoreError: the way to it is a link, or is damaged.
    """
    return _find(group, name) is not None


def numbered(group: "h5py.Group", prefix: str) -> list[str]:
    """Names of the members `<prefix><number>`, such as episode_0, episode_1, ..., by their number.

    Raises:
        StoreError: the group is damaged.
    """
    try:
        names = [name for name in group if name.startswith(prefix) and name[len(prefix) :].isdecimal()]
    except _DAMAGE as error:
        raise StoreError(
            f"{_file(group)}: '{group.name}' is damaged, its members cannot be listed ({error})"
        ) from error
    return sorted(names, key=lambda name: int(name[len(prefix) :]))


def find_array(group: "h5py.Group", name: str, shape: Shape, kinds: str = "fiu") -> "h5py.Dataset":
    """The array `name` (a path within `group`), not read yet, whose shape fits; None stands for any length.

    `kinds` are numpy's letters of the types that may be there; add "b" for truth values.

    Raises:
        StoreError: it is absent, not an array of numbers, of another shape, reached through a link or kept in
            another file, or lacks some of its values (which HDF5 would read as zeros).
    """
    import h5py

    array, where = _find(group, name), f"{_file(group)}: '{_path(group, name)}'"
    if not isinstance(array, h5py.Dataset):
        raise StoreError(f"{_file(group)} has no array '{_path(group, name)}' of shape {show_shape(shape)}")
    try:
        elsewhere = array.is_virtual or array.external is not None  # first: a virtual shape looks into other files
        if not elsewhere:
            check_kind(where, array.dtype, array.shape, shape, kinds)
            whole = _is_whole(array)
    except StoreError:
        raise
    except _DAMAGE as error:
        raise StoreError(f"{where} is damaged ({error})") from error
    if elsewhere:
        raise StoreError(f"{where} keeps its values in another file; only what is inside this one is read")
    if not whole:
        raise StoreError(f"{where} is incomplete: some of its values were never written")
    return array


def read(array: "h5py.Dataset", start: int = 0, stop: int | None = None) -> NDArray:
    """Rows `start` to `stop` of an array.

    Raises:
        StoreError: they cannot be decoded, or a value is NaN or Inf.
    """
    name = f"{_file(array)}: '{array.name}'"
    try:
        values = np.asarray(array[start:stop])
    except _DAMAGE as error:
        raise StoreError(f"{name} is damaged, it cannot be read ({error})") from error
    check_finite(name, values)
    return values


def read_text(group: "h5py.Group", name: str) -> str:
    """The attribute `name` of a group, a text.

    The HDF5 library itself may loop for ever over a text whose place in the file was damaged.

    Raises:
        StoreError: it is absent, damaged, or no text.
    """
    try:
        value: Any = group.attrs.get(name)
        text = value.decode() if isinstance(value, bytes) else value
    except _DAMAGE as error:
        raise StoreError(f"{_file(group)}: attribute '{name}' of '{group.name}' is damaged ({error})") from error
    if not isinstance(text, str):
        raise StoreError(f"{_file(group)}: '{group.name}' has no text attribute '{name}'")
    return text


def _find(group: "h5py.Group", name: str) -> Any:
    """Follows a path member by member, so that no link on the way is taken; None where it ends."""
    import h5py

    found: Any = group
    for part in name.strip("/").split("/"):
        if not isinstance(found, h5py.Group):
            return None
        where = f"{_file(group)}: '{_path(found, part)}'"
        try:
            link = found.get(part, getlink=True)
            direct = isinstance(link, h5py.HardLink)
            found = found[part] if direct else None
        except _DAMAGE as error:
            raise StoreError(f"{where} is damaged or a link of unknown kind ({error})") from error
        if link is not None and not direct:
            raise StoreError(f"{where} is a link; links are not followed, only what is inside this file is read")
    return found


def _is_whole(array: "h5py.Dataset") -> bool:
    """Whether every value has been given a place in the file."""
    if array.size == 0:
        return True
    if array.chunks is None:
        return array.id.get_storage_size() == array.size * array.dtype.itemsize
    asked = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
    return array.id.get_num_chunks() == asked


def _file(item: Any) -> str:
    return str(item.file.filename)


def _path(group: "h5py.Group", name: str) -> str:
    return f"{group.name.rstrip('/')}/{name}"
