"""Conversion of the human Push-T demonstrations: what is written, that it replays, what is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lerobot.configs.types import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.feature_utils import dataset_to_policy_features

from env_configs.demos.__main__ import main
from env_configs.demos.dataset import Episode, write_dataset
from env_configs.demos.pusht_zarr import convert
from env_configs.demos.zarr_store import StoreError
from env_configs.pusht import FmPushtEnv
from env_configs.pusht_geometry import coverage, keypoints

Arrays = dict[str, np.ndarray]


def columns(dataset: LeRobotDataset) -> Arrays:
    """The whole table of a data set."""
    table = dataset.hf_dataset.with_format("numpy")
    return {name: np.asarray(table[:][name]) for name in table.column_names if name != "observation.image"}


def test_frames_and_episodes_are_the_recorded_ones(converted, few):
    table, ends = columns(converted), few["meta/episode_ends"]
    assert (converted.num_episodes, converted.num_frames, converted.fps) == (len(ends), ends[-1], 10)
    np.testing.assert_array_equal(table["observation.state"], few["data/state"][:, :2])
    np.testing.assert_array_equal(table["action"], few["data/action"])
    np.testing.assert_array_equal(table["episode_index"], np.searchsorted(ends, np.arange(ends[-1]), "right"))
    np.testing.assert_allclose(table["timestamp"], table["frame_index"] / 10, rtol=1e-6)
    corners = keypoints(few["data/state"][:, 2:])
    np.testing.assert_allclose(table["observation.environment_state"], corners, atol=1e-4, rtol=0)


def test_outcomes_are_those_of_the_next_frame(converted, few):
    table, ends = columns(converted), few["meta/episode_ends"]
    covered = coverage(few["data/state"][:, 2:])
    last = np.isin(np.arange(ends[-1]), ends - 1)
    after = np.where(last, covered, np.append(covered[1:], np.nan))
    np.testing.assert_array_equal(table["next.done"], last)
    np.testing.assert_array_equal(table["next.success"], after > 0.95)
    np.testing.assert_allclose(table["next.reward"], np.clip(after / 0.95, 0, 1), rtol=1e-6)
    assert 0.5 < table["next.reward"].max() <= 1


def test_features_are_those_of_the_public_data_sets(converted):
    kinds = {name: feature.type for name, feature in dataset_to_policy_features(converted.features).items()}
    assert kinds["observation.environment_state"] is FeatureType.ENV
    assert kinds["observation.state"] is FeatureType.STATE
    assert kinds["action"] is FeatureType.ACTION
    assert {"next.reward", "next.done", "next.success"} <= set(converted.features)
    assert converted[0]["task"] == "Push the T-shaped block onto the T-shaped target."


def test_a_converted_episode_replays(converted):
    """From its first state its actions give its states, in the simulator, to a fraction of a pixel."""
    pytest.importorskip("gym_pusht", reason="needs the extra pusht")
    table = columns(converted)
    recorded = np.concatenate([table["observation.state"], table["observation.environment_state"]], axis=1)
    errors = []
    for number in range(converted.num_episodes):
        rows = table["episode_index"] == number
        errors.append(np.abs(replay(recorded[rows], table["action"][rows]) - recorded[rows]).max(axis=1))
    assert np.median(np.concatenate(errors)) < 1e-4
    assert max(error.max() for error in errors) < 0.1


def test_mirrored_demonstrations_come_beside_their_own_and_replay(few, make_store, converted, tmp_path):
    """They obey the simulator as the recorded ones do."""
    pytest.importorskip("gym_pusht", reason="needs the extra pusht")
    source = make_store({name: few[name] for name in few if name != "data/img"})
    assert main(["pusht", "--source", str(source), "--root", str(tmp_path / "set"), "--mirror"]) == 0
    table, recorded = columns(LeRobotDataset("local/set", root=tmp_path / "set")), columns(converted)
    for name in recorded.keys() - {"index", "episode_index"}:
        np.testing.assert_array_equal(table[name][table["episode_index"] % 2 == 0], recorded[name])
    mirrored = {name: table[name][table["episode_index"] % 2 == 1] for name in table}
    np.testing.assert_array_equal(mirrored["action"], 512 - recorded["action"][:, ::-1])
    np.testing.assert_array_equal(mirrored["observation.state"], 512 - recorded["observation.state"][:, ::-1])
    np.testing.assert_allclose(mirrored["next.reward"], recorded["next.reward"], atol=1e-6)
    seen = np.concatenate([mirrored["observation.state"], mirrored["observation.environment_state"]], axis=1)
    errors = []
    for number in np.unique(mirrored["episode_index"]):
        rows = mirrored["episode_index"] == number
        errors.append(np.abs(replay(seen[rows], mirrored["action"][rows]) - seen[rows]).max(axis=1))
    assert np.median(np.concatenate(errors)) < 1e-4
    assert max(error.max() for error in errors) < 0.1


def replay(recorded: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """States (T, 2 + 16) that the actions lead to from the first recorded one."""
    left, right = recorded[0, 2:4].astype(float), recorded[0, 4:6].astype(float)
    angle = np.arctan2(*(right - left)[::-1])
    # The reset turns the block about its centre of mass (0, 45) after it placed it.
    place = (left + right) / 2 - [45 * np.sin(angle), 45 * (1 - np.cos(angle))]
    env = FmPushtEnv().make()
    seen, _ = env.reset(options={"reset_to_state": [*recorded[0, :2].astype(float), *place, angle]})
    states = [seen, *(env.step(action)[0] for action in actions[:-1])]
    return np.array([np.concatenate([seen["agent_pos"], seen["environment_state"]]) for seen in states])


def test_pictures_are_kept_without_loss(few, make_store, tmp_path):
    shortened = cut(few, episodes=2)
    source = make_store(shortened)
    assert main(["pusht", "--source", str(source), "--root", str(tmp_path / "set"), "--obs", "image"]) == 0
    dataset = LeRobotDataset("local/set", root=tmp_path / "set")
    assert dataset.features["observation.image"]["dtype"] == "image"
    assert "observation.environment_state" not in dataset.features
    for frame in (0, 50, len(dataset) - 1):
        pixels = (dataset[frame]["observation.image"] * 255).round().byte().permute(1, 2, 0)
        np.testing.assert_array_equal(pixels.numpy(), shortened["data/img"][frame])


def test_mirrored_pictures_are_the_recorded_ones_mirrored(few, make_store, tmp_path):
    shortened = cut(few, episodes=2)
    convert(make_store(shortened), tmp_path / "set", "image", mirror=True)
    dataset, first = LeRobotDataset("local/set", root=tmp_path / "set"), shortened["meta/episode_ends"][0]
    mirrored = (dataset[int(first) + 7]["observation.image"] * 255).round().byte().permute(1, 2, 0).numpy()
    recorded = shortened["data/img"][7]
    for row, column in ((0, 0), (10, 70), (48, 20), (95, 3)):
        np.testing.assert_array_equal(mirrored[row, column], recorded[95 - column, 95 - row])


def cut(arrays: Arrays, episodes: int) -> Arrays:
    """The first episodes only."""
    ends = arrays["meta/episode_ends"][:episodes]
    rest = {name: values[: ends[-1]] for name, values in arrays.items()}
    return rest | {"meta/episode_ends": ends}


def test_a_zip_and_a_folder_give_the_same(few, make_store, converted, tmp_path):
    zipped = zip_store(make_store({name: few[name] for name in few if name != "data/img"}))
    assert convert(zipped, tmp_path / "set") == (converted.num_episodes, converted.num_frames)
    ours, theirs = columns(LeRobotDataset("local/set", root=tmp_path / "set")), columns(converted)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def zip_store(folder: Path) -> Path:
    """The same store in a zip, uncompressed as zarr writes it."""
    return Path(shutil.make_archive(str(folder), "zip", folder))


def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    """Replaces one array of a store."""
    return lambda arrays: arrays | {name: edit(arrays[name])}


def put(values: np.ndarray, index: tuple[int, ...] | int, value: float) -> np.ndarray:
    """A copy with one other value."""
    values = values.copy()
    values[index] = value
    return values


WRONG: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "no actions": (
        lambda a: {n: v for n, v in a.items() if n != "data/action"},
        r"no array 'data/action' of .*\(\d",
    ),
    "other task": (change("data/state", lambda s: np.tile(s, 12)[:, :59]), r"'data/state' is .*59.*\(N, 5\)"),
    "fewer actions": (
        change("data/action", lambda a: a[:-1]),
        r"'data/action' is .*expected numbers of shape",
    ),
    "no numbers": (change("data/state", lambda s: s > 3), r"'data/state' is bool.*expected numbers"),
    "NaN": (change("data/state", lambda s: put(s, (7, 3), np.nan)), "'data/state' holds NaN or Inf"),
    "Inf": (change("data/action", lambda a: put(a, (7, 1), np.inf)), "'data/action' holds NaN or Inf"),
    "normalised": (
        change("data/action", lambda a: a / 256 - 1),
        "'data/action' must hold pixels 0-512; it has -0",
    ),
    "far away": (
        change("data/state", lambda s: put(s, (3, 2), 700)),
        "'data/state' must hold pixels 0-512.* 700",
    ),
    "no ends": (
        lambda a: {n: v for n, v in a.items() if n != "meta/episode_ends"},
        "no array 'meta/episode_ends'",
    ),
    "ends repeat": (
        change("meta/episode_ends", lambda e: put(e, 1, e[0])),
        "must be whole numbers that increase",
    ),
    "ends from 0": (
        change("meta/episode_ends", lambda e: put(e, 0, 0)),
        "must be whole numbers that increase",
    ),
    "ends too early": (change("meta/episode_ends", lambda e: e[:-1]), "to 579, the number of frames"),
    "ends too late": (change("meta/episode_ends", lambda e: put(e, -1, 999)), "to 579, the number of frames"),
    "broken ends": (change("meta/episode_ends", lambda e: e + 0.5), "must be whole numbers that increase"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_foreign_stores_are_refused_by_name(wrong, few, make_store, tmp_path):
    edit, message = WRONG[wrong]
    source = make_store(edit({name: few[name] for name in few if name != "data/img"}))
    refused(source, tmp_path / "set", message)


def refused(source: Path, root: Path, message: str, obs: str = "state") -> None:
    """The store is named in the error, and nothing is written."""
    beside = set(root.parent.iterdir())
    with pytest.raises(StoreError, match=message) as refusal:
        convert(source, root, obs)
    assert source.name in str(refusal.value)
    assert set(root.parent.iterdir()) == beside


def test_a_store_of_another_task_is_refused(fm_data, tmp_path):
    source = fm_data / "kitchen" / "kitchen_complete_v2.zarr.zip"
    refused(source, tmp_path / "set", r"'data/state' is .*59.*expected numbers of shape \(N, 5\)")


def test_pictures_of_another_kind_are_refused(few, make_store, tmp_path):
    two = cut(few, episodes=2)
    refused(
        make_store(two | {"data/img": two["data/img"] / 255}),
        tmp_path / "set",
        "whole numbers 0-255",
        "image",
    )
    refused(make_store(two | {"data/img": two["data/img"][:, ::2]}), tmp_path / "set", "48, 96, 3", "image")
    del two["data/img"]
    refused(make_store(two), tmp_path / "set", "no array 'data/img'", "image")


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zarr.zip").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    refused(tmp_path / "absent.zarr", tmp_path / "set", "does not exist; expected a zarr store")
    refused(tmp_path / "text.zarr.zip", tmp_path / "set", "neither a folder nor a whole zip file")
    refused(tmp_path / "empty", tmp_path / "set", "not a zarr store")
    refused(tmp_path / "other.zip", tmp_path / "set", "not a zarr store")


def test_a_cut_zip_is_refused(pusht_store, tmp_path):
    with pusht_store.open("rb") as whole:
        (tmp_path / "cut.zarr.zip").write_bytes(whole.read(1_000_000))
    refused(tmp_path / "cut.zarr.zip", tmp_path / "set", "neither a folder nor a whole zip file")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        (".zgroup", lambda text: text[:-3]),
        ("data/state/.zarray", lambda text: text[:-3]),
        ("data/state/.zarray", lambda text: text.replace('"order"', '"qrder"')),
        ("data/state/.zarray", lambda text: text.replace('"shuffle"', '"qhuffle"')),
    ],
)
def test_a_damaged_description_is_refused(few, make_store, tmp_path, name, spoil):
    source = make_store({name: few[name] for name in few if name != "data/img"})
    text = (source / name).read_text()
    assert spoil(text) != text
    (source / name).write_text(spoil(text))
    refused(source, tmp_path / "set", "is damaged, its description cannot be read")


def test_a_damaged_zip_entry_is_refused(few, make_store, tmp_path):
    zipped = zip_store(make_store({name: few[name] for name in few if name != "data/img"}))
    with zipfile.ZipFile(zipped) as archive:
        entry = archive.getinfo("data/state/.zarray")
    content = bytearray(zipped.read_bytes())
    content[entry.header_offset + 30 + len(entry.filename) + 20] ^= 0xFF
    zipped.write_bytes(content)
    refused(zipped, tmp_path / "set", "'data/state' is damaged, its description cannot be read")


def test_damaged_chunks_are_refused(few, make_store, tmp_path):
    source = make_store({name: few[name] for name in few if name != "data/img"})
    zipped = zip_store(source)
    with zipfile.ZipFile(zipped) as archive:
        chunk = archive.getinfo("data/state/1.0")
    content = bytearray(zipped.read_bytes())
    content[chunk.header_offset + 200] ^= 0xFF
    zipped.write_bytes(content)
    refused(zipped, tmp_path / "set", "'data/state' is damaged")
    chunk_file = source / "data" / "state" / "1.0"
    chunk_file.write_bytes(chunk_file.read_bytes()[:20])
    refused(source, tmp_path / "set", "'data/state' is damaged")
    chunk_file.unlink()
    refused(source, tmp_path / "set", "'data/state' is incomplete, 3 of 4 chunks")


def test_an_existing_target_is_kept_and_named(few, make_store, tmp_path, capsys):
    source = make_store({name: few[name] for name in few if name != "data/img"})
    target = tmp_path / "mine"
    target.mkdir()
    (target / "file").write_text("precious")
    assert main(["pusht", "--source", str(source), "--root", str(target)]) == 1
    assert f"{target} exists already" in capsys.readouterr().err
    assert (target / "file").read_text() == "precious"


def test_unknown_observations_are_refused(few, make_store, tmp_path):
    with pytest.raises(ValueError, match=r"obs must be one of .*state.*image.*not 'pixels'"):
        convert(make_store(few), tmp_path / "set", "pixels")


FEATURES = {"action": {"dtype": "float32", "shape": (2,), "names": None}}


def numbered(count: int) -> Iterator[Episode]:
    """Episodes of 3 frames."""
    for _ in range(count):
        yield Episode({"action": np.zeros((3, 2), np.float32)}, "rest")


def test_a_failure_on_the_way_leaves_nothing(tmp_path):
    def failing() -> Iterator[Episode]:
        yield from numbered(2)
        raise OSError("the source went away")

    with pytest.raises(OSError, match="went away"):
        write_dataset(tmp_path / "set", 10, FEATURES, failing())
    with pytest.raises(ValueError, match="no episode to write"):
        write_dataset(tmp_path / "set", 10, FEATURES, numbered(0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"action": np.zeros((3, 4), np.float32)},
            r"episode 1: 'action' has shape \(3, 4\), expected \(3, 2\)",
        ),
        ({"action": np.zeros((0, 2), np.float32)}, "episode 1: 'action' has shape"),
        ({"action": np.full((3, 2), np.nan, np.float32)}, "episode 1: 'action' holds NaN or Inf"),
        ({"act": np.zeros((3, 2), np.float32)}, "episode 1 has columns .'act'., not .'action'."),
    ],
)
def test_episodes_that_do_not_fit_are_refused_by_number(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "set", 10, FEATURES, [*numbered(1), Episode(bad, "rest")])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_no_target(pusht_store, tmp_path):
    root = tmp_path / "set"
    command = [
        sys.executable,
        "-m",
        "env_configs.demos",
        "pusht",
        "--source",
        str(pusht_store),
        "--root",
        str(root),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    limit = time.monotonic() + 120
    while not list(tmp_path.glob(".set.unfinished-*/set/data/**/*.parquet")) and time.monotonic() < limit:
        assert process.poll() is None, "the conversion ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not root.exists()
    assert write_dataset(root, 10, FEATURES, numbered(2)) == (2, 6)
    assert LeRobotDataset("local/set", root=root).num_frames == 6
