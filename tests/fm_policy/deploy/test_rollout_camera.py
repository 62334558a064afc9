"""LeRobot's rollout of a policy that sees, with the simulated robot's camera: what it is shown, and without one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.rollout.inference import RTCInferenceConfig, SyncInferenceConfig

from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

ROBOT = {"camera": "top", "motors": "robot", "seed": 2}


@pytest.fixture
def seeing(tiny, tmp_path) -> Path:
    """An untrained policy of two motors and a camera, whose pictures are left as they are by its statistics."""
    features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
    }
    action = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    policy = tiny.policy(input_features=features, output_features=action, use_ema=False)
    numbers = {
        "min": torch.full((2,), 206.0),
        "max": torch.full((2,), 306.0),
    }  # of whatever the net says, no far motors
    picture = {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    stats = {"observation.state": numbers, "action": numbers, "observation.images.top": picture}
    for part in (policy, *make_fm_ft_pre_post_processors(policy.config, stats)):
        part.save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing"


@pytest.mark.parametrize(
    "inference", [SyncInferenceConfig(), RTCInferenceConfig(queue_threshold=8)], ids=["sync", "rtc"]
)
def test_the_policy_sees_the_cameras_pictures_and_drives_the_robot(rollout, seeing, inference):
    taken, seen = [], []

    def watch(context):
        robot = context.hardware.robot_wrapper.inner
        observe = robot.get_observation

        def get_observation():
            observation = observe()
            taken.append(observation["top"])
            return observation

        robot.get_observation = get_observation
        encoder = context.policy.policy.net.encoder
        encoder.register_forward_hook(lambda _, batch, __: seen.append(batch[0]["observation.images.top"].clone()))

    _, robot = rollout(2.5, robot=ROBOT, changes=watch, checkpoint=seeing, inference=inference)
    (episode,) = robot.episodes
    assert sum(episode.fresh) >= 12 and episode.stops == 0
    assert len(seen) >= 2
    for pictures in seen:
        assert pictures.shape == (1, 1, 3, 96, 96)
        shown = (255 * pictures[0, 0].movedim(0, -1)).round().byte().numpy()
        assert any(np.array_equal(shown, picture) for picture in taken)
    assert not torch.equal(seen[0], seen[-1])  # it has moved, and so has the picture


def test_a_robot_without_the_camera_is_refused_by_the_cameras_name(rollout, seeing):
    with pytest.raises(ValueError, match="'observation.images.top' is missing"):
        rollout(1.0, robot=ROBOT | {"camera": None}, checkpoint=seeing)


def test_a_camera_of_another_name_is_refused_by_lerobot_and_can_be_renamed(rollout, seeing):
    front = ROBOT | {"camera": "front"}
    with pytest.raises(ValueError, match="Visual feature mismatch"):
        rollout(1.0, robot=front, checkpoint=seeing)
    renamed = {"observation.images.front": "observation.images.top"}
    _, robot = rollout(1.0, robot=front, checkpoint=seeing, rename_map=renamed)
    assert sum(robot.episodes[0].fresh) >= 4
