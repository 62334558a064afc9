"""The window store: equal to LeRobot's own loader, built once, refused where it does not belong."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.processor.converters import batch_to_transition, transition_to_batch

from fm_policy import window_store
from fm_policy.window_store import WindowStoreStep, fingerprint, of_policy, open_store

OBSERVED, ACTED = [-1, 0], list(range(-1, 15))
LENGTHS = (20, 3, 12)
FPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set with vectors, a scalar, an image and short episodes."""
    root = tmp_path_factory.mktemp("data") / "small"
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        "observation.gripper": {"dtype": "float32", "shape": (1,), "names": ["open"]},
        "observation.image": {
            "dtype": "image",
            "shape": (16, 24, 3),
            "names": ["height", "width", "channels"],
        },
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": ["reward"]},
    }
    dataset = LeRobotDataset.create("local/small", fps=FPS, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for _ in range(length):
            dataset.add_frame(
                {
                    "observation.state": rng.normal(size=3).astype(np.float32),
                    "observation.gripper": rng.normal(size=1).astype(np.float32),
                    "observation.image": rng.integers(0, 256, (16, 24, 3), dtype=np.uint8),
                    "action": rng.normal(size=2).astype(np.float32),
                    "next.reward": np.zeros(1, dtype=np.float32),
                    "task": "test",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A LeRobot home of its own for every test, and no store left attached."""
    monkeypatch.setattr(window_store, "HF_LEROBOT_HOME", tmp_path)
    monkeypatch.setattr(window_store, "_store", None)
    return tmp_path / "fm_ft" / "windows"


def plain_dataset(root: Path, episodes: list[int] | None = None) -> LeRobotDataset:
    keys = {"observation.state": OBSERVED, "observation.gripper": OBSERVED, "observation.image": OBSERVED}
    deltas = {key: [i / FPS for i in window] for key, window in {**keys, "action": ACTED}.items()}
    return LeRobotDataset("local/small", root=root, episodes=episodes, delta_timestamps=deltas)


def run_step(batch: dict) -> dict:
    return transition_to_batch(WindowStoreStep()(batch_to_transition(batch)))


def batches(dataset: LeRobotDataset) -> list[dict]:
    return list(torch.utils.data.DataLoader(dataset, batch_size=8))


@pytest.mark.parametrize("episodes", [None, [0, 2]], ids=["all", "some-episodes"])
def test_windows_equal_lerobots_index_by_index(root, episodes):
    single = LeRobotDataset("local/small", root=root, episodes=episodes)
    window_store.attach(open_store(single.meta, OBSERVED, ACTED))
    pairs = list(zip(batches(single), batches(plain_dataset(root, episodes)), strict=True))
    assert sum(len(batch["index"]) for batch, _ in pairs) == (35 if episodes is None else 32)
    padded = 0
    for batch, expected in pairs:
        ours, theirs = run_step(batch), transition_to_batch(batch_to_transition(expected))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key == "observation.gripper":  # of shape (1,), an axis that LeRobot drops
                value = value.unsqueeze(-1)
            same = torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
            assert same, key
            assert not isinstance(value, torch.Tensor) or ours[key].dtype == value.dtype
        padded += int(ours["action_is_pad"].sum())
    assert padded > 0


def test_a_policy_gets_what_it_sees_and_the_store_grows_by_what_another_one_sees(root, home):
    meta, windows = (
        LeRobotDataset("local/small", root=root).meta,
        SimpleNamespace(observation_window=OBSERVED, action_window=ACTED),
    )
    seen = of_policy(meta, windows, ["observation.gripper"])

    def held() -> list[str]:
        return sorted(path.stem for path in home.glob("*/*.npy"))

    assert set(seen.windows) == {"observation.gripper", "action"}
    assert held() == ["action", "observation.gripper"]
    of_policy(meta, windows, ["observation.state"])
    assert held() == ["action", "observation.gripper", "observation.state"]
    pixels = of_policy(meta, windows, ["observation.image"]).arrays["observation.image"]  # pictures are lacking alone
    assert pixels.shape == (35, 3, 16, 24) and pixels.dtype == np.uint8
    renamed = of_policy(meta, windows, ["observation.images.front"])
    assert {"observation.image", "observation.state"} < set(renamed.windows)


def test_a_full_disk_is_told_before_anything_is_written(root, home, monkeypatch):
    monkeypatch.setattr(window_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"local/small needs 0\.0 GB in .*, which has 0\.0: set HF_LEROBOT_HOME"):
        open_store(LeRobotDataset("local/small", root=root).meta, OBSERVED, ACTED)
    assert not [path for path in home.iterdir() if path.is_dir()]


def test_actions_of_one_number_become_windows(tmp_path):
    """LeRobot hands them out as `(B,)`, and windows of them as `(B, T)`."""
    features = {name: {"dtype": "float32", "shape": (1,), "names": None} for name in ("observation.state", "action")}
    dataset = LeRobotDataset.create("local/one", fps=FPS, features=features, root=tmp_path / "one", use_videos=False)
    for step in range(6):
        dataset.add_frame({name: np.float32([step]) for name in features} | {"task": "test"})
    dataset.save_episode()
    dataset.finalize()
    dataset = LeRobotDataset("local/one", root=tmp_path / "one")
    window_store.attach(open_store(dataset.meta, OBSERVED, ACTED))
    ours = run_step(batches(dataset)[0])
    assert ours["action"].shape == (6, len(ACTED), 1)
    assert ours["observation.state"].shape == (6, len(OBSERVED), 1)
    inside = ~ours["action_is_pad"]
    wanted = torch.arange(6)[:, None] + torch.tensor(ACTED)
    assert torch.equal(ours["action"][..., 0][inside], wanted[inside].float())


def test_is_built_once_and_leaves_nothing_half_written(root, home, monkeypatch):
    meta = LeRobotDataset("local/small", root=root).meta
    open_store(meta, OBSERVED, ACTED)
    assert [path.name for path in home.iterdir() if path.is_dir()] == [fingerprint(root)]
    monkeypatch.setattr(window_store, "build", None)  # a second build would fail
    open_store(meta, OBSERVED, ACTED)


def test_an_interrupted_build_leaves_no_store(root, home, monkeypatch):
    meta = LeRobotDataset("local/small", root=root).meta

    def fail(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(window_store, "_write_arrays", fail)
        with pytest.raises(KeyboardInterrupt):
            open_store(meta, OBSERVED, ACTED)
    assert not [path for path in home.iterdir() if path.is_dir()]
    open_store(meta, OBSERVED, ACTED)


def test_what_killed_builds_left_is_removed_by_the_next_one(root, home):
    """`SIGKILL` gives nobody time to clean up."""
    meta = LeRobotDataset("local/small", root=root).meta
    for left in ("half", "other"):
        (home / f"{fingerprint(root)}.{left}").mkdir(parents=True)
        (home / f"{fingerprint(root)}.{left}" / "action.npy").write_bytes(b"half")
    (home / "another.store").mkdir()
    open_store(meta, OBSERVED, ACTED)
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == sorted([fingerprint(root), "another.store"])


def test_one_builds_while_the_others_wait(root, home, monkeypatch):
    meta = LeRobotDataset("local/small", root=root).meta
    builds = []
    build = window_store.build
    monkeypatch.setattr(window_store, "build", lambda *args: (builds.append(1), build(*args)))
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: open_store(meta, OBSERVED, ACTED), range(3)))
    assert len(builds) == 1
    windows = [store.gather("action", np.arange(35))[0] for store in stores]
    assert all(torch.equal(windows[0], other) for other in windows)


def test_other_batches_pass_untouched(root):
    dataset = plain_dataset(root)
    window_store.attach(open_store(dataset.meta, OBSERVED, ACTED))
    windows = batches(dataset)[0]
    assert run_step(windows)["action"] is windows["action"]
    observation = {"observation.state": torch.zeros(1, 3)}
    assert torch.equal(run_step(observation)["observation.state"], observation["observation.state"])


def test_single_frames_without_a_store_are_refused(root):
    batch = batches(LeRobotDataset("local/small", root=root))[0]
    with pytest.raises(ValueError, match="holds single frames, and there is no window store"):
        run_step(batch)


def test_frames_of_another_data_set_or_transformed_ones_are_refused(root):
    dataset = LeRobotDataset("local/small", root=root)
    window_store.attach(open_store(dataset.meta, OBSERVED, ACTED))
    batch = batches(dataset)[0]
    for key in ("observation.state", "action", "observation.image"):
        with pytest.raises(ValueError, match=f"'{key}' of the loaded frames differs"):
            run_step({**batch, key: batch[key] + 0.01})


def test_a_changed_data_set_gets_a_new_fingerprint(root, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    before = fingerprint(copy)
    assert fingerprint(copy) == before
    with (copy / "meta" / "info.json").open("a") as file:
        file.write(" ")
    assert fingerprint(copy) != before


def test_a_damaged_store_is_named(root, home):
    meta = LeRobotDataset("local/small", root=root).meta
    open_store(meta, OBSERVED, ACTED)
    (array,) = home.glob("*/action.npy")
    array.write_bytes(array.read_bytes()[:150])
    with pytest.raises(ValueError, match="is damaged .* delete that folder"):
        open_store(meta, OBSERVED, ACTED)
