"""The scripted handover and transport, in the real simulator: that their recorded actions alone succeed."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("robosuite") is None:
    pytest.skip("robosuite is not installed: needs the extra robosuite", allow_module_level=True)

from env_configs.demos.scripted import EXPERTS, recording_of
from env_configs.experts.arm import downward
from env_configs.experts.handover import attempt
from env_configs.robosuite_tasks import RobosuiteTask


@pytest.mark.parametrize(
    ("task", "actions", "seed"), [("handover", "absolute", 2), ("handover", "delta", 5), ("transport", "absolute", 5)]
)
def test_its_actions_alone_do_the_task(task, actions, seed):
    tried = import_module(EXPERTS[task]).attempt(seed, {"actions": actions})
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
    once, again = (attempt(2, {"actions": "absolute"}) for _ in range(2))
    assert all(np.array_equal(again.columns[name], column) for name, column in once.columns.items())


def test_refuses_unknown_actions():
    with pytest.raises(ValueError, match="absolute, delta, not 'velocity'"):
        attempt(0, {"actions": "velocity"})


def test_a_hand_that_points_down_has_its_fingers_below_and_moves_them_sideways():
    turned = downward(np.array([0.0, 3.0, 1.0]), tilt=0.2)
    np.testing.assert_allclose(turned.T @ turned, np.eye(3), atol=1e-12)
    assert np.linalg.det(turned) == pytest.approx(1)
    np.testing.assert_allclose(turned[:, 2], [0, np.sin(0.2), -np.cos(0.2)], atol=1e-12)
    np.testing.assert_allclose(np.abs(turned[:, 0]), [1, 0, 0], atol=1e-12)
