"""What goes wrong on a robot that LeRobot's own programs run, and what happens then: docs/robot.md has the table."""

import importlib
import logging
import math
import pickle
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from lerobot.rollout.inference import RTCInferenceConfig
from lerobot.utils.feature_utils import hw_to_dataset_features

from env_configs import FmSimConfig
from env_configs.fm_sim.fm_sim import FmSim
from fm_policy.assets import default_policy
from fm_policy.deploy.server import listen, make_servicer

OTHER_ROBOT = r"'observation.state' has the shape \(1, 18\), .* \(2,\); 'observation.environment_state' is missing"


def test_a_rollout_of_another_robots_checkpoint_ends_with_the_features_names(rollout):
    with pytest.raises(ValueError, match=OTHER_ROBOT):
        rollout(2.0, checkpoint=default_policy())


def test_a_rollout_with_real_time_chunking_of_it_ends_too_and_never_moves_the_robot(rollout, caplog):
    """LeRobot's engine tries ten times, half a second apart."""
    _, robot = rollout(8.0, checkpoint=default_policy(), inference=RTCInferenceConfig())
    assert robot.episodes == []
    assert "'observation.state' has the shape (1, 18)" in caplog.text and "Fatal error in RTC thread" in caplog.text


def spoil(robot, first: int, last: int, told: list) -> None:
    """Has the robot read NaN from one motor, in the readings `first` to `last`; `told` gets the steps before each."""
    observe = robot.get_observation

    def get_observation():
        told.append(len(robot._world.episode.actions))
        return observe() | ({"y.pos": math.nan} if first <= len(told) <= last else {})

    robot.get_observation = get_observation


def spoil_rollout(first: int, last: int, told: list):
    return lambda context: spoil(context.hardware.robot_wrapper.inner, first, last, told)


def test_a_reading_of_nan_ends_a_rollout_before_the_policy_acts_on_it(rollout):
    readings: list[int] = []
    with pytest.raises(ValueError, match=r"holds NaN or infinity in \['observation.state'\]"):
        rollout(3.0, changes=spoil_rollout(5, 5, readings))
    assert len(readings) == 5


def test_real_time_chunking_goes_on_after_readings_of_nan(rollout, caplog):
    readings: list[int] = []
    _, robot = rollout(4.0, changes=spoil_rollout(8, 16, readings), inference=RTCInferenceConfig(queue_threshold=8))
    assert "holds NaN or infinity in ['observation.state']" in caplog.text
    (episode,) = robot.episodes
    assert episode.stops == 0
    assert sum(episode.fresh[25:]) >= 5  # new actions after the last of the bad readings, and the engine's pause


def cut(checkpoint, folder):
    """A copy whose weights lack their last bytes."""
    weights = shutil.copytree(checkpoint, folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def test_weights_that_were_cut_off_end_a_rollout_before_the_robot_is_touched(rollout, motors_policy, tmp_path, caplog):
    with pytest.raises(ValueError, match="model.safetensors is broken, perhaps cut off"):
        rollout(2.0, checkpoint=cut(motors_policy, tmp_path / "cut"))
    assert "Connecting robot" not in caplog.text


def import_quietly(module: str):
    """One of LeRobot's modules of asynchronous inference, each of which writes logs here and rearranges logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    imported = importlib.import_module(module)
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    return imported


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What `fm-policy-server` serves with, as an object."""
    monkeypatch.chdir(tmp_path)
    import_quietly("lerobot.async_inference.policy_server")
    from lerobot.async_inference.configs import PolicyServerConfig

    return make_servicer(PolicyServerConfig(obs_queue_timeout=0.2, inference_latency=0.0))


class Client:
    """What LeRobot's client says to the server, for a robot of 18 motors."""

    def __init__(self, server, name: str, checkpoint, folder):
        from lerobot.async_inference.helpers import RemotePolicyConfig

        motors = FmSim(FmSimConfig(calibration_dir=folder)).observation_features
        self.server, self.context, self.motors = server, SimpleNamespace(peer=lambda: name), list(motors)
        server.Ready(None, self.context)
        specs = RemotePolicyConfig("fm_ft", str(checkpoint), hw_to_dataset_features(motors, "observation"), 8)
        server.SendPolicyInstructions(SimpleNamespace(data=pickle.dumps(specs)), self.context)

    def observe(self, value: float, timestamp: float) -> None:
        from lerobot.async_inference.helpers import TimedObservation
        from lerobot.transport import services_pb2
        from lerobot.transport.utils import send_bytes_in_chunks

        values = dict.fromkeys(self.motors, value)
        timed = TimedObservation(timestamp=timestamp, timestep=0, observation=values, must_go=True)
        self.server.SendObservations(send_bytes_in_chunks(pickle.dumps(timed), services_pb2.Observation), self.context)

    def actions(self) -> list:
        """Its answer; empty if there is none."""
        data = getattr(self.server.GetActions(None, self.context), "data", b"")  # LeRobot's `Empty` has none
        return pickle.loads(data) if data else []  # noqa: S301


def test_the_server_answers_another_robots_client_with_nothing_and_says_why(server, tmp_path, caplog):
    client = Client(server, "other", default_policy(), tmp_path)
    client.observe(200.0, timestamp=1.0)
    assert client.actions() == []
    assert "'observation.state' has the shape (1, 18)" in caplog.text


def test_the_server_makes_no_chunk_of_nan_and_the_next_observation_gets_one(server, motors_policy, tmp_path, caplog):
    client = Client(server, "one", motors_policy, tmp_path)
    client.observe(math.nan, timestamp=1.0)
    assert client.actions() == []
    assert "holds NaN or infinity in ['observation.state']" in caplog.text
    client.observe(200.0, timestamp=2.0)
    assert len(client.actions()) == 8


def test_a_client_acts_again_after_readings_of_nan_that_lasted_longer_than_its_actions(
    server, motors_policy, tmp_path, port
):
    """LeRobot's own server would let it hold forever."""
    robot_client = import_quietly("lerobot.async_inference.robot_client")
    from lerobot.async_inference.configs import RobotClientConfig

    address, readings = f"127.0.0.1:{port}", []
    listening = listen(server, address)
    settings = {"policy_type": "fm_ft", "pretrained_name_or_path": str(motors_policy), "server_address": address}
    robot = FmSimConfig(seed=2, calibration_dir=tmp_path)
    config = RobotClientConfig(robot=robot, actions_per_chunk=8, fps=10, task="push", **settings)
    client = robot_client.RobotClient(config)
    spoil(client.robot, 4, 18, readings)
    assert client.start()
    threads = [threading.Thread(target=client.receive_actions)]
    threads += [threading.Thread(target=client.control_loop, args=("push",))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30  # a busy machine computes its chunks late, and acts on them later

    def acts_again() -> bool:
        return len(readings) >= 24 and sum(client.robot._world.episode.fresh[readings[18] :]) >= 5

    while not acts_again() and time.monotonic() < end:
        time.sleep(0.05)
    client.stop()
    for thread in threads:
        thread.join()
    listening.stop(None)
    (episode,) = client.robot.episodes
    assert not any(episode.fresh[readings[14] : readings[17]])  # nothing was left to act out
    assert sum(episode.fresh[readings[18] :]) >= 5


def test_the_server_refuses_a_client_whose_checkpoint_is_cut_off(server, motors_policy, tmp_path):
    with pytest.raises(ValueError, match="model.safetensors is broken, perhaps cut off"):
        Client(server, "one", cut(motors_policy, tmp_path / "cut"), tmp_path)


def test_two_clients_of_one_server_get_each_others_actions(server, motors_policy, tmp_path):
    """LeRobot's server keeps one observation, whoever sent it: it is for one robot."""
    one, two = (Client(server, name, motors_policy, tmp_path) for name in ("one", "two"))
    one.observe(200.0, timestamp=1.0)
    two.observe(300.0, timestamp=2.0)
    assert [action.timestamp for action in one.actions()][:1] == [2.0]
    assert two.actions() == []
