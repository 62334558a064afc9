"""LeRobot's rollout with real-time chunking, on the simulated robot and in real time."""

import time

import numpy as np
import pytest
from lerobot.rollout.inference import RTCInferenceConfig

from fm_policy.deploy.rtc import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_rollout_goes_on_while_chunks_are_computed(rollout, method):
    """Every chunk takes longer than a step, and the robot acts on nearly every step all the same."""

    given = []

    def watch(context):
        policy = context.policy.policy
        predict = policy.predict_action_chunk

        def slow(batch, **how):
            given.append((how["inference_delay"], how["prev_chunk_left_over"]))
            time.sleep(0.15)
            return predict(batch, **how)

        policy.predict_action_chunk = slow

    inference = RTCInferenceConfig(queue_threshold=8)
    _, robot = rollout(3.5, robot={"seed": 2}, policy={"rtc_method": method}, changes=watch, inference=inference)
    episode = robot.episodes[0]
    assert len(episode.actions) >= 25
    assert episode.held <= 6
    assert given[0] == (0, None)
    delays, left = zip(*given[1:], strict=True)
    assert len(given) >= 3 and min(delays) >= 2
    assert {rest.shape for rest in left} == {(10, 2)}
    assert np.linalg.norm(np.diff(episode.actions, axis=0), axis=1).sum() > 50


def test_actions_go_to_the_motors_that_the_policy_names(rollout):
    """With x and y the other way round in the policy's names, the robot is told them the other way round."""
    orders = (["x.pos", "y.pos"], ["y.pos", "x.pos"])
    episodes = [
        rollout(1.5, policy={"action_feature_names": order}, inference=RTCInferenceConfig())[1].episodes[0]
        for order in orders
    ]
    straight, crossed = (episode.actions[0] for episode in episodes)
    assert np.linalg.norm(straight - crossed[::-1]) < 0.5 * np.linalg.norm(straight - crossed)
