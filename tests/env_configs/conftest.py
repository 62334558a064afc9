"""Push-T recordings for the tests of the tasks: the real store, and small stores cut out of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from zarr.storage import ZipStore

from env_configs.demos.pusht_zarr import convert

EPISODES = 4


@pytest.fixture(scope="session")
def pusht_store(fm_data: Path) -> Path:
    """All human Push-T demonstrations."""
    return fm_data / "pusht" / "pusht_cchi_v7_replay.zarr.zip"


@pytest.fixture(scope="session")
def recording(pusht_store: Path) -> dict[str, np.ndarray]:
    """Every state, action and episode end of the store."""
    with ZipStore(pusht_store, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        names = ("data/state", "data/action", "meta/episode_ends")
        return {name: np.asarray(group[name][:]) for name in names}


@pytest.fixture(scope="session")
def few(pusht_store: Path, recording: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first episodes of the store, pictures included."""
    ends = recording["meta/episode_ends"][:EPISODES]
    with ZipStore(pusht_store, mode="r") as store:
        pictures = np.asarray(zarr.open_group(store, mode="r")["data/img"][: ends[-1]])
    rows = {name: recording[name][: ends[-1]] for name in ("data/state", "data/action")}
    return rows | {"data/img": pictures, "meta/episode_ends": ends}


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Path]:
    """Writes arrays by name as a zarr v2 store, a folder."""

    def make(arrays: dict[str, np.ndarray]) -> Path:
        folder = tmp_path / "few.zarr"
        group = zarr.open_group(folder, mode="w", zarr_format=2)
        for name, values in arrays.items():
            group.create_array(name, data=values, chunks=(161, *values.shape[1:]))
        return folder

    return make


@pytest.fixture(scope="session")
def converted(few: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    """The first episodes as a data set with states, converted from a folder."""
    folder = tmp_path_factory.mktemp("pusht")
    group = zarr.open_group(folder / "few.zarr", mode="w", zarr_format=2)
    for name in ("data/state", "data/action", "meta/episode_ends"):
        group.create_array(name, data=few[name], chunks=(161, *few[name].shape[1:]))
    convert(folder / "few.zarr", folder / "set")
    return LeRobotDataset("local/set", root=folder / "set")
