"""How long a policy thinks, beside its own limit and LeRobot's diffusion policy: `python eval/latency.py`.

One observation at a time, one thread unless asked otherwise, all in turns. A chunk is a `select_action` after a
`reset`: history, encoder, solver, queue. Its limit is what it cannot do without, the encoder once and the bare network
NFE times; the peer is LeRobot's `DiffusionPolicy` with a U-Net of the same size, and random weights. Processors are
timed apart, since they are LeRobot's for both. A second table has the bare call of several rows (an evaluation's),
and its rate beside that of a product of two large matrices, which stands for the machine's.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from fm_policy.configuration_fm_ft import FlowMatchingConfig
    from fm_policy.modeling_fm_ft import FlowMatchingPolicy

SIDE = 1024  # of the matrices whose product stands for the machine's rate
Observation = dict[str, "Tensor"]
Timed = dict[str, Callable[[], object]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, help="folder of a checkpoint with a U-Net; the shipped policy if not given")
    add("--nfe", type=int, nargs="+", default=[1, 2, 4, 16], help="network calls of a chunk")
    add("--rows", type=int, nargs="*", default=[1, 16, 64], help="of the bare calls whose rates are told")
    add("--peers", nargs="*", default=["ddpm/100", "ddim/10"], help="the peer's schedulers and calls")
    add("--rounds", type=int, default=10, help="turns of each")
    add("--calls", type=int, default=20, help="chunks in a turn")
    add("--threads", type=int, default=1, help="of torch")
    add("--compile", action="store_true", help="the network compiled, too; its compilation is timed as the first call")
    add("--device", default="cpu", help="where the networks run")
    add("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for name in ("rounds", "calls", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call, the accelerator's work included."""
    import torch

    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def observe(config: "FlowMatchingConfig", device: str) -> Observation:
    """A preprocessed observation of one robot, at random."""
    import torch

    features = config.input_features or {}
    return {name: torch.rand(1, *feature.shape, device=device) for name, feature in features.items()}


def chunk_of(policy: Any, observation: Observation) -> Callable[[], object]:
    """The policy's next chunk, as a robot asks for it."""

    def call() -> object:
        policy.reset()
        return policy.select_action(dict(observation))

    return call


def with_calls(policy: "FlowMatchingPolicy", nfe: int, observation: Observation) -> Callable[[], object]:
    """The same at a number of network calls."""
    chunk = chunk_of(policy, observation)

    def call() -> object:
        policy.config.set_solver(None, nfe)
        return chunk()

    return call


def parts(policy: "FlowMatchingPolicy", observation: Observation) -> Timed:
    """What no chunk can do without: a bare call of the network, and the encoder."""
    import torch

    from fm_policy import contract

    config, net = policy.config, policy.active_net
    history = contract.history(config, observation)
    with torch.no_grad():
        o = net.encoder(history)
    x = torch.randn(1, *config.noise_shape, device=o.device)
    return {
        "bare call": torch.no_grad()(lambda: net.velocity(0.5, x, o)),
        "encoder": torch.no_grad()(lambda: net.encoder(history)),
    }


def peer(config: "FlowMatchingConfig", how: str, device: str) -> Any:
    """LeRobot's diffusion policy that sees, does and computes as much per call."""
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    kind, _, calls = how.partition("/")
    if kind not in ("ddpm", "ddim") or not calls.isdigit() or config.velocity_net != "unet":
        raise ValueError(f"a peer is ddpm/CALLS or ddim/CALLS, beside a U-Net: {how!r} beside {config.velocity_net!r}")
    shape = ("n_obs_steps", "horizon", "n_action_steps", "input_features", "output_features", "normalization_mapping")
    net = ("down_dims", "kernel_size", "n_groups", "vision_backbone", "crop_shape", "use_group_norm")
    settings = {name: getattr(config, name) for name in (*shape, *net)}
    scheduler = {"noise_scheduler_type": kind.upper(), "num_inference_steps": int(calls)}
    embedding = {"diffusion_step_embed_dim": config.time_embed_dim, "pretrained_backbone_weights": None}
    return DiffusionPolicy(DiffusionConfig(**settings, **scheduler, **embedding, device=device)).to(device).eval()


def measure(timed: Timed, rounds: int, calls: int) -> dict[str, np.ndarray]:
    """Seconds of every call, `(rounds, calls)`, all of them in turns."""
    from tqdm import tqdm

    for call in timed.values():
        call()
    taken: dict[str, list[list[float]]] = {name: [] for name in timed}
    for _ in tqdm(range(rounds), unit="round"):
        for name, call in timed.items():
            taken[name].append([seconds(call) for _ in range(calls)])
    return {name: np.array(rows) for name, rows in taken.items()}


def row(taken: np.ndarray, limit: np.ndarray | None) -> dict[str, float | None]:
    """Percentiles in ms, and the median over the rounds of each one's median over its limit's."""
    share = None if limit is None else float(np.median(np.median(taken, axis=1) / limit))
    p50, p99 = np.percentile(taken, [50, 99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99), "worst_ms": float(taken.max() * 1e3), "over_limit": share}


def rates(policy: "FlowMatchingPolicy", rows: list[int], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Milliseconds, operations and rates of bare calls, by their rows; `share` is of the rate of the matrices."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    net = policy.active_net
    device = next(net.parameters()).device

    def bare(count: int) -> Callable[[], object]:
        x = torch.randn(count, *policy.config.noise_shape, device=device)
        o = torch.randn(count, net.encoder.output_dim, device=device)
        return torch.no_grad()(lambda: net.velocity(0.5, x, o))

    matrix = torch.randn(SIDE, SIDE, device=device)
    timed: Timed = {"matrices": lambda: matrix @ matrix} | {str(count): bare(count) for count in rows}
    operations = {}
    for name, call in timed.items():
        with FlopCounterMode(display=False) as counter:
            call()
        operations[name] = counter.get_total_flops()
    taken = {name: np.median(values, axis=1) for name, values in measure(timed, rounds, calls).items()}
    per_second = {name: operations[name] / values for name, values in taken.items()}
    return {
        name: {
            "ms": float(np.median(taken[name]) * 1e3),
            "operations": operations[name],
            "gflops": float(np.median(per_second[name]) / 1e9),
            "share": float(np.median(per_second[name] / per_second["matrices"])),
        }
        for name in timed
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements; see the module."""
    import torch

    from fm_policy.assets import default_policy
    from fm_policy.evaluation.checkpoint import load_checkpoint

    torch.set_num_threads(args.threads)
    loaded: list[Any] = []
    loading = seconds(lambda: loaded.append(load_checkpoint(args.policy or default_policy(), args.device)))
    checkpoint = loaded[0]
    policy, config = checkpoint.policy, checkpoint.policy.config
    observation = observe(config, args.device)
    first = {"loading": loading, "first chunk": seconds(with_calls(policy, args.nfe[0], observation))}
    timed: Timed = parts(policy, observation)
    timed |= {f"NFE {nfe}": with_calls(policy, nfe, observation) for nfe in args.nfe}
    action = torch.zeros(1, *config.action_feature.shape)
    timed["processors"] = lambda: (checkpoint.preprocessor(dict(observation)), checkpoint.postprocessor(action))
    if args.compile:
        compiled = load_checkpoint(args.policy or default_policy(), args.device).policy
        compiled.active_net.velocity.compile()
        first["first chunk, compiled"] = seconds(with_calls(compiled, args.nfe[0], observation))
        timed |= {f"NFE {nfe}, compiled": with_calls(compiled, nfe, observation) for nfe in args.nfe}
    timed |= {f"peer {how}": chunk_of(peer(config, how, args.device), observation) for how in args.peers}
    taken = measure(timed, args.rounds, args.calls)
    bare, encoder = (np.median(taken[name], axis=1) for name in ("bare call", "encoder"))
    limits = {f"NFE {nfe}": nfe * bare + encoder for nfe in args.nfe}
    rows = {name: row(values, limits.get(name.removesuffix(", compiled"))) for name, values in taken.items()}
    where = {"threads": args.threads, "device": args.device, "machine": platform.processor() or platform.machine()}
    size = sum(p.numel() for p in policy.active_net.parameters())
    told = {"rows": rows, "first_s": first, "parameters": size, "calls": args.rounds * args.calls, **where}
    return told | {"rates": rates(policy, args.rows, args.rounds, args.calls)}


def main() -> None:
    args = parse()
    try:
        told = run(args)
    except ValueError as error:
        raise SystemExit(f"latency.py: {error}") from error
    print(f"{'':20s}{'p50':>9s}{'p99':>9s}{'worst':>9s}  ms{'over its limit':>18s}")
    for name, numbers in told["rows"].items():
        share = "" if numbers["over_limit"] is None else f"{numbers['over_limit']:18.2f}"
        print(f"{name:20s}{numbers['p50_ms']:9.2f}{numbers['p99_ms']:9.2f}{numbers['worst_ms']:9.2f}    {share}")
    print("; ".join(f"{name} {value:.2f} s" for name, value in told["first_s"].items()))
    for name, numbers in told["rates"].items():
        what = f"{name} rows" if name.isdigit() else f"{SIDE} x {SIDE} {name}"
        print(f"{what:20s}{numbers['ms']:9.2f} ms{numbers['gflops']:9.1f} GFLOP/s{numbers['share']:9.2f} of matrices'")
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
