"""What our environments cost beside the bare simulators: `python eval/env_speed.py`.

Steps per second of the bare simulator, of our environment alone, of a batch in this process and of a batch with one
process each, in turns; a row gives the medians, and the median over the rounds of each as a share of the bare one.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from tqdm import tqdm

from env_configs.presets import make_env_config

ANEW = {NEW_ROLLOUT_OPTION: True}  # without it LeRobot's batches stay where their episodes ended
TASKS = ("pusht", "kitchen", "lift", "handover", "transport")
Run = Callable[[int], float]
"""Takes about so many steps of environments, and returns the steps per second."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="tasks to time")
    add("--batch", type=int, default=16, help="environments in the batch in this process")
    add("--processes", type=int, default=2, help="environments in the batch with one process each")
    add("--steps", type=int, default=200, help="steps of each in a round")
    add("--rounds", type=int, default=5, help="rounds")
    add("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for name in ("batch", "processes", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def bare(task: str) -> Run:
    """The simulator as its own makers give it to anyone; actions at random."""
    simulator: Any
    if task == "kitchen":
        from gymnasium_robotics.envs.franka_kitchen import KitchenEnv

        simulator, low, high, size = KitchenEnv(), -1, 1, 9
    elif task == "pusht":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # pygame's, on import
            from gym_pusht.envs import PushTEnv
        simulator, low, high, size = PushTEnv(obs_type="environment_state_agent_pos"), 0, 512, 2
    else:
        simulator = _bare_robosuite(task)
        low, high, size = -1, 1, simulator.action_dim
    generator = np.random.default_rng(0)

    def run(steps: int) -> float:
        simulator.reset()
        start = time.perf_counter()
        for _ in range(steps):
            simulator.step(generator.uniform(low, high, size))
        return steps / (time.perf_counter() - start)

    return run


def _bare_robosuite(task: str) -> Any:
    logging.getLogger("robosuite_logs").disabled = True  # it tells of every file that it reads
    import robosuite

    from env_configs.robosuite_models import TASKS as MODELS

    arms = MODELS[task].arms
    two = {"env_configuration": "opposed"} if arms == 2 else {}
    plain = {"has_renderer": False, "has_offscreen_renderer": False, "use_camera_obs": False, "ignore_done": True}
    return robosuite.make(MODELS[task].name, robots=["Panda"] * arms, control_freq=20, **plain, **two)


def ours(task: str, number: int, processes: bool) -> Run:
    """Our environments, told to stay near where they are: a random pose of an arm would be no pose at all."""
    config = make_env_config(task, **({} if task == "pusht" else {"actions": DELTA[task]}))
    suite = config.create_envs(number, use_async_envs=processes)
    batch = next(iter(next(iter(suite.values())).values()))
    generator = np.random.default_rng(0)
    low, high = (0, 512) if task == "pusht" else (-1, 1)

    def run(steps: int) -> float:
        batch.reset(seed=0, options=ANEW)
        rounds = max(steps // number, 1)
        start = time.perf_counter()
        for _ in range(rounds):
            action = generator.uniform(low, high, batch.action_space.shape).astype(batch.action_space.dtype)
            _, _, terminated, truncated, _ = batch.step(action)
            if (terminated | truncated).any():  # an ended episode costs nothing, and would not be the simulator's rate
                batch.reset(seed=0, options=ANEW)
        return rounds * number / (time.perf_counter() - start)

    return run


DELTA = {"kitchen": "velocity", "lift": "delta", "handover": "delta", "transport": "delta"}


def measure(task: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Way of running -> its steps per second, and their share of the bare simulator's."""
    runs = {
        "bare": bare(task),
        "alone": ours(task, 1, processes=False),
        f"batch of {args.batch}": ours(task, args.batch, processes=False),
        f"{args.processes} processes": ours(task, args.processes, processes=True),
    }
    for run in runs.values():
        run(args.steps // 4)  # robosuite compiles on its first steps
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(args.rounds), desc=task, unit="round"):
        for name, run in runs.items():
            rates[name].append(run(args.steps))
    return {
        name: {
            "steps_per_second": statistics.median(rate),
            "share": statistics.median(mine / its for mine, its in zip(rate, rates["bare"], strict=True)),
        }
        for name, rate in rates.items()
    }


def main() -> None:
    args = parse()
    measured = {}
    for task in args.tasks:
        measured[task] = measure(task, args)
        for name, row in measured[task].items():
            print(f"{task:10s} {name:12s} {row['steps_per_second']:8.0f} steps/s {row['share']:6.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
