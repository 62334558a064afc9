"""What a fine-tuning step costs against the number of solver steps: `python eval/finetune_cost.py`.

Time in units of one step of flow matching on the same batch, both taken in turn; peak memory of the process above what
it held before its first step, each in a process of its own. The shipped policy's shape, random windows, one thread.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of solver steps")
    add("--batch-size", type=int, default=64, help="windows in a batch")
    add("--pairs", type=int, default=5, help="times that each is taken")
    add("--json", type=Path, help="file for the numbers")
    return parser.parse_args()


def make_step(batch_size: int, **changes: object) -> "Callable[[], float]":
    """A training step of the shipped pre-trained policy's shape; returns its seconds."""
    import torch
    from lerobot.configs import PreTrainedConfig

    from fm_policy.assets import pretrained_policy
    from fm_policy.modeling_fm_ft import FlowMatchingPolicy

    torch.set_num_threads(1)
    config = PreTrainedConfig.from_pretrained(pretrained_policy())
    for name, value in {"use_ema": True, **changes}.items():
        setattr(config, name, value)
    policy = FlowMatchingPolicy(config).train()
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    shapes = {name: (config.n_obs_steps, *feature.shape) for name, feature in (config.input_features or {}).items()}
    shapes["action"] = (config.horizon, *config.action_feature.shape)
    batch = {name: torch.rand(batch_size, *shape) * 2 - 1 for name, shape in shapes.items()}

    def step() -> float:
        start = time.perf_counter()
        loss, _ = policy(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.update()
        return time.perf_counter() - start

    return step


def relative_time(batch_size: int, pairs: int, **changes: object) -> float:
    """Median over pairs of the step's seconds over those of a flow-matching step beside it."""
    plain, tuned = make_step(batch_size), make_step(batch_size, stage="finetune", **changes)
    plain(), tuned()
    return statistics.median(tuned() / plain() for _ in range(pairs))


def peak_memory(batch_size: int, changes: dict[str, object]) -> float:
    """MiB that two steps need at their peak above what the process held before them (Linux)."""
    step = make_step(batch_size, **changes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of the imports, is forgotten
    before = _status("VmRSS")
    step(), step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A number of the process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    args = parse()
    cases: dict[str, dict[str, object]] = {}
    for steps in args.steps:
        cases[f"S={steps}"] = {"num_solver_steps": steps}
        cases[f"S={steps}, checkpointed"] = {"num_solver_steps": steps, "checkpoint_solver": True}
    nearest = {"coupling": "nearest", "nearest_k": 5}
    cases["S=2, nearest of 5"] = {"num_solver_steps": 2, **nearest}
    if 16 in args.steps:
        cases["S=16, nearest of 5"] = {"num_solver_steps": 16, **nearest}
        cases["S=16, nearest of 5 by 4"] = {"num_solver_steps": 16, **nearest, "nearest_steps": 4}
    rows = {}
    # A process for each measurement, since the peak of a process never falls.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        unit = pool.apply(peak_memory, (args.batch_size, {}))
        print(f"one step of flow matching: {unit:.0f} MiB\n{'':24s}{'time':>8s}{'memory':>12s}", flush=True)
        for name, changes in cases.items():
            memory = pool.apply(peak_memory, (args.batch_size, {"stage": "finetune", **changes}))
            rows[name] = {"time": relative_time(args.batch_size, args.pairs, **changes), "memory_mib": memory}
            print(f"{name:24s}{rows[name]['time']:8.2f}{memory:8.0f} MiB", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"flow_matching_mib": unit, **rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
