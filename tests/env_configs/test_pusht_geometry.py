"""The T's geometry in numpy is the simulator's."""

import numpy as np
import pytest

from env_configs import make_env_config
from env_configs.pusht_geometry import GOAL_POSE, coverage, keypoints, start_poses

PushTEnv = pytest.importorskip("gym_pusht.envs.pusht", reason="needs the extra pusht").PushTEnv


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    """Poses all over the board, half of them near the goal, angles beyond one turn included."""
    rng = np.random.default_rng(0)
    far = np.column_stack([rng.uniform(60, 450, (50, 2)), rng.uniform(-10, 10, 50)])
    near = GOAL_POSE + rng.normal(size=(50, 3)) * [10, 10, 0.2]
    return np.concatenate([far, near])


@pytest.fixture(scope="module")
def simulator():
    env = PushTEnv(obs_type="environment_state_agent_pos")
    env.reset(seed=0)
    return env


def lay(simulator, pose: np.ndarray) -> None:
    """Puts the block exactly at a pose: first turned, then placed."""
    simulator.block.angle = pose[2]
    simulator.block.position = tuple(pose[:2])


def test_keypoints_are_the_simulators(simulator, poses):
    for pose, ours in zip(poses, keypoints(poses), strict=True):
        lay(simulator, pose)
        np.testing.assert_allclose(ours, simulator.get_obs()["environment_state"], atol=1e-9, rtol=0)


def test_coverage_is_the_simulators(simulator, poses):
    ours = coverage(poses)
    theirs = []
    for pose in poses:
        lay(simulator, pose)
        theirs.append(simulator._get_coverage())
    np.testing.assert_allclose(ours, theirs, atol=1e-9, rtol=0)
    assert min(ours[50:]) > 0
    assert (ours[:50] == 0).any()


def test_the_goal_is_covered_by_a_block_in_the_goal():
    assert coverage(GOAL_POSE[None])[0] == pytest.approx(1)
    assert coverage(GOAL_POSE[None] + [0, 0, 2 * np.pi])[0] == pytest.approx(1)


def test_the_block_lies_where_its_start_says():
    env = make_env_config("pusht").make()
    told = [env.reset(seed=seed)[1] for seed in range(5)]
    lying = start_poses(np.array([info["initial_state"] for info in told]))
    np.testing.assert_allclose(lying, [info["block_pose"] for info in told], atol=1e-9)
