"""What a fine-tuning step costs against the number of solver steps: `python eval/finetune_cost.py`.

Time in units of one step of flow matching on the same batch, both taken in turn; peak memory of the process above what
it held before its first step, each in a process of its own. The shipped policy's shape, random windows, one thread.
With --root, also how well fewer solver steps choose among noises (`nearest_steps`), by the shipped pre-trained policy.
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHOOSING_STEPS = (8, 4, 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of solver steps")
    add("--batch-size", type=int, default=64, help="windows in a batch")
    add("--pairs", type=int, default=5, help="times that each is taken")
    add("--root", type=Path, help="a data set of Push-T, on whose held-out windows fewer steps choose among noises")
    add("--samples", type=int, default=64, help="windows of it, evenly spaced")
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


def check_root(root: Path) -> None:
    """Refuse now what would otherwise fail after minutes of measuring."""
    from fm_policy.evaluation.held_out_windows import check_dataset

    try:
        check_dataset(root)
    except ValueError as error:
        raise SystemExit(f"finetune_cost: {error}") from error


def choice(root: Path, steps: "Sequence[int]", samples: int, noises: int = 5) -> dict[int, dict[str, float]]:
    """How well the shipped pre-trained policy chooses by so many solver steps the noise whose chunk comes nearest.

    Args:
        root: The data set.
        steps: Numbers of solver steps to choose by.
        samples: Windows.
        noises: Noises of each window to choose from, the same for every number of steps.

    Returns:
        For each number of steps: in which share of the windows it is the noise that the policy's own steps choose
        (`same`), and the mean error, by the policy's own steps, of the noise that it chooses (`chosen`) and of any
        (`random`), each over that of the nearest.
    """
    import torch

    from fm_policy.assets import pretrained_policy
    from fm_policy.evaluation.checkpoint import load_checkpoint
    from fm_policy.evaluation.held_out_windows import HeldOutWindows
    from fm_policy.flow.losses import masked_mse

    # Nothing here needs torchcodec; LeRobot tells over a page when that finds no FFmpeg.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    checkpoint = load_checkpoint(pretrained_policy())
    policy, own = checkpoint.policy, checkpoint.policy.config.num_solver_steps
    windows = HeldOutWindows.of_dataset(root, policy.config, samples, noises, seed=0, batch_size=samples)
    batch = checkpoint.preprocessor(next(windows.batches()))

    def errors(solver_steps: int) -> torch.Tensor:
        policy.config.num_solver_steps = solver_steps
        with torch.no_grad():
            chunks = [policy.reconstruct(batch, noise) for noise in windows.noise]
        return torch.stack([masked_mse(x1, batch["action"], batch["action_is_pad"], "none") for x1 in chunks])

    exact = errors(own)
    nearest, rows = exact.argmin(dim=0), torch.arange(exact.shape[1])
    least, found = exact[nearest, rows].mean(), {}
    for count in steps:
        best = errors(count).argmin(dim=0)
        found[count] = {
            "same": (best == nearest).double().mean().item(),
            "chosen": (exact[best, rows].mean() / least).item(),
            "random": (exact.mean() / least).item(),
        }
    return found


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
    if args.root:
        check_root(args.root)
    cases: dict[str, dict[str, object]] = {}
    for steps in args.steps:
        cases[f"S={steps}"] = {"num_solver_steps": steps}
        cases[f"S={steps}, checkpointed"] = {"num_solver_steps": steps, "checkpoint_solver": True}
    nearest = {"coupling": "nearest", "nearest_k": 5}
    cases["S=2, nearest of 5"] = {"num_solver_steps": 2, **nearest}
    if 16 in args.steps:
        cases["S=16, nearest of 5"] = {"num_solver_steps": 16, **nearest}
        cases["S=16, nearest of 5 by 4"] = {"num_solver_steps": 16, **nearest, "nearest_steps": 4}
    rows: dict[str, dict] = {}
    # A process for each measurement, since the peak of a process never falls.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        unit = pool.apply(peak_memory, (args.batch_size, {}))
        print(f"one step of flow matching: {unit:.0f} MiB\n{'':24s}{'time':>8s}{'memory':>12s}", flush=True)
        for name, changes in cases.items():
            memory = pool.apply(peak_memory, (args.batch_size, {"stage": "finetune", **changes}))
            rows[name] = {"time": relative_time(args.batch_size, args.pairs, **changes), "memory_mib": memory}
            print(f"{name:24s}{rows[name]['time']:8.2f}{memory:8.0f} MiB", flush=True)
    if args.root:
        rows["choice"] = choice(args.root, CHOOSING_STEPS, args.samples)
        for steps, found in rows["choice"].items():
            print(f"the nearest of 5 noises by {steps} steps: {', '.join(f'{k} {v:.3f}' for k, v in found.items())}")
    if args.json:
        args.json.write_text(json.dumps({"flow_matching_mib": unit, **rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
