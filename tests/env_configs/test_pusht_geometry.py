"""The T's geometry in numpy is the simulator's."""

import numpy as np
import pytest

from env_configs import make_env_config
from env_configs.pusht_geometry import (
    GOAL_POSE,
    coverage,
    keypoints,
    mirror_pictures,
    mirror_points,
    mirror_poses,
    start_poses,
)

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


def test_the_target_is_its_own_mirror_image(poses):
    np.testing.assert_allclose(mirror_poses(GOAL_POSE), GOAL_POSE, atol=1e-12)
    np.testing.assert_allclose(coverage(mirror_poses(poses)), coverage(poses), atol=1e-9)


def test_a_mirrored_block_has_the_mirrored_corners(poses):
    """The T is its own mirror image, so that its corners change places: left with right."""
    seen = keypoints(mirror_poses(poses)).reshape(-1, 8, 2)
    expected = mirror_points(keypoints(poses).reshape(-1, 8, 2))[:, [1, 0, 3, 2, 5, 4, 7, 6]]
    np.testing.assert_allclose(seen, expected, atol=1e-9)
    np.testing.assert_allclose(mirror_poses(mirror_poses(poses)), poses, atol=1e-12)


def test_a_mirrored_picture_is_the_picture_of_the_mirrored_board(poses):
    """Up to what the simulator's anti-aliasing and whole pixels do at the edges."""
    env, agent = PushTEnv(obs_type="pixels"), np.array([100.0, 300.0])
    env.reset(seed=0)

    def look(agent: np.ndarray, pose: np.ndarray) -> np.ndarray:
        lay(env, pose)
        env.agent.position = tuple(agent)
        for body in (env.block, env.agent):  # the drawing's own copy of where they are
            env.space.reindex_shapes_for_body(body)
        return env.get_obs().astype(int)

    here = np.stack([look(agent, pose) for pose in poses[:8]])
    there = np.stack([look(mirror_points(agent), mirror_poses(pose)) for pose in poses[:8]])
    assert abs(mirror_pictures(here) - there).mean() < abs(here - there).mean() / 8
