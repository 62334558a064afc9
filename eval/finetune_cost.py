"""Measure what a step of fine-tuning costs against the number of solver steps: `python eval/finetune_cost.py`."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fm_policy.assets import default_policy
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.provenance import PACKAGES, describe_hardware, versions
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

NEAREST_OF, NEAREST_AT = 5, 2  # noises per row, solver steps


class Case(NamedTuple):
    """A kind of training step."""

    stage: str = "finetune"
    steps: int = 1
    coupling: str = "independent"
    checkpoint: bool = False


CFM = Case("pretrain")


class Trainer:
    """A new policy of a given shape with its optimiser. Neither weights nor data make a step dearer."""

    def __init__(self, shape: FlowMatchingConfig, case: Case) -> None:
        stage, steps, coupling, checkpoint = case
        grid = {"num_solver_steps": steps, "checkpoint_solver": checkpoint}
        plain = {
            "use_ema": False,
            "window_store": False,
            "variance": "scalar",
            "cfm_weight": 0.0,
            "train_encoder": True,
        }
        config = replace(shape, stage=stage, coupling=coupling, nearest_k=NEAREST_OF, **grid, **plain)
        torch.manual_seed(0)
        self.policy = FlowMatchingPolicy(config).to(config.device).train()
        self.optimizer = config.get_optimizer_preset().build(self.policy.get_optim_params())

    def batch(self, size: int) -> dict[str, Tensor]:
        """Random windows."""
        config = self.policy.config
        shapes = {name: (config.n_obs_steps, *ft.shape) for name, ft in (config.input_features or {}).items()}
        shapes["action"] = (config.horizon, *config.action_feature.shape)
        return {name: torch.rand(size, *shape, device=config.device) * 2 - 1 for name, shape in shapes.items()}

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward, backward, optimiser; returns when the device is done."""
        self.policy.forward(batch)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.policy.config.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, batch: dict[str, Tensor]) -> float:
        """Of one step."""
        start = time.perf_counter()
        self.step(batch)
        return time.perf_counter() - start


def relative_times(shape: FlowMatchingConfig, cases: Sequence[Case], size: int, pairs: int) -> list[dict[str, Any]]:
    """For each case the median of its step over a CFM step, each pair of steps one right after the other."""
    unit, rows = Trainer(shape, CFM), []
    batch = unit.batch(size)
    for case in cases:
        trainer = Trainer(shape, case)
        timed = [(unit.seconds(batch), trainer.seconds(batch)) for _ in range(pairs + 1)][1:]  # the first warms up
        ratios = [ours / cfm for cfm, ours in timed]
        cfm_seconds = statistics.median(cfm for cfm, _ in timed)
        rows.append({"time": statistics.median(ratios), "times": ratios, "cfm_seconds": cfm_seconds})
    return rows


def peak_memory(shape: FlowMatchingConfig, case: Case, size: int) -> int:
    """Bytes that a step adds at its peak to what policy and optimiser hold; for a new process, once."""
    trainer = Trainer(shape, case)
    batch = trainer.batch(size)
    trainer.step(trainer.batch(1))  # makes the optimiser's state and the libraries' buffers
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step(batch)
        return torch.cuda.max_memory_allocated() - before
    # Not `ru_maxrss`: it starts at the parent's, and keeps what the imports once took.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    trainer.step(batch)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at their peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_memory_of_a_new_process(case: Case) -> int:
    command = [sys.executable, *sys.argv, "--memory-of", json.dumps(case)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr)
    return int(child.stdout.splitlines()[-1])


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'step of training':42}{'time / CFM step':>16}{'memory, MB':>12}"]
    for row in rows:
        name = "flow matching"
        if row["stage"] == "finetune":
            name = f"fine-tuning, S = {row['steps']}{', checkpointed' * row['checkpoint']}"
            name += f", nearest of {NEAREST_OF}" * (row["coupling"] == "nearest")
        lines.append(f"{name:42}{row['time']:16.2f}{row['memory'] / 1e6:12.0f}")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against S."""
    import matplotlib.pyplot as plt  # of the development environment; only the picture wants it

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    tuned = [row for row in rows if row["stage"] == "finetune"]
    for axis, key, unit, label in zip(
        panels, ("time", "memory"), (1, 1e6), ("time of a step / CFM step", "peak memory of a step, MB"), strict=True
    ):
        for checkpoint, style in ((False, "C0o-"), (True, "C1s-")):
            chosen = [row for row in tuned if row["coupling"] == "independent" and row["checkpoint"] == checkpoint]
            values = [row[key] / unit for row in chosen]
            name = "solver steps checkpointed" if checkpoint else "all kept"
            axis.plot([row["steps"] for row in chosen], values, style, label=name)
        nearest = [row for row in tuned if row["coupling"] == "nearest"]
        values = [row[key] / unit for row in nearest]
        axis.plot([row["steps"] for row in nearest], values, "C2^", label=f"nearest of {NEAREST_OF}")
        axis.axhline(rows[0][key] / unit, color="0.5", linestyle=":", label="flow matching (CFM)")
        axis.set(xlabel="solver steps S", ylabel=label, ylim=(0, None))
        axis.set_xticks(sorted({row["steps"] for row in tuned}))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--policy",
        type=Path,
        help="checkpoint whose shape is measured; the one that ships with the package if not given",
    )
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="solver steps S")
    add("--batch-size", type=int, default=64, help="windows in a batch")
    add("--pairs", type=int, default=7, help="pairs of steps, CFM and fine-tuning, of which the median is taken")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--device", default="cpu", help="cpu or cuda")
    add("--json", type=Path, help="file to write the numbers to")
    add("--plot", type=Path, help="file for a picture of time and memory against S")
    add("--memory-of", help=argparse.SUPPRESS)  # a case: print the memory of its step, in this process
    args = parser.parse_args()
    for name in ("batch_size", "pairs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        checkpoint = load_checkpoint(args.policy or default_policy(), args.device)
        shape = checkpoint.policy.config
        if args.memory_of:
            return print(peak_memory(shape, Case(*json.loads(args.memory_of)), args.batch_size))
        cases = [CFM, *(Case("finetune", steps, checkpoint=flag) for flag in (False, True) for steps in args.steps)]
        cases.append(Case("finetune", NEAREST_AT, "nearest"))
        times = relative_times(shape, cases, args.batch_size, args.pairs)
    except ValueError as error:
        raise SystemExit(f"finetune_cost.py: {error}") from error
    rows = [c._asdict() | t | {"memory": peak_memory_of_a_new_process(c)} for c, t in zip(cases, times, strict=True)]
    print(f"{checkpoint.path}, {shape.solver}, batches of {args.batch_size}\n{as_text(rows)}")
    if args.json:
        made_with = {"versions": versions(PACKAGES), "hardware": describe_hardware(torch.device(args.device))}
        summary = {"policy": str(checkpoint.path), "solver": shape.solver, "batch_size": args.batch_size} | made_with
        args.json.write_text(json.dumps(summary | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
