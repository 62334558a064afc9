"""Hold Theorem 1 (arXiv 2510.02081) against policies: `python eval/error_bound.py --policy DIR [DIR ...] --out DIR2`.

The learned field is taken as the truth (δ = 0), so the theorem speaks of Euler's solver error alone: how far the chunk
of N steps lies from that of a fine reference solution of the same field. L and M are measured along the reference
trajectories, on held-out observations. The theorem wants suprema over all points between the two trajectories, and over
all times, so these bounds are estimates. Distances are Euclidean, over all numbers of a chunk of normalised actions.
"""

import argparse
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from torch import Tensor
    from tqdm import tqdm

    from fm_policy.evaluation.checkpoint import Checkpoint
    from fm_policy.flow.field import Profile
    from fm_policy.flow.solvers import Velocity

SPECTRUM_ROWS, SPECTRUM_TIMES = 16, 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, nargs="+", required=True, help="folders of checkpoints")
    add("--label", nargs="+", help="their names; that of the run or folder that tells it from the others if not given")
    add("--out", type=Path, required=True, help="folder for error_bound.json and error_bound.png")
    add("--root", type=Path, help="folder of a LeRobotDataset; the shipped demonstrations if not given")
    add("--eval-split", type=float, default=0.05, help="share of its episodes that is held out (0.05)")
    add("--samples", type=int, default=64, help="windows, spaced evenly over the held-out frames (64)")
    add("--draws", type=int, default=1, help="draws of noise for each window (1)")
    add("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers N of Euler steps (1 to 32)")
    add(
        "--times",
        type=int,
        default=32,
        help="intervals of [0, 1] at whose ends the field is measured (32); (B.3) wants N to divide it",
    )
    add("--reference-steps", type=int, default=128, help="rk4 steps of the reference, a multiple of --times (128)")
    add("--tolerance", type=float, default=1e-4, help="of dopri5, whose calls are counted (1e-4)")
    add("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()
    if min(args.steps) < 1:
        parser.error(f"--steps must be at least 1, got {min(args.steps)}")
    if args.times < SPECTRUM_TIMES or args.reference_steps % args.times or args.reference_steps < 2:
        parser.error(
            f"--reference-steps must be a multiple of --times, and that at least {SPECTRUM_TIMES}, "
            f"got {args.reference_steps} and {args.times}"
        )
    args.steps = sorted(set(args.steps))
    return args


def main() -> None:
    args = parse()
    # Imported late: help and wrong arguments need not wait for torch.
    from tqdm import tqdm

    from fm_policy.assets import default_demos
    from fm_policy.evaluation.checkpoint import load_checkpoint, name_policies
    from fm_policy.evaluation.provenance import PACKAGES, versions
    from fm_policy.files import write_json

    # Nothing here needs torchcodec; LeRobot tells over a page when that finds no FFmpeg.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    args.root = args.root or default_demos()
    records = []
    try:
        labels = name_policies(args.policy, args.label)
        checkpoints = [load_checkpoint(path) for path in args.policy]
        with tqdm(total=len(checkpoints) * (args.times + 3 + len(args.steps)), unit="part") as progress:
            for label, checkpoint in zip(labels, checkpoints, strict=True):
                progress.set_description(label)
                records.append(describe(label, checkpoint) | measure(checkpoint, args, progress))
    except ValueError as error:
        raise SystemExit(f"error_bound.py: {error}") from error
    print("\n\n".join(map(as_table, records)))
    args.out.mkdir(parents=True, exist_ok=True)
    names = ("eval_split", "samples", "draws", "times", "reference_steps", "tolerance", "seed")
    settings = {"root": str(args.root)} | {name: getattr(args, name) for name in names}
    record = {"settings": settings, "policies": records, "versions": versions(PACKAGES)}
    write_json(args.out / "error_bound.json", record)
    draw(records, args.out / "error_bound.png")
    print(f"\n{args.out / 'error_bound.json'}\n{args.out / 'error_bound.png'}")


def describe(label: str, checkpoint: "Checkpoint") -> dict[str, Any]:
    config = checkpoint.policy.config
    deployed = {"solver": config.solver, "num_solver_steps": config.num_solver_steps, "head_steps": config.head_nfe}
    return {
        "label": label,
        "path": str(checkpoint.path),
        "fingerprint": checkpoint.fingerprint,
        "stage": config.stage,
        "deployed": deployed,
    }


def held_out_windows(checkpoint: "Checkpoint", args: argparse.Namespace) -> tuple[dict[str, "Tensor"], "Tensor"]:
    """Preprocessed windows of held-out episodes, and their noise, `(draws, samples, horizon, action_dim)`."""
    from fm_policy import contract
    from fm_policy.evaluation.held_out_windows import HeldOutWindows

    config, numbers = checkpoint.policy.config, (args.samples, args.draws, args.seed)
    windows = HeldOutWindows.of_dataset(args.root, config, *numbers, args.eval_split, batch_size=args.samples)
    (batch,) = map(checkpoint.preprocessor, windows.batches())
    contract.check_windows(config, batch)
    return batch, windows.noise


def measure(checkpoint: "Checkpoint", args: argparse.Namespace, progress: "tqdm") -> dict[str, Any]:
    """All numbers of a policy."""
    import torch
    from lerobot.utils.constants import ACTION

    from fm_policy.flow.error_bound import uniform_grid_bound_exponential
    from fm_policy.flow.field import profile
    from fm_policy.flow.losses import masked_mse
    from fm_policy.flow.solvers import CountedVelocity, integrate

    config, net = checkpoint.policy.config, checkpoint.policy.active_net.requires_grad_(False)
    batch, noise = held_out_windows(checkpoint, args)
    x0, draws = config.noise_scale * noise.flatten(0, 1), len(noise)
    target, padding = batch[ACTION].repeat(draws, 1, 1), batch[f"{ACTION}_is_pad"].repeat(draws, 1)
    with torch.no_grad():
        o = net.encoder(batch).repeat(draws, 1)
    v, generator = net.velocity.bind(o), torch.Generator().manual_seed(args.seed)

    def through_head(x: "Tensor") -> "Tensor":
        if net.head is None:
            return x
        return integrate(net.head.bind(o), x, "euler", config.head_steps, start=1.0, end=1.0 + config.head_span)

    def error(x: "Tensor") -> float:
        return masked_mse(through_head(x), target, padding).item()

    substeps = args.reference_steps // args.times
    path = profile(v, x0, args.times, substeps, generator=generator, progress=progress.update)
    reference, rows = path.states[-1], []
    with torch.no_grad():
        coarse = integrate(v, x0, "rk4", args.reference_steps // 2)
        progress.update()
        adaptive = CountedVelocity(v)
        integrate(adaptive, x0, "dopri5", 1, args.tolerance)
        progress.update()
        for n in args.steps:
            chunk = integrate(v, x0, "euler", n)
            rows.append(hold(n, distance(chunk, reference), path) | {"reconstruction": error(chunk)})
            progress.update()
    lipschitz, every = path.lipschitz.amax(0), math.ceil(len(x0) / SPECTRUM_ROWS)
    record = {
        "times": path.times.tolist(),
        "lipschitz": quantiles(path.lipschitz),
        "curvature": quantiles(path.curvature),
        "largest_lipschitz": quantiles(lipschitz),
        "largest_curvature": quantiles(path.curvature.amax(0)),
        "amplification": quantiles(uniform_grid_bound_exponential(lipschitz, 0.0, 1.0, 1)),
        "straightness": path.straightness.mean().item(),
        "spectrum": spectra(net.velocity.bind(o[::every]), path.states[:, ::every], path.lipschitz[:, ::every]),
        "dopri5_nfe": adaptive.calls,
        "reference_error": quantiles(distance(coarse, reference)),
        "steps": rows,
        "reconstruction": error(reference),
    }
    if net.head is not None:
        with torch.no_grad():
            chunk = integrate(v, x0, config.solver, config.num_solver_steps)
        record["head"] = measure_head(net.head.bind(o), through_head, chunk, config.head_steps, config.head_span)
    return record


def hold(n: int, error: "Tensor", path: "Profile") -> dict[str, Any]:
    """Solver errors of N steps, `(B,)`, against (B.3) with the L and M of each step, and (5) with those of the path."""
    from fm_policy.flow.error_bound import recursion_bound, uniform_grid_bound

    bounds = {"bound_5": uniform_grid_bound(path.lipschitz.amax(0), path.curvature.amax(0), 0.0, n)}
    if (len(path.times) - 1) % n == 0:  # else L at the start of a step is not known
        bounds["recursion"] = recursion_bound(*path.on_grid(n), 0.0, [1 / n] * n)
    held = {f"{name}_held": (error <= bound).double().mean().item() for name, bound in bounds.items()}
    return {"n": n, "error": quantiles(error)} | {name: quantiles(bound) for name, bound in bounds.items()} | held


def spectra(v: "Velocity", states: "Tensor", lipschitz: "Tensor") -> dict[str, Any]:
    """Medians over the rows of the exact Jacobian's extremes, and by how much a measured L falls short of |J| at most.

    Args:
        v: Velocity of these rows' observations.
        states: Their reference trajectories, `(times + 1, B, ...)`.
        lipschitz: What was measured on them, `(times + 1, B)`.
    """
    import torch

    from fm_policy.flow.field import Jacobian, spectrum

    last, rows, short = len(states) - 1, [], []
    for k in [round(i * last / SPECTRUM_TIMES) for i in range(SPECTRUM_TIMES + 1)]:
        matrix = Jacobian(v, k / last, states[k]).matrix()
        extremes = {name: extreme.median().item() for name, extreme in spectrum(matrix)._asdict().items()}
        rows.append({"t": k / last} | extremes)
        short.append(1 - lipschitz[k] / torch.linalg.matrix_norm(matrix, ord=2))
    return {"rows": rows, "shortfall": torch.stack(short).max().item()}


def measure_head(
    v: "Velocity", through: "Callable[[Tensor], Tensor]", x: "Tensor", steps: int, span: float
) -> dict[str, Any]:
    """L of the head along its own Euler steps from the deployed flow's chunks, and |dy/dx| of the head as a map."""
    import torch

    from fm_policy.flow.field import Jacobian
    from fm_policy.flow.solvers import euler_step

    products = x[0].numel()  # so many make it exact
    factor = Jacobian(lambda _, chunk: through(chunk), 1.0, x).largest_singular_value(products)
    lipschitz, moved = [], x
    for n in range(steps):
        t = 1.0 + n * span / steps
        lipschitz.append(Jacobian(v, t, moved).largest_singular_value(products))
        with torch.no_grad():
            moved = euler_step(v, t, span / steps, moved)
    return {
        "lipschitz": quantiles(torch.stack(lipschitz).amax(0)),
        "factor": quantiles(factor),
        "moved": quantiles(distance(moved, x)),
    }


def distance(x: "Tensor", y: "Tensor") -> "Tensor":
    return (x - y).flatten(1).norm(dim=1)


def quantiles(values: "Tensor") -> dict[str, Any]:
    """Over the trajectories, the last dimension."""
    return {
        "median": values.median(dim=-1).values.tolist(),
        "p90": values.quantile(0.9, dim=-1).tolist(),
        "max": values.amax(dim=-1).tolist(),
    }


def as_table(record: dict[str, Any]) -> str:
    def numbers(values: dict[str, float]) -> str:
        return "  ".join(f"{values[name]:10.4g}" for name in ("median", "p90", "max"))

    deployed, reference = record["deployed"], record["reference_error"]
    text = f"{deployed['solver']}, {deployed['num_solver_steps']} steps" + (
        f", then {deployed['head_steps']} of the head" if deployed["head_steps"] else ""
    )
    lines = [
        f"{record['label']}: stage {record['stage']}, deployed with {text}",
        f"{'':44s}{'median':>10s}  {'90 %':>10s}  {'largest':>10s}",
        f"{'L, largest on the way':44s}{numbers(record['largest_lipschitz'])}",
        f"{'M, largest on the way':44s}{numbers(record['largest_curvature'])}",
        f"{'(e^L - 1) / L, what (5) makes of a δ':44s}{numbers(record['amplification'])}",
        f"{'reference with half its steps is off by':44s}{numbers(reference)}",
        f"straightness {record['straightness']:.4g} (0: straight)   dopri5 {record['dopri5_nfe']} calls   "
        f"reconstruction error of the reference {record['reconstruction']:.4f}",
    ]
    if head := record.get("head"):
        names = {"lipschitz": "L of the head", "factor": "factor |dy/dx| of the head", "moved": "the head moves by"}
        lines[6:6] = [f"{names[name]:44s}{numbers(values)}" for name, values in head.items()]
    spectrum = record["spectrum"]
    lines.append(f"medians of exact Jacobians (the measured L is short of them by {spectrum['shortfall']:.1%} at most)")
    lines.append(f"{'t':>6s}{'least Re λ':>12s}{'largest':>10s}{'log. norm':>11s}")
    lines += [
        f"{row['t']:6.2f}{row['least']:12.2f}{row['largest']:10.2f}{row['logarithmic_norm']:11.2f}"
        for row in spectrum["rows"]
    ]
    lines.append(
        f"{'N':>5s}{'error: median':>15s}{'90 %':>9s}{'largest':>9s}{'order':>7s}"
        f"{'(B.3): median':>15s}{'held':>7s}{'(5): median':>13s}{'held':>7s}{'reconstruction':>16s}"
    )
    before: dict[str, Any] | None = None
    for row in record["steps"]:
        error, own = row["error"], is_deployed(record, row["n"])
        lines.append(
            f"{row['n']:5d}{error['median']:15.4g}{error['p90']:9.3g}{error['max']:9.3g}{order(before, row):>7s}"
            f"{held(row, 'recursion'):>22s}{held(row, 'bound_5'):>20s}{row['reconstruction']:16.4f}"
            + ("  <- deployed" if own else "")
        )
        before = row
    return "\n".join(lines)


def held(row: dict[str, Any], bound: str) -> str:
    """The median bound, and the share of trajectories that keep it."""
    return f"{row[bound]['median']:.3g}{row[f'{bound}_held']:7.0%}" if bound in row else "-" + 7 * " "


def order(before: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """The p of a median error that falls like N^-p, from one row to the next."""
    if before is None:
        return ""
    fall = math.log(before["error"]["median"] / row["error"]["median"])
    return f"{fall / math.log(row['n'] / before['n']):.2f}"


def is_deployed(record: dict[str, Any], n: int) -> bool:
    return record["deployed"]["solver"] == "euler" and record["deployed"]["num_solver_steps"] == n


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """L against t, solver error and bounds against N, reconstruction error against N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    for i, record in enumerate(records):
        draw_policy(axes, record, f"C{i}", width=0.5 + len(records) - i)  # thinner: equal ones stay in sight
    rate, error, reconstruction = axes
    times = [t for t in records[0]["times"] if t < 1]
    rate.plot(times, [1 / (1 - t) for t in times], "k:", label="1 / (1 - t), contraction to a point")
    rate.set(xlabel="time t (0: noise, 1: actions)", ylabel="|dv/dx| along the flow", yscale="log")
    rate.set_title("Lipschitz constant: median, shaded up to the largest")
    largest = max(row["error"]["max"] for record in records for row in record["steps"])
    smallest = min(row["error"]["median"] for record in records for row in record["steps"])
    error.set(xscale="log", yscale="log", ylim=(smallest / 3, 1e4 * largest))
    error.set(xlabel="Euler steps N", ylabel="distance from the reference chunk at t = 1 (median)")
    error.set_title("solver error and its bounds with δ = 0")
    for style, name in (("o-", "error"), ("--", "(B.3) with L, M of each step"), (":", "(5) with the largest L, M")):
        error.plot([], [], style, color="0.4", label=name)
    reconstruction.set(xscale="log", xlabel="Euler steps N", ylabel="mean squared error, normalised actions")
    reconstruction.set_title("distance from the demonstrated chunk")
    reconstruction.plot([], [], "*", color="0.4", markersize=14, label="as deployed")
    reconstruction.plot([], [], "--", color="0.4", label="reference, N to infinity")
    for axis in (error, reconstruction):
        numbers = sorted({row["n"] for record in records for row in record["steps"]})
        axis.set_xticks(numbers, [str(n) for n in numbers])
        axis.xaxis.minorticks_off()
    for axis in axes:
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_policy(axes: "Sequence[Axes]", record: dict[str, Any], colour: str, width: float) -> None:
    rate, error, reconstruction = axes
    rows, lipschitz = record["steps"], record["lipschitz"]
    numbers = [row["n"] for row in rows]
    rate.plot(record["times"], lipschitz["median"], color=colour, linewidth=width, label=record["label"])
    rate.fill_between(record["times"], lipschitz["median"], lipschitz["max"], color=colour, alpha=0.2, linewidth=0)
    for name, style in (("error", "o-"), ("recursion", "--"), ("bound_5", ":")):
        label = record["label"] if name == "error" else None
        shown = [(row["n"], row[name]["median"]) for row in rows if name in row]
        error.plot(*zip(*shown, strict=True), style, color=colour, linewidth=width, label=label)
    values = [row["reconstruction"] for row in rows]
    reconstruction.plot(numbers, values, "o-", color=colour, linewidth=width, label=record["label"])
    reconstruction.axhline(record["reconstruction"], color=colour, linestyle="--", linewidth=width)
    own = [(row["n"], row["reconstruction"]) for row in rows if is_deployed(record, row["n"])]
    if own:
        reconstruction.plot(*own[0], "*", color=colour, markersize=14)


if __name__ == "__main__":
    main()
