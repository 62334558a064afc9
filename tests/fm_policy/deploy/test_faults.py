"""What goes wrong on a robot that LeRobot's own programs run, and what happens then: docs/robot.md has the table."""

import pytest
from lerobot.rollout.inference import RTCInferenceConfig

from fm_policy.assets import default_policy

OTHER_ROBOT = r"'observation.state' has the shape \(1, 18\), .* \(2,\); 'observation.environment_state' is missing"


def test_a_rollout_of_another_robots_checkpoint_ends_with_the_features_names(rollout):
    with pytest.raises(ValueError, match=OTHER_ROBOT):
        rollout(2.0, checkpoint=default_policy())


def test_a_rollout_with_real_time_chunking_of_it_ends_too_and_never_moves_the_robot(rollout, caplog):
    """LeRobot's engine tries ten times, half a second apart."""
    _, robot = rollout(8.0, checkpoint=default_policy(), inference=RTCInferenceConfig())
    assert robot.episodes == []
    assert "'observation.state' has the shape (1, 18)" in caplog.text and "Fatal error in RTC thread" in caplog.text
