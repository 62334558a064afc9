"""The scripted handover and transport, in the real simulator: that their recorded actions alone succeed."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("robosuite") is None:
    pytest.skip("robosuite is not installed: needs the extra robosuite", allow_module_level=True)

from env_configs.demos.scripted import EXPERTS, recording_of
from env_configs.experts.arm import GaveUpError, Pose, downward
from env_configs.experts.handover import attempt
from env_configs.experts.two_arms import perform
from env_configs.robosuite_tasks import RobosuiteTask


@cache
def once(task, actions, seed):
    return import_module(EXPERTS[task]).attempt(seed, {"actions": actions})


@pytest.mark.parametrize(
    ("task", "actions", "seed"), [("handover", "absolute", 2), ("handover", "delta", 5), ("transport", "absolute", 7)]
)
def test_its_actions_alone_do_the_task(task, actions, seed):
    tried = once(task, actions, seed)
    assert tried.success
    features = recording_of(task, {"actions": actions}).features
    assert set(tried.columns) == set(features)
    for name, column in tried.columns.items():
        assert column.shape[1:] == features[name]["shape"]
        assert column.dtype == features[name]["dtype"]
    assert tried.columns["next.success"].sum() == tried.columns["next.success"][-1] == 1
    env = RobosuiteTask(task, actions=actions)
    seen, _ = env.reset(seed=seed)
    np.testing.assert_array_equal(seen["agent_pos"].astype(np.float32), tried.columns["observation.state"][0])
    solved = [env.step(action)[4]["is_success"] for action in tried.columns["action"]]
    assert solved == tried.columns["next.success"][:, 0].tolist()


def test_one_seed_is_one_attempt():
    again = attempt(2, {"actions": "absolute"}).columns
    for name, column in once("handover", "absolute", 2).columns.items():
        np.testing.assert_array_equal(again[name], column)


def test_the_transport_reaches_each_part_of_the_task_in_time_to_be_imitated():
    tried = once("transport", "absolute", 7)
    assert tried.progress == {"lid_off": 1.0, "trash_in_bin": 1.0, "payload_in_bin": 1.0}
    assert len(tried.columns["action"]) < 500  # of the 700 steps that the task allows


def test_an_attempt_ends_where_a_hand_gives_up():
    def plan(_simulator, first, second, _rng):
        def give_up():
            yield from second.wait(3)
            raise GaveUpError

        return first.wait(20), give_up()

    tried = perform("handover", plan, 0, {"actions": "absolute"})
    assert not tried.success
    assert len(tried.columns["action"]) == 3
    assert tried.columns["next.done"][:, 0].tolist() == [False, False, True]
    assert not tried.columns["next.success"].any()


def test_a_detour_is_full_from_aside_and_none_on_its_last_leg():
    goal, detour = Pose(np.array([0.2, -0.4, 0.8]), np.eye(3)), np.array([0.0, 0.1, 0.2])
    aside = goal.position - [0.3, 0.0, 0.0]
    np.testing.assert_allclose(goal.by_way_of(detour, aside).position, goal.position + detour)
    for share in (0.0, 0.3, 1.0, 1.5):
        hand = goal.position + share * detour
        np.testing.assert_allclose(goal.by_way_of(detour, hand).position, goal.position, atol=1e-9)
    between = goal.by_way_of(detour, goal.position + np.array([0.05, 0.0, 0.0])).position - goal.position
    assert 0 < np.linalg.norm(between) < np.linalg.norm(detour)


def test_refuses_unknown_actions():
    with pytest.raises(ValueError, match="absolute, delta, not 'velocity'"):
        attempt(0, {"actions": "velocity"})


def test_a_hand_that_points_down_has_its_fingers_below_and_moves_them_sideways():
    turned = downward(np.array([0.0, 3.0, 1.0]), tilt=0.2)
    np.testing.assert_allclose(turned.T @ turned, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    np.testing.assert_allclose(turned[:, 2], [0, np.sin(0.2), -np.cos(0.2)], atol=1e-12)
    np.testing.assert_allclose(np.abs(turned[:, 0]), [1, 0, 0], atol=1e-12)
