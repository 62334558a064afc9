"""Evaluate a checkpoint on a task: `python eval/rollout.py --episodes 500`."""

import argparse
import os
import time
from datetime import datetime
from pathlib import Path

from fm_policy.threads import give_way

START = time.perf_counter()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, help="folder of a checkpoint; the one that ships for the task if not given")
    add("--env", default="pusht_b", help="task: pusht_b, pusht_a, kitchen, lift, handover, transport")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the task: layout=d4rl; repeatable")
    add("--episodes", type=int, default=500, help="number of seeds, each one a start")
    add("--repeats", type=int, default=1, help="episodes of each seed, with different noise")
    add("--seed", type=int, default=1000, help="first seed")
    add("--nfe", type=int, help="network calls per chunk; the checkpoint's if not given")
    add(
        "--solver",
        help="euler, midpoint, heun, rk4, dopri5; of a diffusion policy ddpm, ddim; the checkpoint's if not given",
    )
    add("--noise-scale", type=float, help="standard deviation of the noise of chunks; the checkpoint's if not given")
    add("--n-action-steps", type=int, help="actions of a chunk to execute; the checkpoint's if not given")
    add("--batch-size", type=int, help="environments at a time, by default the task's; no number depends on it")
    add("--videos", type=int, default=0, help="episodes to film")
    add("--out", type=Path, help="folder for the results; outputs/eval/<date>/<time> if not given")
    add(
        "--resume", action="store_true", help="continue the evaluation in --out, to more episodes if more are asked for"
    )
    add("--observation-noise", type=float, default=0.0, help="added to the observations, in normalised units")
    add("--processes", type=int, default=1, help="of this machine that share the episodes; no number depends on it")
    add("--device", default="cpu", help="where the policy runs")
    args = parser.parse_args()
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the folder to continue")
    if args.out is None and (args.processes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        parser.error("several processes need --out, the folder that they share")
    return args


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate as one process, or as one of several that share the episodes."""
    from env_configs import make_env_config, parse_options
    from env_configs.extras import SIMULATORS
    from fm_policy.assets import default_policy
    from fm_policy.evaluation.checkpoint import load_any_checkpoint
    from fm_policy.evaluation.ranks import join
    from fm_policy.evaluation.report import as_text
    from fm_policy.evaluation.runs import Run, evaluate_into

    imports = round(time.perf_counter() - START, 2)
    names = ("seed", "episodes", "repeats", "n_action_steps", "batch_size", "videos", "observation_noise")
    options = parse_options(args.option)
    make_env_config(args.env, **options)  # a wrong one is told before a checkpoint is looked for
    policy = args.policy or default_policy(args.env)
    checkpoint = load_any_checkpoint(policy, args.device, args.solver, args.nfe, args.noise_scale)
    seen = {"obs": "image"} if checkpoint.policy.config.image_features else {}
    task = make_env_config(args.env, **seen | options)
    run = Run(**{name: getattr(args, name) for name in names}, packages=SIMULATORS[task.type])
    out = args.out or Path("outputs/eval", datetime.now().strftime("%Y-%m-%d/%H-%M-%S"))
    rank = join()
    if rank.first:
        print(f"evaluating {checkpoint.path} into {out}\n{checkpoint.note}".strip(), flush=True)
    summary = evaluate_into(out, checkpoint, task, run, args.resume, {"imports": imports}, rank)
    if rank.first:
        print(as_text(summary))


def main() -> None:
    args = parse()
    give_way()
    # Imported late, here and above: help and wrong arguments need not wait for torch.
    from env_configs.opengl import NoOpenGLError
    from fm_policy.evaluation.ranks import companions

    try:
        with companions(args.processes):
            evaluate(args)
    except (ValueError, ModuleNotFoundError, NoOpenGLError, OSError) as error:
        raise SystemExit(f"rollout.py: {error}") from error


if __name__ == "__main__":
    main()
