"""Conversion of robomimic's and robosuite's recordings: what is written, that it replays, what is refused."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from scipy.spatial.transform import Rotation

from env_configs.demos.__main__ import main
from env_configs.demos.robomimic_hdf5 import convert
from env_configs.demos.stores import StoreError
from env_configs.robosuite_tasks import RobosuiteTask
from env_configs.rotations import from_six

# Not by importing it: robosuite would set MUJOCO_GL for all tests.
pytestmark = pytest.mark.skipif(find_spec("robosuite") is None, reason="needs the extra robosuite")

DEMOS = ("demo_8", "demo_6")
"""Two short demonstrations of Lift."""


@pytest.fixture(scope="module")
def lift_file(fm_data: Path) -> Path:
    return fm_data / "robomimic" / "lift_ph_10demos_low_dim.hdf5"


@pytest.fixture(scope="module")
def few(lift_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of Lift; the mask `train` lists the first."""
    path = tmp_path_factory.mktemp("lift") / "few.hdf5"
    with h5py.File(lift_file) as whole, h5py.File(path, "w") as part:
        data = part.create_group("data")
        data.attrs.update(whole["data"].attrs)
        for number, demo in enumerate(DEMOS):
            whole.copy(f"data/{demo}", data, f"demo_{number}")
        part["mask/train"] = np.array([b"demo_0"])
    return path


@pytest.fixture(scope="module")
def recorded(few: Path) -> dict[str, np.ndarray]:
    """What the file holds of both demonstrations, end to end."""
    names = ("actions", "rewards", "obs/object", "obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos")
    with h5py.File(few) as file:
        return {name: np.concatenate([file[f"data/demo_{n}"][name][:] for n in range(2)]) for name in names}


@pytest.fixture(scope="module")
def sets(few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """The file as data sets of both kinds of actions, by the command."""
    folder = tmp_path_factory.mktemp("sets")
    for actions in ("absolute", "delta"):
        options = ["--source", str(few), "--root", str(folder / actions), "--actions", actions]
        assert main(["lift", *options]) == 0
    return {actions: columns(folder / actions) for actions in ("absolute", "delta")}


def columns(root: Path) -> dict[str, np.ndarray]:
    """The whole table of a data set."""
    table = LeRobotDataset("local/set", root=root).hf_dataset.with_format("numpy")
    return {name: np.asarray(table[:][name]) for name in table.column_names}


def test_observations_are_the_recorded_ones(sets, recorded):
    """But for the way from the gripper to the cube, whose sign robosuite has changed since."""
    names = ("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos")
    robot = np.hstack([recorded[name] for name in names])
    objects = recorded["obs/object"] * np.repeat([1, -1], [7, 3])
    for table in sets.values():
        np.testing.assert_allclose(table["observation.state"], robot, atol=1e-6)
        np.testing.assert_allclose(table["observation.environment_state"], objects, atol=1e-6)


def test_delta_actions_are_the_recorded_ones(sets, recorded):
    np.testing.assert_array_equal(sets["delta"]["action"], recorded["actions"].astype(np.float32))


def test_absolute_actions_are_the_present_pose_and_the_recorded_way(sets, recorded):
    """0.05 m and 0.5 rad for 1; the grip site is turned against the hand, always by the same."""
    action, way = sets["absolute"]["action"].astype(float), np.clip(recorded["actions"], -1, 1)
    np.testing.assert_allclose(action[:, :3], recorded["obs/robot0_eef_pos"] + 0.05 * way[:, :3], atol=1e-6)
    hand = Rotation.from_quat(recorded["obs/robot0_eef_quat"]).as_matrix()
    turn = Rotation.from_rotvec(0.5 * way[:, 3:6]).as_matrix()
    mounted = np.swapaxes(turn @ hand, 1, 2) @ from_six(action[:, 3:9])
    np.testing.assert_allclose(mounted, np.broadcast_to(mounted[0], mounted.shape), atol=1e-5)
    np.testing.assert_array_equal(action[:, 9], recorded["actions"][:, 6].astype(np.float32))


def test_outcomes_are_the_recorded_rewards(sets, recorded):
    for table in sets.values():
        last = np.append(np.diff(table["episode_index"]) > 0, True)
        np.testing.assert_array_equal(table["next.reward"], recorded["rewards"])
        np.testing.assert_array_equal(table["next.success"], recorded["rewards"] == 1)
        np.testing.assert_array_equal(table["next.done"], last)
        assert 0 < table["next.success"].sum() < 20


@pytest.mark.parametrize("actions", ["absolute", "delta"])
def test_a_converted_demonstration_replays_to_success(actions, sets, few):
    table, env = sets[actions], RobosuiteTask("lift", actions)
    with h5py.File(few) as file:
        demo = file["data/demo_0"]
        start = {"reset_to_state": demo["states"][0], "model_file": demo.attrs["model_file"]}
    seen, info = env.reset(seed=0, options=start)
    rows = table["episode_index"] == 0
    np.testing.assert_allclose(seen["environment_state"], table["observation.environment_state"][0], atol=1e-6)
    for action in table["action"][rows]:
        assert not info["is_success"]
        *_, terminated, _, info = env.step(action)
        if terminated:
            break
    env.close()
    assert info["is_success"] and info["grasped"] == 1.0


def test_a_mask_chooses_demonstrations(few, sets, tmp_path):
    assert convert(few, tmp_path / "set", "lift", "delta", mask="train") == (1, 44)
    table = columns(tmp_path / "set")
    np.testing.assert_array_equal(table["action"], sets["delta"]["action"][:44])


def test_recordings_without_observations_are_replayed(fm_data, tmp_path):
    """The end of a handover: states, ways and a model with another machine's files."""
    source = tmp_path / "raw.hdf5"
    with h5py.File(fm_data / "robomimic" / "two_arm_handover_7demos.hdf5") as whole, h5py.File(source, "w") as part:
        demo = part.create_group("data/demo_0")
        part["data"].attrs.update(whole["data"].attrs)
        demo.attrs["model_file"] = model = whole["data/demo_5"].attrs["model_file"]
        for name in ("states", "actions"):
            demo[name] = states = whole[f"data/demo_5/{name}"][-20:]
        states = demo["states"][:]
    assert "/home/" in model
    assert convert(source, tmp_path / "set", "handover") == (1, 20)
    table = columns(tmp_path / "set")
    assert table["action"].shape == (20, 20)
    np.testing.assert_allclose(table["observation.state"][:, 7:9], states[:, 8:10], atol=1e-6)
    hammer = states[:, 1 + 18 : 1 + 25]
    np.testing.assert_allclose(table["observation.environment_state"][:, :3], hammer[:, :3], atol=1e-6)
    assert table["next.success"][-1] and not table["next.success"][0]


Edit = Callable[[h5py.File], None]


def settings(**changed: object) -> Edit:
    """Other settings of the recording."""

    def edit(file: h5py.File) -> None:
        told = json.loads(file["data"].attrs["env_args"])
        controller = told["env_kwargs"]["controller_configs"]
        for name, value in changed.items():
            of_controller = name in controller or name == "input_ref_frame"
            (told if name == "env_name" else controller if of_controller else told["env_kwargs"])[name] = value
        file["data"].attrs["env_args"] = json.dumps(told)

    return edit


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Another array in the first demonstration."""

    def edit(file: h5py.File) -> None:
        values = change(file[f"data/demo_0/{name}"][:])
        del file[f"data/demo_0/{name}"]
        file[f"data/demo_0/{name}"] = values

    return edit


def model(change: Callable[[str], str]) -> Edit:
    """Another model of the first demonstration."""

    def edit(file: h5py.File) -> None:
        attributes = file["data/demo_0"].attrs
        attributes["model_file"] = change(attributes["model_file"])

    return edit


def unlist(file: h5py.File) -> None:
    del file["data/demo_0"], file["data/demo_1"]


def forget(file: h5py.File) -> None:
    del file["data"].attrs["env_args"]


def link(file: h5py.File) -> None:
    del file["data/demo_0/states"]
    file["data/demo_0/states"] = h5py.ExternalLink("/etc/hostname", "states")


WRONG: dict[str, tuple[Edit, str]] = {
    "another task": (settings(env_name="TwoArmTransport"), "env_name 'TwoArmTransport', expected 'Lift'"),
    "another robot": (settings(robots=["Sawyer"]), r"robots \['Sawyer'\], expected \['Panda'\]"),
    "another rate": (settings(control_freq=10), "control_freq 10, expected 20"),
    "another controller": (settings(type="JOINT_POSITION"), "controller 'JOINT_POSITION', expected 'OSC_POSE'"),
    "absolute already": (settings(control_delta=False), "control_delta False, expected True"),
    "arms side by side": (settings(env_configuration="parallel"), "env_configuration 'parallel', expected 'default'"),
    "another frame": (
        settings(input_ref_frame="base"),
        "'base', expected 'world' for Lift; robosuite 1.5 takes",
    ),
    "longer ways": (settings(output_max=[0.1] * 3 + [1.0] * 3), r"output_max \[0.1, 0.1, 0.1, 1.0.*expected \[0.05"),
    "other commands": (settings(input_min=-2), r"input_min \[-2.0, .*expected \[-1.0"),
    "a softer controller": (settings(kp=20), r"kp \[20.0, .*expected \[150.0"),
    "no number": (settings(kp="soft"), r"kp 'soft', expected \[150.0"),
    "no controller": (settings(controller_configs={"body_parts": [1]}), "controller None, expected 'OSC_POSE'"),
    "no settings": (forget, "no text attribute 'env_info'"),
    "no demonstrations": (unlist, "no demonstrations 'data/demo_0'"),
    "linked": (link, "links are not followed"),
    "other states": (put("states", lambda s: s[:, :-1]), r"'/data/demo_0/states' is .*31.*\(N, 32\)"),
    "fewer actions": (put("actions", lambda a: a[:-1]), r"'/data/demo_0/actions' is .*43, 7.*\(44, 7\)"),
    "NaN": (put("states", lambda s: s * np.nan), "'/data/demo_0/states' holds NaN or Inf"),
    "another place": (put("obs/robot0_eef_pos", lambda p: p + 0.01), "is up to 0.01.* m from where the installed"),
    "no XML": (model(lambda xml: xml[:1000]), "'/data/demo_0' cannot be used: the recorded model is no XML"),
    "other joints": (model(lambda xml: xml.replace("robot0_joint3", "elbow")), "its joints are .*elbow.*expected"),
    "no cube": (model(lambda xml: xml.replace('"cube_main"', '"ball"')), "the model has no body 'cube_main'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_foreign_files_are_refused_by_name(wrong, few, tmp_path):
    edit, message = WRONG[wrong]
    source = tmp_path / "wrong.hdf5"
    source.write_bytes(few.read_bytes())
    with h5py.File(source, "a") as file:
        edit(file)
    with pytest.raises(StoreError, match=message) as refusal:
        convert(source, tmp_path / "set", "lift", "delta")
    assert source.name in str(refusal.value)
    assert list(tmp_path.iterdir()) == [source]


def test_one_robot_may_be_told_as_a_word(few, tmp_path):
    """As robosuite's own program for recording does."""
    source = tmp_path / "word.hdf5"
    source.write_bytes(few.read_bytes())
    with h5py.File(source, "a") as file:
        settings(robots="Panda")(file)
    assert convert(source, tmp_path / "set", "lift", "delta", mask="train") == (1, 44)


def test_a_cut_file_is_refused(few, tmp_path, capsys):
    source = tmp_path / "cut.hdf5"
    source.write_bytes(few.read_bytes()[:50_000])
    assert main(["lift", "--source", str(source), "--root", str(tmp_path / "set")]) == 1
    assert f"{source} is damaged or cut off" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_unknown_masks_and_actions_are_refused(few, tmp_path):
    with pytest.raises(StoreError, match="has no mask 'test'; it has train"):
        convert(few, tmp_path / "set", "lift", mask="test")
    with pytest.raises(ValueError, match=r"actions must be one of .*absolute.*not 'joint'"):
        convert(few, tmp_path / "set", "lift", "joint")
