"""The T of Push-T as plain geometry: keypoints and coverage of many poses at once, without a simulator.

A pose is (x, y, angle): the place of the block's origin, the middle of the bar's free long edge, in pixels of
the 512 x 512 board (y grows downwards), and the rotation in radians. Same T, same order of the keypoints and
same goal as gym-pusht 0.1.8, where the numbers were read.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

BOARD = 512
"""Side of the square board in pixels."""

GOAL_POSE = np.array([256.0, 256.0, np.pi / 4])
"""Pose (x, y, angle) of the target T."""

SUCCESS_COVERAGE = 0.95
"""Share of the target that the block must cover, exclusive, for a success."""

CENTRE_OF_MASS = np.array([0.0, 45.0])
"""In the block's own frame; gym-pusht turns the block about it after it has placed it."""

_BAR = [(-60.0, 0.0), (60.0, 0.0), (60.0, 30.0), (-60.0, 30.0)]
_STEM = [(-15.0, 30.0), (15.0, 30.0), (15.0, 120.0), (-15.0, 120.0)]
CORNERS = np.array(_BAR + _STEM)
"""The 8 keypoints in the block's own frame, (8, 2): the bar's corners, then the stem's."""


def place(points: NDArray, poses: NDArray) -> NDArray[np.float64]:
    """Carries points of the block's frame to the board.

    Args:
        points: (K, 2) in the block's own frame.
        poses: (N, 3) as x, y, angle.

    Returns:
        (N, K, 2) in pixels of the board.
    """
    poses = np.asarray(poses, dtype=np.float64)
    cos, sin = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    return np.einsum("nij,kj->nki", rotation, points) + poses[:, None, :2]


def start_poses(starts: NDArray) -> NDArray[np.float64]:
    """Where the block lies at some starts, which are in the legacy convention: placed first, then turned.

    Args:
        starts: (N, 5), `initial_state` of the task: agent x, y, block x, y, angle.

    Returns:
        Poses, (N, 3).
    """
    starts = np.asarray(starts, dtype=np.float64)
    turned = starts[:, 2:] * [0.0, 0.0, 1.0]
    placed = starts[:, 2:4] + CENTRE_OF_MASS - place(CENTRE_OF_MASS[None], turned)[:, 0]
    return np.column_stack([placed, starts[:, 4]])


def keypoints(poses: NDArray) -> NDArray[np.float64]:
    """The block's 8 corners, flattened to x0, y0, x1, y1, ... as gym-pusht's `environment_state`.

    Args:
        poses: (N, 3) as x, y, angle.

    Returns:
        (N, 16) in pixels; corners may lie slightly outside of the board.
    """
    return place(CORNERS, poses).reshape(len(poses), -1)


def mirror_points(points: NDArray) -> NDArray:
    """Mirrors places on the board about the target's axis: (x, y) becomes (512 - y, 512 - x).

    Board, target and physics are their own mirror images about that axis, and so is the T about its stem: what
    leads to the target leads there mirrored, too.

    Args:
        points: (..., 2) in pixels.
    """
    return BOARD - points[..., ::-1]


def mirror_poses(poses: NDArray) -> NDArray:
    """Mirrors the block about the target's axis, see `mirror_points`; an angle becomes pi / 2 minus it.

    Args:
        poses: (..., 3) as x, y, angle.
    """
    return np.concatenate([mirror_points(poses[..., :2]), np.pi / 2 - poses[..., 2:]], axis=-1)


def mirror_pictures(pictures: NDArray) -> NDArray:
    """Mirrors pictures of the whole board about the target's axis, see `mirror_points`.

    Args:
        pictures: (N, H, W, C) with H = W, the first row at y = 0.
    """
    return np.ascontiguousarray(pictures[:, ::-1, ::-1].swapaxes(1, 2))


def coverage(poses: NDArray) -> NDArray[np.float64]:
    """Share of the target T that the block covers.

    Bar and stem do not overlap, so the area common to both Ts is the sum over their four pairs of rectangles.

    Args:
        poses: (N, 3) as x, y, angle.

    Returns:
        (N,) in [0, 1].
    """
    import shapely

    goals, blocks = _goals(), _rectangles(poses)
    common = shapely.area(shapely.intersection(blocks[:, :, None], goals))
    return common.sum(axis=(1, 2)) / shapely.area(goals).sum()


def _rectangles(poses: NDArray) -> NDArray[np.object_]:
    import shapely

    return shapely.polygons(place(CORNERS, poses).reshape(len(poses), 2, 4, 2))


@cache
def _goals() -> NDArray[np.object_]:
    return _rectangles(GOAL_POSE[None])


def reward(covered: NDArray) -> NDArray[np.float64]:
    """The task's reward in [0, 1]: the coverage over the coverage of a success, clipped."""
    return np.clip(covered / SUCCESS_COVERAGE, 0.0, 1.0)
