"""Push-T: from Diffusion Policy's replay buffer (`pusht_cchi_v7_replay.zarr`, Chi et al. 2023) to episodes.

The store holds 10 frames per second: `data/state` (N, 5), the agent's x, y and the pose x, y, angle that the
block really had (not one that a reset was asked for); `data/action` (N, 2), the target position of the agent
in pixels; `data/img` (N, 96, 96, 3), whole numbers 0-255 as float32; `meta/episode_ends` (E,).

What the last action of an episode led to was not recorded. Its `next.reward` and `next.success` repeat the
last frame's own, as in the public data sets, and so understate the demonstrations: no recorded frame is a
success (mean best reward 0.89); replayed in a simulator, last action included, they reach 0.95 and some succeed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from env_configs.demos.dataset import Episode, Features, write_dataset
from env_configs.demos.zarr_store import StoreError, find_array, open_store, read, read_ends
from env_configs.pusht import FPS, TASK_DESCRIPTION
from env_configs.pusht_geometry import (
    BOARD,
    SUCCESS_COVERAGE,
    coverage,
    keypoints,
    mirror_pictures,
    mirror_points,
    mirror_poses,
    reward,
)

if TYPE_CHECKING:
    import zarr

OBSERVATIONS = ("state", "image")

_PICTURE = (96, 96, 3)


def features(obs: str) -> Features:
    """The columns of the public `lerobot/pusht_keypoints` (obs="state") and `lerobot/pusht` (obs="image")."""
    corners = [f"corner{i}.{axis}" for i in range(8) for axis in "xy"]
    axes = ["height", "width", "channel"]
    keypoint_feature = {"dtype": "float32", "shape": (16,), "names": corners}
    seen: Features = {
        "state": {"observation.environment_state": keypoint_feature},
        "image": {"observation.image": {"dtype": "image", "shape": _PICTURE, "names": axes}},
    }[obs]
    return {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        **seen,
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }


def convert(source: Path, root: Path, obs: str = "state", mirror: bool = False) -> tuple[int, int]:
    """Writes all demonstrations of a store as a LeRobotDataset.

    Args:
        source: the store, a folder or a zip.
        root: folder to create; must not exist.
        obs: "state" (8 keypoints of the block, recomputed from its pose) or "image" (the recorded pixels).
        mirror: write each demonstration twice: itself and then its mirror image about the target's axis, so that
            holding out the last episodes, an even number of them, separates no pair. LeRobot holds out the share
            `eval_split` rounded up: of the public 412 episodes .053 are 22, .05 would be 21.

    Returns:
        Number of episodes and of frames.

    Raises:
        ValueError: unknown `obs`; or `StoreError`: the store is damaged, foreign or of the wrong shape.
        FileExistsError: `root` exists.
    """
    if obs not in OBSERVATIONS:
        raise ValueError(f"obs must be one of {OBSERVATIONS}, not {obs!r}")
    with open_store(source) as group:
        state = read(find_array(group, "data/state", (None, 5)))
        action = read(find_array(group, "data/action", (len(state), 2)))
        ends = read_ends(group, len(state))
        _check_on_board(group, "data/state", state[:, :4])
        _check_on_board(group, "data/action", action)
        pictures = find_array(group, "data/img", (len(state), *_PICTURE)) if obs == "image" else None
        demos = _demos(state, action, ends, pictures)
        if mirror:
            demos = (either for demo in demos for either in (demo, demo.mirrored()))
        episodes = (demo.episode() for demo in demos)
        return write_dataset(root, FPS, features(obs), episodes, total=len(ends) * (1 + mirror))


@dataclass(frozen=True)
class _Demo:
    """A demonstration as recorded: agent and action (T, 2), pose of the block (T, 3), pixels (T, 96, 96, 3) if read."""

    agent: NDArray
    pose: NDArray
    action: NDArray
    pixels: NDArray[np.uint8] | None

    def mirrored(self) -> "_Demo":
        pixels = None if self.pixels is None else mirror_pictures(self.pixels)
        return _Demo(mirror_points(self.agent), mirror_poses(self.pose), mirror_points(self.action), pixels)

    def episode(self) -> Episode:
        seen = (
            {"observation.environment_state": keypoints(self.pose).astype(np.float32)}
            if self.pixels is None
            else {"observation.image": self.pixels}
        )
        moved = {"observation.state": self.agent.astype(np.float32), "action": self.action.astype(np.float32)}
        return Episode(moved | seen | _outcome(coverage(self.pose)), TASK_DESCRIPTION)


def _demos(state: NDArray, action: NDArray, ends: NDArray, pictures: "zarr.Array | None") -> Iterator[_Demo]:
    start = 0
    for end in ends.tolist():
        rows = slice(start, end)
        pixels = None if pictures is None else _pixels(pictures, start, end)
        yield _Demo(state[rows, :2], state[rows, 2:], action[rows], pixels)
        start = end


def _outcome(covered: NDArray) -> dict[str, NDArray]:
    """What each action led to, read off the next frame; the last has none and repeats its own."""
    after = np.append(covered[1:], covered[-1])[:, None]
    done = np.zeros((len(covered), 1), dtype=bool)
    done[-1] = True
    return {
        "next.reward": reward(after).astype(np.float32),
        "next.done": done,
        "next.success": after > SUCCESS_COVERAGE,
    }


def _pixels(pictures: "zarr.Array", start: int, end: int) -> NDArray[np.uint8]:
    values = read(pictures, start, end)
    pixels = np.clip(values, 0, 255).astype(np.uint8)
    if not np.array_equal(pixels, values):
        raise StoreError(
            f"{pictures.store}: '{pictures.path}' must be whole numbers 0-255; frames {start}-{end} are not"
        )
    return pixels


def _check_on_board(group: "zarr.Group", name: str, positions: NDArray) -> None:
    low, high = positions.min(), positions.max()
    if low < 0 or high > BOARD:
        raise StoreError(f"{group.store}: '{name}' must hold pixels 0-{BOARD}; it has {low:g} to {high:g}")
