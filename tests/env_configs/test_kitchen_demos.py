"""Kitchen recordings: read out of every published form, converted, replayed, refused where they are broken."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lerobot.configs.types import FeatureType
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.utils import env_to_policy_features
from lerobot.utils.feature_utils import dataset_to_policy_features

from env_configs.demos.__main__ import main
from env_configs.demos.kitchen import convert, joint_targets, outcome
from env_configs.demos.kitchen_sources import Recording, recordings
from env_configs.demos.stores import StoreError
from env_configs.kitchen import FmKitchenEnv
from env_configs.kitchen_tasks import JOINT_LIMITS, TASKS

h5py = pytest.importorskip("h5py", reason="needs the extra kitchen")
zarr = pytest.importorskip("zarr", reason="needs zarr")

Arrays = dict[str, np.ndarray]
LENGTHS = (12, 7, 9)


@pytest.fixture(scope="session")
def human(fm_data: Path) -> list[Recording]:
    """The 19 human demonstrations."""
    return recordings(fm_data / "kitchen" / "kitchen_complete_v2.zarr.zip")


@pytest.fixture
def few(human: list[Recording]) -> Arrays:
    """Short pieces of three demonstrations as flat arrays, the observations in the layout d4rl."""
    pieces = [(joined(demo)[:length], demo.actions[:length]) for demo, length in zip(human, LENGTHS, strict=False)]
    seen, actions = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return {"seen": seen, "actions": actions, "ends": np.cumsum(LENGTHS)}


def joined(demo: Recording) -> np.ndarray:
    q, v = demo.positions, demo.velocities
    return np.concatenate([q[:, :9], v[:, :9], q[:, 9:], v[:, 9:]], axis=1)


def relay(seen: np.ndarray) -> np.ndarray:
    """Observations in the layout relay, with a goal at the end as in the recordings."""
    return np.concatenate([seen[:, :9], seen[:, 18:39], np.full((len(seen), 30), 0.5)], axis=1)


def as_zarr(path: Path, few: Arrays) -> Path:
    group = zarr.open_group(path / "few.zarr", mode="w", zarr_format=2)
    names = {"data/state": "seen", "data/action": "actions", "meta/episode_ends": "ends"}
    for name, key in names.items():
        group.create_array(name, data=few[key])
    return path / "few.zarr"


def as_zip(path: Path, few: Arrays) -> Path:
    folder = as_zarr(path, few)
    with zipfile.ZipFile(path / "few.zip", "w") as archive:
        for file in folder.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path / "few.zip"


def as_minari(path: Path, few: Arrays) -> Path:
    """Minari's folder; its episodes have one more observation than actions."""
    (path / "data").mkdir()
    with h5py.File(path / "data" / "main_data.hdf5", "w") as file:
        for number, (start, end) in enumerate(spans(few)):
            episode = file.create_group(f"episode_{number}")
            seen = few["seen"][start:end]
            episode["observations/observation"] = np.concatenate([seen, seen[-1:]])
            episode["actions"] = few["actions"][start:end]
    return path


def as_d4rl(path: Path, few: Arrays, goal: bool = False) -> Path:
    with h5py.File(path / "few.hdf5", "w") as file:
        file["observations"] = relay(few["seen"]) if goal else few["seen"]
        file["actions"] = few["actions"]
        last = np.isin(np.arange(len(few["seen"])), few["ends"] - 1)
        file["terminals"], file["timeouts"] = last & (np.arange(len(last)) < 15), last & (np.arange(len(last)) >= 15)
    return path / "few.hdf5"


def as_npy(path: Path, few: Arrays, by_time: bool = True) -> Path:
    padded = {
        "observations_seq": np.zeros((len(LENGTHS), max(LENGTHS), 60)),
        "actions_seq": np.zeros((len(LENGTHS), max(LENGTHS), 9)),
        "existence_mask": np.zeros((len(LENGTHS), max(LENGTHS))),
    }
    for number, (start, end) in enumerate(spans(few)):
        padded["observations_seq"][number, : end - start] = relay(few["seen"])[start:end]
        padded["actions_seq"][number, : end - start] = few["actions"][start:end]
        padded["existence_mask"][number, : end - start] = 1
    for name, values in padded.items():
        np.save(path / f"{name}.npy", np.swapaxes(values, 0, 1) if by_time else values)
    return path


def spans(few: Arrays) -> list[tuple[int, int]]:
    return [(end - length, end) for end, length in zip(few["ends"].tolist(), LENGTHS, strict=True)]


FORMS = {
    "zarr": as_zarr,
    "zip": as_zip,
    "minari": as_minari,
    "d4rl": as_d4rl,
    "d4rl with goals": lambda path, few: as_d4rl(path, few, goal=True),
    "npy": as_npy,
    "npy by episode": lambda path, few: as_npy(path, few, by_time=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_recordings(form, few, tmp_path):
    found = recordings(FORMS[form](tmp_path, few))
    assert [len(demo.actions) for demo in found] == list(LENGTHS)
    for demo, (start, end) in zip(found, spans(few), strict=True):
        seen = few["seen"][start:end]
        np.testing.assert_array_equal(demo.actions, few["actions"][start:end])
        np.testing.assert_array_equal(demo.positions[: end - start], np.concatenate([seen[:, :9], seen[:, 18:39]], 1))
        if form in ("zarr", "zip", "minari", "d4rl"):
            np.testing.assert_array_equal(joined(demo)[: end - start], seen)
        else:
            assert demo.velocities is None
        assert len(demo.positions) == end - start + (form == "minari")


@pytest.mark.parametrize("by_time", [True, False])
@pytest.mark.parametrize("shorter", [[0], [0, 0, 0], [0, 2, 5]], ids=["one", "equal", "ever shorter"])
def test_recordings_whose_mask_fits_both_ways_are_not_turned_about(by_time, shorter, few, tmp_path):
    longest = min(LENGTHS)
    arrays = {
        "observations_seq": np.zeros((len(shorter), longest, 60)),
        "actions_seq": np.zeros((len(shorter), longest, 9)),
        "existence_mask": np.zeros((len(shorter), longest)),
    }
    cuts = [(start, longest - less) for (start, _), less in zip(spans(few), shorter, strict=False)]
    for number, (start, length) in enumerate(cuts):
        arrays["observations_seq"][number, :length] = relay(few["seen"])[start : start + length]
        arrays["actions_seq"][number, :length] = few["actions"][start : start + length]
        arrays["existence_mask"][number, :length] = 1
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", np.swapaxes(values, 0, 1) if by_time else values)
    found = recordings(tmp_path)
    for demo, (start, length) in zip(found, cuts, strict=True):
        np.testing.assert_array_equal(demo.actions, few["actions"][start : start + length])


def test_velocities_and_joint_targets_are_told_apart_by_their_names(few, tmp_path):
    names = {}
    for actions in ("velocity", "joint_targets"):
        convert(as_zarr(tmp_path, few), tmp_path / actions, actions=actions)
        names[actions] = LeRobotDataset("local/set", root=tmp_path / actions).meta.features["action"]["names"]
        assert names[actions] == FmKitchenEnv(actions=actions).action_names
    assert names["velocity"][0] == "joint1_velocity" and names["joint_targets"][0] == "joint1"


def columns(root: Path) -> Arrays:
    table = LeRobotDataset("local/set", root=root).hf_dataset.with_format("numpy")
    return {name: np.asarray(table[:][name]) for name in table.column_names}


@pytest.mark.parametrize(("layout", "actions"), [("relay", "joint_targets"), ("d4rl", "velocity")])
def test_columns_are_the_recorded_ones_in_the_environments_layout(layout, actions, few, tmp_path, capsys):
    source, root = as_zip(tmp_path, few), tmp_path / "set"
    options = ["--layout", layout, "--actions", actions]
    assert main(["kitchen", "--source", str(source), "--root", str(root), *options]) == 0
    assert "3 episodes, 28 frames" in capsys.readouterr().out
    table, seen = columns(root), few["seen"]
    state = seen[:, :18] if layout == "d4rl" else seen[:, :9]
    kitchen = seen[:, 18:] if layout == "d4rl" else np.concatenate([seen[:, 18:39], np.zeros((len(seen), 30))], 1)
    np.testing.assert_array_equal(table["observation.state"], state)
    np.testing.assert_array_equal(table["observation.environment_state"], kitchen)
    sent = few["actions"] if actions == "velocity" else seen[:, :9] + 0.16 * few["actions"]
    if actions == "joint_targets":
        sent[:, 7:] = np.clip(sent[:, 7:], 0, 0.04)
    np.testing.assert_allclose(table["action"], sent, atol=1e-6)
    np.testing.assert_array_equal(table["next.done"], np.isin(np.arange(len(seen)), few["ends"] - 1))
    config = FmKitchenEnv(layout=layout, actions=actions)
    learnt = dataset_to_policy_features(LeRobotDataset("local/set", root=root).meta.features)
    learnt = {name: feature for name, feature in learnt.items() if feature.type != FeatureType.REWARD}
    asked = {name: feature.shape for name, feature in env_to_policy_features(config).items()}
    assert {name: learnt[name].shape for name in asked} == asked


def test_outcomes_follow_the_objects():
    """The outcome of an action is in the observation after it; a task that was done stays done."""
    positions = np.zeros((6, 30))
    for time, name in enumerate(["microwave", "kettle", "slide_cabinet", "hinge_cabinet"], start=1):
        index, goal = TASKS[name]
        positions[time:, index] = goal
    positions[3:, 22] = 0
    told = outcome(positions, 6)
    np.testing.assert_array_equal(told["next.reward"][:, 0], np.array([1, 2, 3, 4, 4, 4], np.float32) / 4)
    np.testing.assert_array_equal(told["next.success"][:, 0], [False] * 3 + [True] * 3)
    np.testing.assert_array_equal(told["next.done"][:, 0], [False] * 5 + [True])
    assert outcome(positions, 5)["next.reward"][-1] == 1


def test_human_demonstrations_end_with_four_tasks(human):
    assert len(human) == 19
    assert sum(len(demo.actions) for demo in human) == 4209
    for demo in human:
        told = outcome(demo.positions, len(demo.actions))
        assert told["next.reward"].max() == 1
        assert not told["next.success"][:150].any()


def test_targets_are_within_reach_and_limits():
    position = np.array([0, 1.79, 0, -0.05, 0, 0.1, 0, 0.02, 0.04])
    target = joint_targets(position, np.array([1, 1, -9, 1, 0.5, -1, 0, -1, 1]))
    np.testing.assert_allclose(target, [0.16, 1.8, -0.16, 0, 0.08, 0, 0, 0, 0.04], atol=1e-12)
    assert (target >= JOINT_LIMITS[:, 0]).all()


def test_converted_demonstrations_replay_into_four_tasks(human):
    """Whatever the noise: targets are positions, and so the errors do not add up."""
    pytest.importorskip("gymnasium_robotics", reason="needs the extra kitchen")
    env = FmKitchenEnv().make()
    for seed, demo in enumerate((human[0], human[14])):
        env.reset(seed=seed)
        actions = joint_targets(demo.positions[:, :9], demo.actions).astype(np.float32)
        rewards = [env.step(action)[1] for action in actions]
        assert rewards[-1] == 1
        assert sorted(set(rewards)) == [0, 0.25, 0.5, 0.75, 1]


def test_relay_recordings_have_no_velocities_to_give(few, tmp_path):
    with pytest.raises(StoreError, match="holds no velocities.*choose the layout relay"):
        convert(as_npy(tmp_path, few), tmp_path / "set", layout="d4rl")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("option", "value"), [("layout", "minari"), ("actions", "torque")])
def test_unknown_options_are_refused(option, value, tmp_path):
    with pytest.raises(ValueError, match=f"{option} must be one of .*not '{value}'"):
        convert(tmp_path, tmp_path / "set", **{option: value})


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def apply(few: Arrays) -> None:
        few[name] = change(few[name])

    return apply


def put(value: float, column: int) -> Callable[[np.ndarray], np.ndarray]:
    def apply(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[:, column] = value
        return values

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("seen", lambda seen: seen[:, :-1]), r"'data/state' is float32\(28, 58\), expected .*\(N, 59\)"),
        (edit("actions", lambda actions: actions[:-1]), r"'data/action' is float32\(27, 9\), expected .*\(28, 9\)"),
        (edit("ends", lambda ends: ends[:-1]), "'meta/episode_ends' must be whole numbers that increase"),
        (edit("seen", put(np.nan, 3)), "'data/state' holds NaN or Inf"),
        (edit("seen", put(0.5, 3)), "episode 0 is not Franka Kitchen: a joint is beyond its limits"),
        (edit("seen", put(9, 35)), "episode 0 is not Franka Kitchen: the kettle's quaternion"),
        (edit("actions", put(-2.4, 3)), r"episode 0: most actions of a joint are beyond \[-1, 1\]"),
    ],
)
def test_foreign_and_broken_stores_are_refused_by_name(change, message, few, tmp_path, capsys):
    change(few)
    source = as_zip(tmp_path, few)
    before = sorted(tmp_path.iterdir())
    assert main(["kitchen", "--source", str(source), "--root", str(tmp_path / "set")]) == 1
    told = capsys.readouterr().err
    assert "few.zip" in told
    with pytest.raises(StoreError, match=message):
        recordings(source)
    assert sorted(tmp_path.iterdir()) == before


def test_broken_hdf5_is_refused_by_name(few, tmp_path):
    with h5py.File(as_d4rl(tmp_path, few), "a") as file:
        del file["terminals"], file["timeouts"]
        file["terminals"] = np.zeros(28, dtype=bool)
    with pytest.raises(StoreError, match="neither 'terminals' nor 'timeouts' marks the end"):
        recordings(tmp_path / "few.hdf5")
    with h5py.File(tmp_path / "few.hdf5", "a") as file:
        del file["terminals"]
    with pytest.raises(StoreError, match=r"no array '/terminals'"):
        recordings(tmp_path / "few.hdf5")
    with h5py.File(tmp_path / "few.hdf5", "a") as file:
        file.move("observations", "images")
    with pytest.raises(StoreError, match="no recording of Minari .* or D4RL"):
        recordings(tmp_path / "few.hdf5")
    minari = as_minari(tmp_path, few) / "data" / "main_data.hdf5"
    with h5py.File(minari, "a") as file:
        del file["episode_1/actions"]
        file["episode_1/actions"] = few["actions"][:3]
    with pytest.raises(
        StoreError, match=r"'/episode_1/observations/observation' is float32\(8, 59\), expected .*\(4, 59"
    ):
        recordings(minari)
    minari.write_bytes(minari.read_bytes()[:-100])
    with pytest.raises(StoreError, match="damaged or cut off"):
        recordings(minari)


def test_broken_npy_is_refused_by_name(few, tmp_path):
    folder = as_npy(tmp_path, few)
    mask, seen = (folder / f"{name}.npy" for name in ("existence_mask", "observations_seq"))
    gap = np.load(mask)
    gap[[0, 3], :2] = 0
    np.save(mask, gap)
    with pytest.raises(StoreError, match="must begin with its first frame and have no gap"):
        recordings(folder)
    whole = seen.read_bytes()
    seen.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"observations_seq\.npy is no whole \.npy file"):
        recordings(folder)
    np.save(seen, np.zeros((12, 3, 59)))
    with pytest.raises(StoreError, match=r"observations_seq\.npy is float64\(12, 3, 59\), expected .*\(N, N, 60\)"):
        recordings(folder)
    seen.unlink()
    with pytest.raises(StoreError, match=r"observations_seq\.npy is no whole"):
        recordings(folder)


class Trap:
    """Would touch a file if it were unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(few, tmp_path):
    folder, sprung = as_npy(tmp_path, few), tmp_path / "sprung"
    np.save(folder / "actions_seq.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match=r"actions_seq\.npy is no whole \.npy file of numbers"):
        recordings(folder)
    (folder / "actions_seq.npy").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(StoreError, match=r"actions_seq\.npy is no whole \.npy file of numbers"):
        recordings(folder)
    assert not sprung.exists()


@pytest.mark.parametrize("content", [None, b"", b"a text", b"PK\x03\x04 cut"])
def test_what_is_no_recording_is_refused_by_name(content, tmp_path):
    source = tmp_path / "foreign"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(StoreError, match=r"foreign is no Kitchen recording; expected a whole zarr store"):
        recordings(source)


def test_an_empty_folder_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="is not a zarr store"):
        recordings(tmp_path)
