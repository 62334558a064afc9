"""How fast the image net trains and acts on a device, beside what bounds it.

Training: samples per second of the whole step (windows gathered on the device, loss, gradient, clipping, AdamW,
average) beside a bare loop that only learns from one ready batch; and the share of the device's own rate, that of a
large matrix product in the same arithmetic. Inference: one robot's chunk, encoder and all solver steps.
"""

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fm_policy.accelerator.data import ACTION, IMAGE, STATE, Windows
from fm_policy.accelerator.net import make_net
from fm_policy.accelerator.plan import Plan
from fm_policy.accelerator.shards import diffusion_settings
from fm_policy.accelerator.training import Trainer, flops, loss_of
from fm_policy.flow.solvers import call_times, integrate
from fm_policy.net import FlowMatchingNet

WARM_UP = 3
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the product that stands for the device's rate
NEEDS_CUDA = "needs CUDA"

Call = Callable[[], object]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_second(call: Call, rounds: int, device: torch.device) -> float:
    """Calls per second, the device never waited for in between."""
    for _ in range(WARM_UP):
        call()
    wait(device)
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    wait(device)
    return rounds / (time.perf_counter() - start)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product; float32 is TF32 on a GPU."""
    side = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 * per_second(lambda: a @ b, 10, device)


def training(plan: Plan, windows: Windows, rounds: int, device: torch.device, eager: bool) -> dict[str, Any]:
    """Rates of the training step, by how it computes.

    Args:
        plan: Of `fm`.
        windows: The data.
        rounds: Steps that are timed.
        device: Where.
        eager: Leave out what must be compiled.

    Returns:
        For each way samples per second of `step` and `bare`, and the step's `share` of the device's rate.
    """
    work = flops(plan, windows) * plan.batch
    ways = [(bf16, compiled) for bf16 in (False, True) for compiled in ([False] if eager else [False, True])]
    rows = {}
    for bf16, compiled in tqdm(ways, desc="training", unit="way"):
        rate = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(replace(plan, bf16=bf16, compile=compiled), windows, Path(folder), None, device)
        step, bare = per_second(trainer.learn, rounds, device), per_second(_bare(trainer), rounds, device)
        name = f"{'compiled' if compiled else 'eager'}, {'bf16' if bf16 else 'float32'}"
        rows[name] = {"step": step * plan.batch, "bare": bare * plan.batch, "share": step * work / rate}
    if importlib.util.find_spec("lerobot") is not None:
        rows["LeRobot's diffusion, eager, float32"] = {
            "bare": plan.batch * per_second(_peer(plan, windows), rounds, device)
        }
    return rows


def _bare(trainer: Trainer) -> Call:
    """Nothing but learning, from one ready batch."""
    batch = trainer.windows.draw(trainer.plan.batch)

    def step() -> None:
        loss_of(trainer.plan, trainer.net, None, batch).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def _peer(plan: Plan, windows: Windows) -> Call:
    """The same of LeRobot's diffusion policy with a net of the same shape."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    from fm_policy.baselines import configuration_dp_ema  # noqa: F401  (registers the type)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(diffusion_settings(plan.policy)), encoding="utf-8")
        policy = DiffusionPolicy(PreTrainedConfig.from_pretrained(folder))
    batch = windows.draw(plan.batch)
    policy.to(batch[ACTION].device)
    optimizer = torch.optim.AdamW(policy.parameters(), plan.lr, fused=True)

    def step() -> None:
        policy(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def inference(plan: Plan, windows: Windows, nfe: list[int], calls: int, eager: bool) -> dict[str, Any]:
    """Milliseconds of one chunk by the number of network calls and by how they are run, and of the parts.

    Args:
        plan: Of `fm`.
        windows: For what is observed, and the device.
        nfe: Numbers of network calls.
        calls: Chunks that are timed.
        eager: Leave out what must be compiled.

    Returns:
        For each row `p50` and `p99`, or why there is none.
    """
    device = windows.train.device
    net = make_net(plan.policy).to(device).eval()
    seen = {name: windows.at(windows.train[:1])[name] for name in (IMAGE, STATE)}
    x = torch.randn_like(windows.at(windows.train[:1])[ACTION])
    o, t = net.encoder(seen), torch.tensor(0.5, device=device)
    timed: dict[str, Call] = {"one bare call": lambda: net.velocity(t, x, o), "encoder": lambda: net.encoder(seen)}
    for n in nfe:
        chunk = _chunk(net, n, seen, x)
        compiled = {} if eager else {"compiled": torch.compile(chunk)}
        for way, call in ({"eager": chunk} | compiled).items():
            timed[f"NFE {n}, {way}"] = call
            timed[f"NFE {n}, {way}, one CUDA graph"] = call
    rows: dict[str, Any] = {}
    for name, call in tqdm(timed.items(), desc="inference", unit="way"):
        if name.endswith("CUDA graph"):
            if device.type != "cuda":
                rows[name] = NEEDS_CUDA
                continue
            call = _graph(call)
        rows[name] = _percentiles(call, calls, device)
    return rows


def _chunk(net: FlowMatchingNet, steps: int, seen: Mapping[str, Tensor], x0: Tensor) -> Call:
    """From observation and noise to a chunk by Euler steps, with nothing on the way that the host must hand over."""
    times = {t: torch.tensor(t, device=x0.device) for t in call_times("euler", steps)}

    def chunk() -> Tensor:
        o = net.encoder(seen)
        return integrate(lambda t, x: net.velocity(times[float(t)], x, o), x0, "euler", steps)

    return chunk


def _graph(call: Call) -> Call:
    """A call recorded once, on buffers of its own, and played again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _percentiles(call: Call, calls: int, device: torch.device) -> dict[str, float]:
    for _ in range(WARM_UP):
        call()
    taken = []
    for _ in range(calls):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - start)
    p50, p99 = np.percentile(taken, [50, 99]) * 1e3
    return {"p50": float(p50), "p99": float(p99)}


def as_text(told: Mapping[str, Any]) -> str:
    """The tables, to be read."""
    lines = [f"{'training':40s}{'samples/s':>10s}{'bare loop':>10s}{'of it':>7s}{'of the matrix rate':>20s}"]
    for name, row in told["training"].items():
        whole = f"{row['step']:10.0f}" if "step" in row else f"{'':10s}"
        shares = f"{row['step'] / row['bare']:7.2f}{100 * row['share']:18.1f} %" if "step" in row else ""
        lines.append(f"{name:40s}{whole}{row['bare']:10.0f}{shares}")
    bare = told["inference"]["one bare call"]["p50"]
    lines.append(f"\n{'one chunk':40s}{'p50':>10s}{'p99':>10s}  ms{'bare calls':>12s}")
    for name, row in told["inference"].items():
        if isinstance(row, str):
            lines.append(f"{name:40s}{row:>20s}")
        else:
            lines.append(f"{name:40s}{row['p50']:10.3f}{row['p99']:10.3f}    {row['p50'] / bare:12.1f}")
    return "\n".join(lines)
