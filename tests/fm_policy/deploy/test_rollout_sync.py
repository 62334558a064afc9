"""LeRobot's rollout with synchronous inference, on the simulated robot and in real time."""

import numpy as np
from lerobot.configs.dataset import DatasetRecordConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.rollout.configs import EpisodicStrategyConfig


def test_a_rollout_acts_on_every_step_and_plans_when_its_queue_is_empty(rollout):
    plans = []

    def watch(context):
        encoder = context.policy.policy.net.encoder
        encoder.register_forward_hook(
            lambda *_: plans.append(len(context.hardware.robot_wrapper.inner._world.episode.actions))
        )

    _, robot = rollout(3.0, robot={"seed": 2}, changes=watch)
    episode = robot.episodes[0]
    assert episode.ended == "disconnected"
    assert 27 <= len(episode.actions) <= 31
    assert len(plans) == 4  # of 8 actions each, in 3 s at 10 Hz
    moved = np.linalg.norm(np.diff(episode.actions, axis=0), axis=1)
    assert moved.sum() > 50


def test_recording_gives_a_data_set_of_motors_with_one_episode_for_each_of_the_robots(rollout, tmp_path):
    recording = DatasetRecordConfig(
        repo_id="local/rollout_sim",
        single_task="push",
        root=tmp_path / "recorded",
        fps=10,
        episode_time_s=1.5,
        reset_time_s=0.6,
        num_episodes=2,
        push_to_hub=False,
    )
    robot_fields = {"episode_s": 1.5, "pause_s": 1.2, "end_on_success": False, "seed": 6}
    context, robot = rollout(0.0, robot=robot_fields, strategy=EpisodicStrategyConfig(), dataset=recording)
    assert [(e.seed, e.ended) for e in robot.episodes][:1] == [(6, "time")]
    assert [e.seed for e in robot.episodes] == [6, 7]
    root = context.data.dataset.root
    recorded = LeRobotDataset("local/rollout_sim", root=root)
    assert recorded.num_episodes == 2
    assert recorded.features["observation.state"]["names"] == list(robot.observation_features)
    assert recorded.features["action"]["names"] == ["x.pos", "y.pos"]
    for number, episode in enumerate(robot.episodes):
        rows = [frame for frame in recorded.hf_dataset if frame["episode_index"] == number]
        sent = np.array([frame["action"].numpy() for frame in rows])
        taken = np.array([action for action, fresh in zip(episode.actions, episode.fresh, strict=True) if fresh])
        common = min(len(sent), len(taken))
        assert common >= 12
        assert np.mean([np.abs(taken - np.clip(action, 0, 512)).max(axis=1).min() < 1e-3 for action in sent]) > 0.85
