"""HDF5 files: what is inside is read, what is damaged or elsewhere is refused by name."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from env_configs.demos.hdf5_store import find_array, find_group, has, numbered, open_hdf5, read, read_text
from env_configs.demos.stores import StoreError

h5py = pytest.importorskip("h5py", reason="needs the extra kitchen or robosuite")

NUMBERS = np.arange(60, dtype=np.float32).reshape(20, 3)
SHAPE = (None, 3)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Callable[["h5py.File"], object]], Path]:
    """Writes a file with the arrays `data/plain` and `data/packed`, then what the test adds."""

    def make(add: Callable[["h5py.File"], object] = lambda file: None, name: str = "demos.hdf5") -> Path:
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            file["data/plain"] = NUMBERS
            file.create_dataset("data/packed", data=NUMBERS, chunks=(6, 3), compression="gzip", fletcher32=True)
            file["data"].attrs["told"] = "two arms"
            add(file)
        return path

    return make


def take(path: Path, name: str = "data/plain", **options) -> np.ndarray:
    with open_hdf5(path, "kitchen") as file:
        return read(find_array(file, name, SHAPE), **options)


def test_arrays_groups_and_texts_inside_are_read(write):
    path = write(lambda file: file.create_group("data/demo_10") and file.create_group("data/demo_9"))
    for name in ("data/plain", "/data/packed"):
        np.testing.assert_array_equal(take(path, name), NUMBERS)
        np.testing.assert_array_equal(take(path, name, start=2, stop=5), NUMBERS[2:5])
    with open_hdf5(path, "kitchen") as file:
        data = find_group(file, "data")
        assert numbered(data, "demo_") == ["demo_9", "demo_10"]
        assert read_text(data, "told") == "two arms"
        assert has(data, "demo_9")
        assert not has(data, "demo_8")
        assert not has(data, "plain/deeper")


def test_truth_values_are_read_where_they_are_asked_for(write):
    ends = np.array([False, True])
    path = write(lambda file: file.create_dataset("ends", data=ends))
    with open_hdf5(path, "kitchen") as file:
        np.testing.assert_array_equal(read(find_array(file, "ends", (2,), kinds="b")), ends)
        with pytest.raises(StoreError, match=r"'/ends' is bool\(2,\), expected numbers of shape \(2\)"):
            find_array(file, "ends", (2,))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that a stranger's file points at."""
    path = tmp_path / "secret.hdf5"
    with h5py.File(path, "w") as file:
        file["data/plain"] = NUMBERS
    return path


def external_array(file, secret):
    file["x/plain"] = h5py.ExternalLink(secret, "/data/plain")


def external_group(file, secret):
    file["x"] = h5py.ExternalLink(secret, "/data")


def soft(file, secret):
    file["x"] = h5py.SoftLink("/data")


def soft_to_external(file, secret):
    file["y"] = h5py.ExternalLink(secret, "/")
    file["x"] = h5py.SoftLink("/y/data")


def raw_storage(file, secret):
    file.create_dataset("x/plain", (20, 3), "f4", external=[(secret, 0, 240)])


def virtual(file, secret):
    layout = h5py.VirtualLayout((20, 3), "f4")
    layout[:] = h5py.VirtualSource(secret, "/data/plain", (20, 3))
    file.create_virtual_dataset("x/plain", layout)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (external_array, "'/x/plain' is a link; links are not followed"),
        (external_group, "'/x' is a link; links are not followed"),
        (soft, "'/x' is a link; links are not followed"),
        (soft_to_external, "'/x' is a link; links are not followed"),
        (raw_storage, "'/x/plain' keeps its values in another file"),
        (virtual, "'/x/plain' keeps its values in another file"),
    ],
)
def test_nothing_outside_the_file_is_read(point, message, write, secret):
    path = write(lambda file: point(file, str(secret)))
    with h5py.File(path) as file:
        assert file["x/plain"].shape == (20, 3)  # h5py itself would follow
    with pytest.raises(StoreError, match=message) as refusal:
        take(path, "x/plain")
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda f: f.create_dataset("a", (40, 3), "f4", chunks=(10, 3))[:10].sum(), "incomplete"),
        (lambda f: f.create_dataset("a", (40, 3), "f4"), "incomplete"),
        (
            lambda f: f.create_dataset("a", data=np.zeros((4, 2))),
            r"float64\(4, 2\), expected numbers of shape \(N, 3\)",
        ),
        (lambda f: f.create_dataset("a", data=np.zeros(3)), "expected numbers"),
        (lambda f: f.create_dataset("a", data=[[b"x", b"y", b"z"]]), "expected numbers"),
        (lambda f: f.create_dataset("a", data=[[np.nan, 0, 0]]), "NaN or Inf"),
        (lambda f: f.create_group("a"), r"has no array '/a' of shape \(N, 3\)"),
        (lambda f: f.create_group("b"), r"has no array '/a' of shape \(N, 3\)"),
    ],
)
def test_what_is_incomplete_or_of_another_kind_is_refused(add, message, write):
    path = write(add)
    with pytest.raises(StoreError, match=message) as refusal:
        take(path, "a")
    assert "'/a'" in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_absent_groups_and_texts_are_named(write):
    with open_hdf5(write(), "kitchen") as file:
        for name in ("mask", "data/plain"):
            with pytest.raises(StoreError, match=f"has no group '/{name}'"):
                find_group(file, name)
        file_data = find_group(file, "data")
        with pytest.raises(StoreError, match="'/data' has no text attribute 'env_args'"):
            read_text(file_data, "env_args")


def test_a_cut_file_is_refused_wherever_it_was_cut(write, tmp_path):
    whole = write().read_bytes()
    for size in range(0, len(whole), 97):
        part = tmp_path / "part.hdf5"
        part.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="part.hdf5"):
            take(part)


def test_a_changed_byte_gives_numbers_of_the_wanted_shape_or_a_refusal(write, tmp_path):
    """HDF5 has no check sums everywhere, so that not each change is seen; but no other error may come out."""
    whole = write().read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(len(whole), size=300):
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        path = tmp_path / "changed.hdf5"
        path.write_bytes(changed)
        try:
            assert take(path, "data/packed").shape[1:] == NUMBERS.shape[1:]
        except StoreError:
            refused += 1
    assert 10 < refused < 290


@pytest.mark.parametrize("content", [None, b"", b"no HDF5 at all", b"\x89HDF\r\n\x1a\n"])
def test_foreign_files_are_refused_by_name(content, tmp_path):
    path = tmp_path / "foreign.hdf5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"foreign\.hdf5 is"):
        take(path)


def test_a_missing_reader_is_named_with_its_cure(write, monkeypatch):
    path = write()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"h5py.*uv sync --extra robosuite"), open_hdf5(path, "robosuite"):
        pass
