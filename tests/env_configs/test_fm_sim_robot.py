"""The simulated robot as LeRobot meets it: found by its type, on the wall clock, with limits and an emergency stop."""

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from lerobot.robots import RobotConfig, make_robot_from_config
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from env_configs import FmSimConfig
from env_configs.demos import pusht_zarr
from env_configs.demos.motors import convert
from env_configs.fm_sim.fm_sim import EmergencyStopError, FmSim


@pytest.fixture
def connect(tmp_path):
    """Makes connected robots, and lets them go in the end."""
    robots = []

    def make(**fields) -> FmSim:
        robot = make_robot_from_config(FmSimConfig(calibration_dir=tmp_path / "calibration", **fields))
        robot.connect()
        robots.append(robot)
        return robot

    yield make
    for robot in robots:
        if robot.is_connected:
            robot.disconnect()


def aim(x: float, y: float) -> dict[str, float]:
    return {"x.pos": x, "y.pos": y}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_lerobot_knows_the_type():
    assert RobotConfig.get_choice_class("fm_sim") is FmSimConfig


@pytest.mark.parametrize(
    ("task", "measured", "driven"),
    [("pusht", 18, 2), ("kitchen", 60, 9), ("lift", 19, 10), ("handover", 34, 20), ("transport", 59, 20)],
)
def test_every_task_is_motors(task, measured, driven, tmp_path):
    robot = make_robot_from_config(FmSimConfig(task=task, calibration_dir=tmp_path))
    assert len(robot.observation_features) == measured
    assert len(robot.action_features) == driven
    features = robot.observation_features | robot.action_features
    assert set(features.values()) == {float}
    assert all(name.endswith(".pos") for name in features)


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "pusht_b"},
        {"motors": "none"},
        {"task": "lift", "camera": "top"},
        {"pause_s": -1.0},
        {"episode_s": 0.0},
        {"drop_rate": 1.0},
        {"noise": float("nan")},
        {"seed": -1},
    ],
)
def test_a_wrong_field_is_named_with_its_value(wrong):
    name = list(wrong)[-1]
    with pytest.raises(ValueError, match=name) as error:
        FmSimConfig(**wrong)
    assert str(wrong[name]) in str(error.value)


def test_it_answers_at_any_moment_and_time_goes_on_without_it(connect):
    robot = connect()
    first = robot.get_observation()
    assert list(first) == list(robot.observation_features)
    before = time.perf_counter()
    assert robot.send_action(aim(256, 256)) == aim(256, 256)
    time.sleep(0.75)
    assert robot.get_observation() != first
    robot.disconnect()
    steps = len(robot.episodes[0].actions)
    assert 7 <= steps <= (time.perf_counter() - before) / 0.1 + 1


def test_the_camera_is_above_the_board(connect):
    robot = connect(camera="top", motors="robot")
    assert robot.observation_features == {"x.pos": float, "y.pos": float, "top": (96, 96, 3)}
    picture = robot.get_observation()["top"]
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


def test_the_camera_robot_measures_the_same_numbers(connect):
    seen, blind = connect(camera="top").get_observation(), connect().get_observation()
    del seen["top"]
    assert seen == pytest.approx(blind, abs=1e-3)


def test_actions_are_cut_to_the_limits_and_what_is_only_measured_is_left_alone(connect):
    robot = connect()
    observation = robot.get_observation()
    assert robot.send_action(observation | aim(-20, 530)) == aim(0, 512)
    with pytest.raises(ValueError, match=r"lacks y\.pos"):
        robot.send_action({"x.pos": 3.0})


@pytest.mark.parametrize("wild", [aim(float("nan"), 100), aim(100, float("inf")), aim(800, 100)])
def test_a_wild_action_stops_the_robot_until_it_is_cleared(connect, wild):
    robot = connect()
    robot.send_action(aim(500, 10))
    with pytest.raises(EmergencyStopError, match=r"pos = (nan|inf|800) is far outside of 0 to 512"):
        robot.send_action(wild)
    with pytest.raises(EmergencyStopError, match="until clear_estop"):
        robot.send_action(aim(256, 256))
    robot.clear_estop()
    assert robot.send_action(aim(256, 256)) == aim(256, 256)


def test_an_emergency_stop_can_be_asked_for(connect):
    robot = connect()
    robot.estop("somebody came near")
    with pytest.raises(EmergencyStopError, match="somebody came near"):
        robot.send_action(aim(256, 256))
    robot.get_observation()


def test_scores_are_kept_and_a_cut_episode_is_told_and_not_counted(connect, tmp_path, caplog):
    folder = tmp_path / "scores"
    robot = connect(log_dir=folder, episode_s=0.3, pause_s=0.1, seed=4)
    for _ in range(10):
        robot.get_observation()
        robot.send_action(aim(256, 256))
        time.sleep(0.1)
    robot.send_action(aim(256, 256))
    caplog.set_level(logging.INFO)
    robot.disconnect()
    told = rows(folder)
    assert [row["seed"] for row in told] == list(range(4, 4 + len(told)))
    assert {row["ended"] for row in told[:-1]} == {"time"} and len(told) >= 2
    assert [row["steps"] for row in told[:2]] == [3, 3]
    whole = sum(row["ended"] == "time" for row in told)
    assert f"in {whole} episodes" in caplog.messages[-1]
    assert list(folder.iterdir()) == [folder / "episodes.jsonl"]
    with pytest.raises(FileExistsError, match="name a new folder as log_dir"):
        robot.connect()


def test_connection_errors_are_lerobots(connect):
    robot = connect()
    with pytest.raises(DeviceAlreadyConnectedError):
        robot.connect()
    robot.disconnect()
    for use in (robot.get_observation, robot.disconnect, lambda: robot.send_action(aim(1, 1))):
        with pytest.raises(DeviceNotConnectedError):
            use()


def test_the_arm_of_the_kitchen_holds_its_joints_in_real_time(connect):
    robot = connect(task="kitchen")
    first = robot.get_observation()
    robot.send_action({name: first[name] for name in robot.action_features})
    time.sleep(0.6)
    later = robot.get_observation()
    arm = [name for name in robot.action_features if name.startswith("joint")]
    assert [later[name] for name in arm] == pytest.approx([first[name] for name in arm], abs=0.05)
    robot.disconnect()
    assert len(robot.episodes[0].actions) >= 6  # of 0.08 s


def test_the_arm_of_lift_goes_where_it_is_told_in_real_time(connect):
    robot = connect(task="lift")
    first = robot.get_observation()
    down = {f"arm0.{name}.pos": value for name, value in (("r0", 1.0), ("r4", -1.0), ("gripper", -1.0))}
    place = {f"arm0.{name}.pos": value for name, value in (("x", 0.1), ("y", 0.0), ("z", 1.1))}
    robot.send_action(dict.fromkeys(robot.action_features, 0.0) | down | place)
    time.sleep(1.0)
    later = robot.get_observation()
    assert later["arm0.x.pos"] - first["arm0.x.pos"] > 0.1
    assert [later[name] for name in place] == pytest.approx(list(place.values()), abs=0.05)


def test_a_failing_simulator_is_told_to_whoever_asks_next(connect):
    robot = connect(task="lift")
    robot.send_action(dict.fromkeys(robot.action_features, 0.5))  # six equal numbers mean no rotation
    time.sleep(0.3)
    with pytest.raises(RuntimeError, match="simulator of fm_sim has failed"):
        robot.get_observation()


def test_a_data_set_becomes_motors(converted, connect, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    assert convert(converted.root, tmp_path / "motors") == (converted.num_episodes, len(converted))
    motors = LeRobotDataset("local/motors", root=tmp_path / "motors")
    robot = connect()
    assert motors.features["observation.state"]["names"] == list(robot.observation_features)
    assert motors.features["action"]["names"] == list(robot.action_features)
    for index in (0, len(motors) // 2, len(motors) - 1):
        before, after = converted[index], motors[index]
        seen = [*before["observation.state"], *before["observation.environment_state"]]
        np.testing.assert_array_equal(after["observation.state"], seen)
        np.testing.assert_array_equal(after["action"], before["action"])
        assert (after["task"], after["episode_index"]) == (before["task"], before["episode_index"])
    with pytest.raises(ValueError, match="is no LeRobotDataset"):
        convert(tmp_path, tmp_path / "other")


def test_a_data_set_that_is_not_whole_or_has_pictures_becomes_no_motors(converted, few, make_store, tmp_path):
    cut = Path(shutil.copytree(converted.root, tmp_path / "cut"))
    (frames,) = (cut / "data").rglob("*.parquet")
    frames.write_bytes(frames.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut is damaged, its frames cannot be read"):
        convert(cut, tmp_path / "motors")
    frames.unlink()
    with pytest.raises(ValueError, match="cut is no whole LeRobotDataset: it lacks the frames"):
        convert(cut, tmp_path / "motors")
    pusht_zarr.convert(make_store(few), tmp_path / "pictures", "image")
    with pytest.raises(ValueError, match="pictures has pictures, observation.image: motors cannot tell them"):
        convert(tmp_path / "pictures", tmp_path / "motors")
    assert not (tmp_path / "motors").exists()
