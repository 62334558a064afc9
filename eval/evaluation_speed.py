"""How fast episodes are evaluated, beside LeRobot's own program: `python eval/evaluation_speed.py`.

`lerobot-eval` and `eval/rollout.py`, on one policy and one task, same first seed and number of episodes, each as a
process of its own with both cores, in turns. Seconds are by each program's own count, which leaves imports out; the
whole process is timed beside it. LeRobot films the first ten episodes (or records them as a data set), and steps every
environment until the last one of its batch has ended.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROLLOUT = Path(__file__).with_name("rollout.py")
SEED = 1000


class Taken(NamedTuple):
    """Seconds of an evaluation, by the program's own count and of the whole process, and the share of successes."""

    counted: float
    process: float
    success: float


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, help="folder of a checkpoint; the one that ships for the task if not given")
    add("--env", default="pusht_b", help="the task, as eval/rollout.py names it")
    add("--episodes", type=int, default=100, help="in a turn")
    add("--batch-size", type=int, default=50, help="environments of lerobot-eval; its own default is 50")
    add("--processes", type=int, default=2, help="of eval/rollout.py")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for name in ("episodes", "batch_size", "processes", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.batch_size = min(args.batch_size, args.episodes)
    return args


def timed(command: list[str]) -> float:
    """Seconds of a whole process.

    Raises:
        RuntimeError: If it fails.
    """
    start = time.perf_counter()
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {told.returncode}:\n{told.stderr[-2000:]}")
    return time.perf_counter() - start


def theirs(args: argparse.Namespace, policy: Path, folder: Path) -> Taken:
    """One evaluation by `lerobot-eval`."""
    from env_configs.presets import PRESETS

    config, settings = PRESETS[args.env]
    task = [f"--env.type={config().type}", *(f"--env.{name}={json.dumps(value)}" for name, value in settings.items())]
    how = [f"--eval.n_episodes={args.episodes}", f"--eval.batch_size={args.batch_size}", "--eval.use_async_envs=false"]
    words = [f"--policy.path={policy}", *task, *how, f"--seed={SEED}", f"--output_dir={folder}"]
    process = timed([sys.executable, "-m", "lerobot.scripts.lerobot_eval", *words])
    overall = json.loads((folder / "eval_info.json").read_text())["overall"]
    return Taken(overall["eval_s"], process, overall["pc_success"] / 100)


def ours(args: argparse.Namespace, policy: Path, folder: Path) -> Taken:
    """One evaluation by `eval/rollout.py`."""
    words = ["--policy", policy, "--env", args.env, "--episodes", args.episodes, "--seed", SEED, "--out", folder]
    process = timed([sys.executable, str(ROLLOUT), *map(str, words), "--processes", str(args.processes)])
    summary = json.loads((folder / "summary.json").read_text())
    return Taken(summary["seconds"]["evaluation"], process, summary["success"])


PROGRAMS = {"lerobot-eval": theirs, "eval/rollout.py": ours}


def measure(args: argparse.Namespace) -> dict[str, list[Taken]]:
    """What every turn took."""
    from tqdm import tqdm

    from env_configs import make_env_config
    from fm_policy.assets import default_policy

    make_env_config(args.env)  # an unknown one is told before anything runs
    policy = args.policy or default_policy(args.env)
    turns: dict[str, list[Taken]] = {name: [] for name in PROGRAMS}
    for _ in tqdm(range(args.rounds), unit="round"):
        for name, run in PROGRAMS.items():
            with tempfile.TemporaryDirectory() as folder:
                turns[name].append(run(args, policy, Path(folder, "out")))
    return turns


def main() -> None:
    args = parse()
    try:
        taken = measure(args)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"evaluation_speed.py: {error}") from error
    print(f"{args.env}, {args.episodes} episodes: medians of {args.rounds}, and how many times as fast")
    print(f"{'':18s}{'seconds':>9s}{'process':>9s}{'success':>9s}")
    for name, turns in taken.items():
        counted, process, success = (statistics.median(values) for values in zip(*turns, strict=True))
        print(f"{name:18s}{counted:9.1f}{process:9.1f}{success:9.3f}")
    pairs = list(zip(*taken.values(), strict=True))
    for what, which in {"by their own count": 0, "whole processes": 1}.items():
        ratios = [their[which] / our[which] for their, our in pairs]
        print(f"{what}: {statistics.median(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f})")
    if args.json:
        told = {name: [turn._asdict() for turn in turns] for name, turns in taken.items()}
        about = {"env": args.env, "episodes": args.episodes, "processes": args.processes}
        args.json.write_text(json.dumps(about | {"turns": told}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
