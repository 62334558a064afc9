"""Franka Kitchen: from published recordings to episodes; for their forms see `kitchen_sources`.

All of them hold velocities as actions. What a velocity told the robot's servos, a position of each joint, is
recovered from the position that was observed with it, because the simulator computes it so: q + 0.16 a, cut to the
joints' limits. Such targets replay better than the velocities do: errors do not add up.

Rewards and successes are computed from the objects' recorded positions, as the environment does. Except in
Minari's files what the last action led to was not recorded; its `next.reward` and `next.success` repeat the last
frame's own.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from env_configs.demos.dataset import Episode, Features, write_dataset
from env_configs.demos.kitchen_sources import Recording, recordings
from env_configs.demos.stores import StoreError
from env_configs.kitchen_tasks import (
    ACTIONS,
    FPS,
    JOINT_LIMITS,
    JOINTS,
    LAYOUTS,
    REACH,
    SCORED,
    TASK_DESCRIPTION,
    done_now,
    observe,
    score,
)


def features(layout: str, actions: str) -> Features:
    """The columns of a data set in a layout, with actions of a kind."""
    agent, kitchen = LAYOUTS[layout]
    moving = [f"{joint}_velocity" for joint in JOINTS] if layout == "d4rl" else []
    return {
        "observation.state": {"dtype": "float32", "shape": (agent,), "names": [*JOINTS, *moving]},
        "observation.environment_state": {"dtype": "float32", "shape": (kitchen,), "names": None},
        "action": {"dtype": "float32", "shape": (9,), "names": ACTIONS[actions]},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }


def convert(source: Path, root: Path, layout: str = "relay", actions: str = "joint_targets") -> tuple[int, int]:
    """Writes all demonstrations of a source as a LeRobotDataset.

    Args:
        source: a file or a folder in one of the published forms.
        root: folder to create; must not exist.
        layout: "relay" (60 observed numbers) or "d4rl" (59, with velocities).
        actions: "joint_targets" (positions of the joints) or "velocity" (shares of 2 rad/s).

    Returns:
        Number of episodes and of frames.

    Raises:
        ValueError: unknown `layout` or `actions`; or `StoreError`: the source is damaged, foreign, of the wrong
            shape, or has no velocities for "d4rl".
        FileExistsError: `root` exists.
    """
    for name, value, known in (("layout", layout, tuple(LAYOUTS)), ("actions", actions, tuple(ACTIONS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, not {value!r}")
    found = recordings(source)
    if layout == "d4rl" and any(recording.velocities is None for recording in found):
        raise StoreError(f"{source} holds no velocities, which the layout d4rl needs: choose the layout relay")
    episodes = (_episode(recording, layout, actions) for recording in found)
    return write_dataset(root, FPS, features(layout, actions), episodes, total=len(found))


def joint_targets(positions: NDArray, velocity: NDArray) -> NDArray:
    """Where velocities (..., 9) send the joints from observed positions (..., 9): q + 0.16 a within the limits."""
    return np.clip(positions + REACH * np.clip(velocity, -1, 1), *JOINT_LIMITS.T)


def _episode(recording: Recording, layout: str, actions: str) -> Episode:
    length = len(recording.actions)
    agent, kitchen = observe(layout, recording.positions, recording.velocities)
    targets = joint_targets(recording.positions[:length, :9], recording.actions)
    columns = {
        "observation.state": agent[:length].astype(np.float32),
        "observation.environment_state": kitchen[:length].astype(np.float32),
        "action": (targets if actions == "joint_targets" else recording.actions).astype(np.float32),
    }
    return Episode(columns | outcome(recording.positions, length), TASK_DESCRIPTION)


def outcome(positions: NDArray, length: int) -> dict[str, NDArray]:
    """What each of `length` actions led to, read off the observation after it; the last may have none."""
    completed = np.maximum.accumulate(done_now(positions), axis=0).sum(axis=1)
    after = np.append(completed[1:], completed[-1])[:length, None]
    done = np.zeros((length, 1), dtype=bool)
    done[-1] = True
    return {"next.reward": score(after).astype(np.float32), "next.done": done, "next.success": after >= SCORED}
