"""The control loop against robosuite's own `step`: states and torques are equal bit for bit."""

from importlib.util import find_spec

import numpy as np
import pytest

from env_configs.robosuite_control import _span
from env_configs.robosuite_models import TASKS
from env_configs.robosuite_sim import Simulator

# Not by importing it: robosuite would set MUJOCO_GL for all tests.
pytestmark = pytest.mark.skipif(find_spec("robosuite") is None, reason="needs the extra robosuite")


@pytest.mark.parametrize(("name", "actions"), [("lift", "absolute"), ("handover", "delta"), ("transport", "absolute")])
def test_torques_and_states_are_robosuites(name, actions):
    """From a start, and from a state that is taken up."""
    ours, theirs = Simulator(TASKS[name], actions), Simulator(TASKS[name], actions)
    for simulator in (ours, theirs):
        simulator.reset(3)
    compare(ours, theirs, actions)
    reached = ours.state
    for simulator in (ours, theirs):
        simulator.reset(4)
        simulator.put(reached)
    compare(ours, theirs, actions)


def compare(ours: Simulator, theirs: Simulator, actions: str, steps: int = 8) -> None:
    """Steps both, ours with the loop and theirs with robosuite's `step`, by the same random actions."""
    generator = np.random.default_rng(0)
    for _ in range(steps):
        action = generator.uniform(-1, 1, (ours.task.arms, 7))
        if actions == "absolute":
            action[:, :3] = [c.ref_pos + 0.05 * way for c, way in zip(ours._controllers, action[:, :3], strict=True)]
        ours.step(action.ravel())
        theirs._env.step(action.ravel())
        np.testing.assert_array_equal(ours._env.sim.data.ctrl, theirs._env.sim.data.ctrl)
        np.testing.assert_array_equal(ours.state, theirs.state)
    assert (ours._env.timestep, ours._env.cur_time) == (theirs._env.timestep, theirs._env.cur_time)


def test_joints_that_are_not_in_a_row_are_refused():
    assert _span([3, 4, 5]) == slice(3, 6)
    with pytest.raises(ValueError, match=r"must follow one another in the simulation, not be \[3, 5, 4\]"):
        _span([3, 5, 4])
