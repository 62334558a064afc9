"""Poses of a gripper as a policy sees them: positions, and rotations in six numbers without jumps.

Six numbers are the first two columns of the rotation matrix (Zhou et al. 2019, "On the Continuity of Rotation
Representations in Neural Networks"). Diffusion Policy's and pytorch3d's six are its first two rows.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

POSE = 9
"""Numbers of a pose: position 3, rotation 6."""

_PARALLEL = 1e-6


def to_six(matrices: ArrayLike) -> NDArray[np.float64]:
    """Rotation matrices (..., 3, 3) as six numbers (..., 6)."""
    matrices = np.asarray(matrices, dtype=np.float64)
    return np.concatenate([matrices[..., 0], matrices[..., 1]], axis=-1)


def from_six(six: ArrayLike) -> NDArray[np.float64]:
    """The rotation matrices (..., 3, 3) nearest in Gram and Schmidt's sense to any six numbers (..., 6).

    Raises:
        ValueError: the two vectors in them are zero or parallel, so that no rotation is meant.
    """
    six = np.asarray(six, dtype=np.float64)
    x = _unit(six[..., :3], six)
    across = six[..., 3:] / np.maximum(np.linalg.norm(six[..., 3:], axis=-1, keepdims=True), _PARALLEL)
    y = _unit(across - (x * across).sum(-1, keepdims=True) * x, six)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def to_rotation_vector(six: ArrayLike) -> NDArray[np.float64]:
    """Six numbers (..., 6) as axis times angle (..., 3), the angle in rad from 0 to pi.

    Raises:
        ValueError: see `from_six`.
    """
    from scipy.spatial.transform import Rotation  # late: every program of LeRobot imports the tasks

    matrices = from_six(six)
    return Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_rotvec().reshape(*matrices.shape[:-2], 3)


def _unit(vectors: NDArray, six: NDArray) -> NDArray[np.float64]:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if (lengths < _PARALLEL).any():
        raise ValueError(f"the six numbers of a rotation must be two vectors that are not zero or parallel, not {six}")
    return vectors / lengths
