"""The scripted Kitchen expert, in the real simulator: that it succeeds by its own actions, and repeats bit for bit."""

from importlib.util import find_spec

import numpy as np
import pytest

from env_configs.experts.kitchen_hand import frame

if find_spec("gymnasium_robotics") is None:
    pytest.skip("gymnasium-robotics is not installed: needs the extra kitchen", allow_module_level=True)

from env_configs.demos.scripted import recording_of
from env_configs.experts.kitchen import ORDERS, PATHS, STEPS, attempt
from env_configs.experts.kitchen_hand import ARM, Hand
from env_configs.kitchen import Kitchen
from env_configs.kitchen_tasks import JOINT_LIMITS

JOINTS = {"layout": "relay", "actions": "joint_targets"}


@pytest.fixture(scope="module")
def first():
    return attempt(0, JOINTS)


def test_does_four_tasks_in_the_time_of_an_episode(first):
    assert first.success
    assert sum(first.progress.values()) >= 4
    assert len(first.columns["action"]) <= STEPS
    assert first.columns["next.reward"][-1] == 1
    assert first.columns["next.done"].sum() == first.columns["next.done"][-1] == 1


def test_its_episodes_have_the_columns_of_the_human_demonstrations(first):
    features = recording_of("kitchen", JOINTS).features
    assert set(first.columns) == set(features)
    for name, column in first.columns.items():
        assert column.shape[1:] == features[name]["shape"]
        assert column.dtype == features[name]["dtype"]


def test_its_actions_alone_do_the_tasks(first):
    """Played again in a fresh environment, they give the same rewards: no other way into the simulator was used."""
    kitchen = Kitchen()
    kitchen.reset(seed=0)
    rewards = [kitchen.step(action)[1] for action in first.columns["action"].astype(np.float64)]
    assert rewards == first.columns["next.reward"][:, 0].tolist()


def test_one_seed_is_one_attempt_and_another_is_another(first):
    other = attempt(1, {"layout": "d4rl", "actions": "velocity"})
    assert other.success
    assert np.abs(other.columns["action"]).max() <= 1
    again = attempt(0, JOINTS)
    assert all(np.array_equal(again.columns[name], column) for name, column in first.columns.items())
    assert not np.array_equal(other.columns["observation.state"][:50, :9], first.columns["observation.state"][:50])


def test_every_order_is_of_four_known_tasks():
    assert all(sorted(order) == sorted(PATHS) for order in ORDERS)
    assert len(set(ORDERS)) == len(ORDERS)


def test_the_hand_reaches_poses_that_joints_make():
    hand = Hand(Kitchen().unwrapped.model)
    generator = np.random.default_rng(0)
    low, high = JOINT_LIMITS[:ARM].T
    for _ in range(5):
        joints = generator.uniform(0.7 * low + 0.3 * high, 0.3 * low + 0.7 * high)
        position, rotation = hand.pose(joints)
        found = joints + generator.uniform(-0.2, 0.2, ARM)
        for _ in range(20):
            found = hand.reach(found, position, rotation)
        place, turn = hand.pose(found)
        np.testing.assert_allclose(place, position, atol=1e-3)
        np.testing.assert_allclose(turn, rotation, atol=1e-2)


def test_a_frame_is_a_rotation_with_the_axes_that_were_asked_for():
    made = frame(np.array([0.0, 2.0, 0.0]), np.array([0.1, 0.5, 1.0]))
    np.testing.assert_allclose(made.T @ made, np.eye(3), atol=1e-12)
    assert np.linalg.det(made) == pytest.approx(1)
    np.testing.assert_allclose(made[:, 2], [0, 1, 0])
    assert made[:, 0] @ [0.1, 0.5, 1.0] > 0
