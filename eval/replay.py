"""Replay the actions of a data set in the simulator: `python eval/replay.py --env kitchen --root data/kitchen`.

A data set holds observations, not the simulator's states, so the starts come from where it came from: the seeds that a
scripted expert's data set keeps, the recording (`--source`) that a human one was converted from, or, in the kitchen,
where every episode starts at the same place, the episode's number as a seed of the noise.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Start = dict[str, Any]
"""Arguments of an environment's `reset`."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--env", required=True, help="task: kitchen, lift, handover, transport")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the task: actions=delta; repeatable")
    add("--root", type=Path, required=True, help="folder of the data set")
    add("--source", type=Path, help="HDF5 recording that the data set was converted from, whole and in its order")
    add("--episodes", type=int, help="replay only so many, the first; all if not given")
    add("--json", type=Path, help="file to write the outcomes to")
    return parser.parse_args()


def starts(env: str, root: Path, source: Path | None) -> list[Start] | None:
    """Where the episodes start, in their order; None: anywhere, the episode's number as a seed.

    Raises:
        ValueError: Nothing tells, or the recording cannot be read.
    """
    if source is not None:
        from env_configs.demos.hdf5_store import find_array, find_group, numbered, open_hdf5, read, read_text

        with open_hdf5(source, "robosuite") as file:
            data = find_group(file, "data")
            demos = [find_group(data, name) for name in numbered(data, "demo_")]
            states = [read(find_array(demo, "states", (None, None)), 0, 1)[0] for demo in demos]
            models = [read_text(demo, "model_file") for demo in demos]
        pairs = zip(states, models, strict=True)
        return [{"seed": 0, "options": {"reset_to_state": state, "model_file": model}} for state, model in pairs]
    if record := scripted(root):
        return [{"seed": seed} for seed in record["seeds"]]
    if env == "kitchen":
        return None
    raise ValueError(f"nothing tells where the episodes of {root} start: give the recording by --source FILE")


def scripted(root: Path) -> dict[str, Any]:
    """How the episodes of a scripted data set were recorded; empty for another one."""
    file = root / "meta" / "scripted.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def episodes(root: Path) -> Iterator[NDArray[np.float32]]:
    """Actions `(T, action_dim)` of each episode of a data set."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if not (root / "meta" / "info.json").is_file():
        raise ValueError(f"{root} is no LeRobotDataset: it lacks meta/info.json")
    table = LeRobotDataset(f"local/{root.name}", root=root, video_backend="pyav").hf_dataset.with_format("numpy")
    numbers, actions = (np.asarray(table[:][name]) for name in ("episode_index", "action"))
    for number in np.unique(numbers):
        yield actions[numbers == number]


def replay(env: Any, start: Start, actions: NDArray[np.float32]) -> dict[str, Any]:
    """Outcome of an episode of these actions: success, steps taken and the last step's measures of progress."""
    _, info = env.reset(**start)
    steps = 0
    for action in actions:
        steps += 1
        *_, terminated, truncated, info = env.step(action)
        if terminated or truncated or info["is_success"]:
            break
    progress = {name: float(value) for name, value in info.items() if isinstance(value, (bool, float, np.bool_))}
    return {"success": bool(progress.pop("is_success")), "steps": steps, "recorded_steps": len(actions), **progress}


def main() -> None:
    args = parse()
    if args.episodes is not None and args.episodes < 1:
        raise SystemExit(f"replay.py: --episodes must be at least 1, not {args.episodes}")
    from tqdm import tqdm

    from env_configs import make_env_config, parse_options
    from env_configs.demos.stores import StoreError

    try:
        env = make_env_config(args.env, **scripted(args.root).get("options", {}) | parse_options(args.option)).make()
        recorded = list(episodes(args.root))
        begin = starts(args.env, args.root, args.source) or [{"seed": number} for number in range(len(recorded))]
        if len(begin) != len(recorded):
            raise ValueError(f"{args.root} has {len(recorded)} episodes, but {len(begin)} starts are known")
        chosen = list(zip(begin, recorded, strict=True))[: args.episodes]
        pairs = tqdm(chosen, desc="replaying", unit="episode")
        outcomes = [replay(env, start, actions) for start, actions in pairs]
    except (ValueError, StoreError, ModuleNotFoundError) as error:
        raise SystemExit(f"replay.py: {error}") from error
    solved = sum(outcome["success"] for outcome in outcomes)
    print(f"{args.root}: {solved} of {len(outcomes)} episodes replayed to success")
    for number, outcome in enumerate(outcomes):
        if not outcome["success"]:
            print(f"  episode {number}: {outcome}")
    if args.json:
        args.json.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
