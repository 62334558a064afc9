"""Attempts at robosuite's two-arm tasks: two hands, one script for each, in step with each other."""

from collections.abc import Callable, Generator, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_configs.experts.arm import GaveUpError, Hand, Vector
from env_configs.experts.attempt import Attempt
from env_configs.robosuite_models import TASKS
from env_configs.robosuite_tasks import ACTIONS, RobosuiteTask
from env_configs.rotations import to_six

Script = Generator[Vector, None, Any]
Plan = Callable[[Any, Hand, Hand, np.random.Generator], tuple[Script, Script]]
"""robosuite's environment, just reset, the two hands and random numbers -> what each hand does."""

_DELTA = np.array([0.05] * 3 + [0.5] * 3 + [1.0])
"""What 1 means in a delta action: m, rad, and the gripper's own."""

_LOST = 0.6
"""Height of what has fallen off the tables, m; their tops are at 0.8."""


def perform(name: str, plan: Plan, seed: int, options: Mapping[str, str]) -> Attempt:
    """One attempt: up to the success or the last step, or until a hand gives up or the object lies on the floor.

    Args:
        name: the task, a name in `TASKS`.
        plan: what the hands do.
        seed: of the start and of all that the plan draws.
        options: `actions`, "absolute" or "delta".

    Raises:
        ValueError: unknown `actions`.
        ModuleNotFoundError: robosuite or MuJoCo is not installed.
    """
    actions = options["actions"]
    if actions not in ACTIONS:
        raise ValueError(f"actions must be one of {', '.join(ACTIONS)}, not {actions!r}")
    env, rng = _environment(name, actions), np.random.default_rng(seed)
    seen, info = env.reset(seed=seed)
    simulator = env._simulator._env
    hands = Hand(simulator, 0, rng), Hand(simulator, 1, rng)
    scripts = plan(simulator, *hands, rng)
    rows: dict[str, list[Any]] = {"observation.state": [], "observation.environment_state": [], "action": []}
    for _ in range(TASKS[name].episode_length):
        try:
            commands = [next(script, None) for script in scripts]
        except GaveUpError:
            break
        if all(command is None for command in commands) or _is_lost(seen["environment_state"]):
            break
        ways = [hand.stay() if way is None else way for hand, way in zip(hands, commands, strict=True)]
        action = _action(hands, ways, actions).astype(np.float32)  # as it is recorded, so that it can be replayed
        for key, row in zip(rows, (seen["agent_pos"], seen["environment_state"], action), strict=True):
            rows[key].append(row)
        seen, _, _, _, info = env.step(action)
        if info["is_success"]:
            break
    columns = {key: np.array(row, dtype=np.float32) for key, row in rows.items()}
    success = bool(info.pop("is_success"))
    return Attempt(columns | _outcome(len(rows["action"]), success), env.task_description, success, info)


@cache
def _environment(name: str, actions: str) -> RobosuiteTask:
    return RobosuiteTask(name, actions=actions)


def _is_lost(objects: NDArray) -> bool:
    return bool(objects[2] < _LOST)  # the hammer's or the payload's height comes third


def _action(hands: tuple[Hand, Hand], ways: list[Vector], actions: str) -> NDArray[np.float64]:
    """The commands of both hands as the environment takes them."""
    if actions == "delta":
        return np.concatenate([way / _DELTA for way in ways])
    from scipy.spatial.transform import Rotation  # late: every program of LeRobot imports the tasks

    arms = []
    for hand, way in zip(hands, ways, strict=True):
        turned = Rotation.from_rotvec(way[3:6]).as_matrix() @ hand.rotation
        arms.append(np.concatenate([hand.position + way[:3], to_six(turned), way[6:]]))
    return np.concatenate(arms)


def _outcome(steps: int, success: bool) -> dict[str, NDArray]:
    """What each action led to: the last one to the success, if it was one."""
    last = np.arange(steps)[:, None] == steps - 1
    solved = last & success
    return {"next.reward": solved.astype(np.float32), "next.done": last, "next.success": solved}
