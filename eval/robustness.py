"""How disturbances travel through policies: `python eval/robustness.py --policy BASE TUNED --root DATA --out FOLDER`.

On windows of held-out demonstrations: how much of a disturbance of the noise x0, of the normalised observation, and of
the flow's chunk x(1) before the head, arrives at the chunk. All policies get the same noise and disturbances. With
`--episodes` also in the simulator: success, score and jitter of the executed actions under noise in the observations,
paired by seed and repeat. Writes `robustness.json`, `robustness.png`, and an evaluation as `eval/rollout.py` writes it
for every policy and noise, continued after a kill.
"""

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lerobot.envs.configs import EnvConfig
    from matplotlib.axes import Axes
    from torch import Tensor

    from fm_policy.evaluation.checkpoint import Checkpoint
    from fm_policy.evaluation.runs import Run

SIZES = [float(f"{size:.3g}") for size in np.geomspace(0.01, 1, 7)]
TOLD = (0, 3, 6)  # of them, in the table
BATCH = 32  # windows at a time
OUTCOMES = ("success", "max_reward", "jitter")
NAMES = {
    "noise": "the noise x0",
    "observation": "the observation",
    "flow": "x(1), before the head",
    "success": "success",
    "max_reward": "score",
    "jitter": "jitter, squared units of the actions",
}
STYLES = ("C0o-", "C1s-", "C2^-", "C3v-", "C4D-", "C5x-", "C6P-", "C7*-")
LINE: dict[str, Any] = {
    "markersize": 5,
    "fillstyle": "none",
    "linewidth": 1,
}  # lines that lie on each other show through
Json = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, nargs="+", required=True, help="folders of checkpoints; the first is the reference")
    add("--label", nargs="+", help="their names; that of the run or folder that tells it from the others if not given")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--root", type=Path, help="folder of a LeRobotDataset; the shipped demonstrations if not given")
    add("--nfe", type=int, help="network calls per chunk, of every policy; each one's own if not given")
    add("--samples", type=int, default=256, help="windows, spaced evenly over the held-out frames")
    add("--draws", type=int, default=8, help="draws of noise for the spread of one observation's chunks")
    add("--episodes", type=int, default=0, help="starts in the simulator; 0: none")
    add("--repeats", type=int, default=1, help="episodes of each start, with different noise")
    add("--seed", type=int, default=1000, help="of noise and disturbances, and of the first start")
    add("--sigma", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1], help="noise in the observations, normalised")
    add("--env", default="pusht_b", help="task: pusht_b, pusht_a, kitchen, lift, handover, transport")
    add("--device", default="cpu", help="where the policies run")
    args = parser.parse_args()
    if args.draws < 2:
        parser.error(f"--draws must be at least 2, got {args.draws}: one chunk has no spread")
    return args


def summarised(values: NDArray[np.float64], reference: NDArray[np.float64]) -> Json:
    """Mean over a table `(clusters, repeats)` with its interval, and the paired difference to the first policy's."""
    from fm_policy.evaluation.statistics import mean_interval, paired_difference

    difference, interval = paired_difference(values, reference)
    record = {"mean": float(values.mean()), "interval": mean_interval(values)}
    return record | {"minus_first": difference, "minus_first_interval": interval}


# ---------------------------------------------------------------- on held-out windows


def read_windows(args: argparse.Namespace, policies: dict[str, "Checkpoint"]) -> tuple[list[Json], "Tensor"]:
    """Batches of held-out windows, as the data set has them, and the noise of each window, `(draws, windows, ...)`.

    Raises:
        ValueError: If the policies do not see and do the same, or there are no such windows.
    """
    from fm_policy.assets import default_demos
    from fm_policy.evaluation.held_out_windows import HeldOutWindows
    from fm_policy.evaluation.inference import observed_numbers

    configs = {label: checkpoint.policy.config for label, checkpoint in policies.items()}
    shapes = {
        label: (observed_numbers(c), c.n_obs_steps, c.horizon, c.action_feature.shape) for label, c in configs.items()
    }
    (first, expected), *others = shapes.items()
    for label, shape in others:
        if shape != expected:
            raise ValueError(f"{first} and {label} see or do different things: {expected} and {shape}")
    root, numbers = args.root or default_demos(), (args.samples, args.draws, args.seed)
    windows = HeldOutWindows.of_dataset(root, configs[first], *numbers, batch_size=BATCH)
    return list(windows.batches()), windows.noise


def measure(checkpoint: "Checkpoint", batches: list[Json], noise: "Tensor", seed: int, progress: Any) -> Json:
    """By held-out episode: `responses` by place `(sizes, episodes, 1)`, `spreads` `(episodes, 1)` of each kind."""
    import torch

    from fm_policy.evaluation.disturbance import responses, spreads

    policy = checkpoint.policy
    changes, spread = [], []
    for number, (batch, x0) in enumerate(zip(batches, noise.split(BATCH, dim=1), strict=True)):
        windows = checkpoint.preprocessor(batch)
        observation = {name: windows[name] for name in policy.config.input_features or {}}
        x0 = x0.to(policy.config.device)
        changes.append(responses(policy, observation, x0[0], SIZES, seed + number))
        spread.append(spreads(policy, observation, x0))
        progress.update(x0.shape[1])
    episode = torch.cat([batch["episode_index"] for batch in batches])

    def by_episode(values: "Tensor") -> NDArray[np.float64]:
        means = [values[..., episode == index].mean(dim=-1) for index in episode.unique()]
        return torch.stack(means, dim=-1).unsqueeze(-1).cpu().double().numpy()

    return {
        "responses": {place: by_episode(torch.cat([c[place] for c in changes], dim=1)) for place in changes[0]},
        "spreads": {
            "flow": by_episode(torch.cat([s.flow for s in spread])),
            "chunk": by_episode(torch.cat([s.chunk for s in spread])),
            "mode_changes": by_episode(torch.cat([s.mode_changes.float().mean(dim=0) for s in spread])),
        },
    }


def part_one(args: argparse.Namespace, policies: dict[str, "Checkpoint"]) -> tuple[Json, Json]:
    """How it was measured, and what came out by policy."""
    from tqdm import tqdm

    from fm_policy.assets import default_demos
    from fm_policy.evaluation.disturbance import certified_factor

    batches, noise = read_windows(args, policies)
    measured = {}
    with tqdm(total=noise.shape[1] * len(policies), unit="window") as progress:
        for label, checkpoint in policies.items():
            progress.set_description(label)
            measured[label] = measure(checkpoint, batches, noise, args.seed, progress)
    first = next(iter(measured.values()))
    records: Json = {}
    for label, checkpoint in policies.items():
        config, own = checkpoint.policy.config, measured[label]
        head = {"nfe": config.nfe, "head_nfe": config.head_nfe, "certified_factor": certified_factor(checkpoint.policy)}
        factors = {
            place: [
                {"size": size, "change": float(change.mean()), "factor": summarised(change / size, reference / size)}
                for size, change, reference in zip(SIZES, changes, first["responses"][place], strict=True)
            ]
            for place, changes in own["responses"].items()
        }
        spread: Json = {name: summarised(value, first["spreads"][name]) for name, value in own["spreads"].items()}
        spread["ratio"] = spread["chunk"]["mean"] / spread["flow"]["mean"]
        origin = {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint, "note": checkpoint.note}
        records[label] = origin | head | {"responses": factors, "spread": spread}
    settings = {
        "root": str(args.root or default_demos()),
        "windows": noise.shape[1],
        "held_out_episodes": first["spreads"]["flow"].shape[0],
        "draws": args.draws,
        "seed": args.seed,
    }
    return settings, records


# ---------------------------------------------------------------- in the simulator


def make_runs(args: argparse.Namespace, task: "EnvConfig") -> dict[float, "Run"]:
    """What to run, by the noise in the observations; nothing without episodes."""
    from env_configs.extras import SIMULATORS
    from fm_policy.evaluation.runs import Run

    if args.episodes == 0:
        return {}
    plan = Run(seed=args.seed, episodes=args.episodes, repeats=args.repeats, packages=SIMULATORS[task.type])
    return {sigma: replace(plan, observation_noise=sigma) for sigma in args.sigma}


def part_two(out: Path, policies: dict[str, "Checkpoint"], task: "EnvConfig", runs: dict[float, "Run"]) -> Json:
    """By policy a record for each noise, with paired differences to the first policy, and to the least noise."""
    from fm_policy.evaluation.episodes import read_episodes
    from fm_policy.evaluation.runs import evaluate_into
    from fm_policy.evaluation.statistics import paired_difference, share_interval, table

    tables: dict[tuple[str, float], dict[str, NDArray[np.float64]]] = {}
    for sigma, run in runs.items():
        for label, checkpoint in policies.items():
            folder = out / "rollouts" / label / f"noise_{sigma:g}"
            print(f"{label}, observation noise {sigma:g}: {folder}", flush=True)
            evaluate_into(folder, checkpoint, task, run, resume=True)
            episodes = read_episodes(folder / "episodes.jsonl")
            tables[label, sigma] = {name: table(episodes, name) for name in OUTCOMES}
    first, least = next(iter(policies)), min(runs)
    records: dict[str, list[Json]] = {label: [] for label in policies}
    for (label, sigma), own in tables.items():
        record: Json = {"observation_noise": sigma}
        for name, values in own.items():
            record[name] = summarised(values, tables[first, sigma][name])
            difference, interval = paired_difference(values, tables[label, least][name])
            record[name] |= {"minus_least_noise": difference, "minus_least_noise_interval": interval}
        record["success"]["interval"] = share_interval(own["success"])
        records[label].append(record)
    return records


# ---------------------------------------------------------------- what people look at


def told(record: Json, name: str = "mean", sign: bool = False) -> str:
    """A number with its interval; differences are told with their sign."""
    interval = record["interval" if name == "mean" else f"{name}_interval"]
    largest = max(map(abs, (record[name], *(interval or ()))))
    form = "+.3g" if sign else ".3f" if largest < 10 else ".1f"
    ends = "no interval" if interval is None else ", ".join(f"{end:{form}}" for end in interval)
    return f"{record[name]:{form}} [{ends}]"


def as_text(record: Json) -> str:
    from fm_policy.evaluation.report import nfe_text

    policies, settings = record["policies"], record["settings"]
    title = "{windows} windows of {held_out_episodes} held-out episodes in {root}; 95 % intervals over the episodes"
    lines = [title.format(**settings), "factor = RMS change of the chunk / RMS of the disturbance"]
    for place in ("noise", "observation", "flow"):
        certified = ["certified"] if place == "flow" else []
        difference = f"by {SIZES[TOLD[1]]:g}, minus the first"
        rows = [[f"disturbed: {NAMES[place]}", *(f"by {SIZES[i]:g}" for i in TOLD), difference, *certified]]
        for label, own in policies.items():
            factors = [own["responses"][place][i]["factor"] for i in TOLD]
            rows.append([f"{label}, {nfe_text(own)}", *map(told, factors), told(factors[1], "minus_first", sign=True)])
            rows[-1] += [proven(own) for _ in certified]
        lines += ["", aligned(rows)]
    rows = [["spread of one observation's chunks", "at t = 1", "after the head", "ratio", "changes of mode"]]
    for label, own in policies.items():
        spread = own["spread"]
        rows.append([label, told(spread["flow"]), told(spread["chunk"]), f"{spread['ratio']:.3f}"])
        rows[-1].append(f"{spread['mode_changes']['mean']:.2%}")
    lines += ["", aligned(rows)]
    for name in OUTCOMES if record["rollouts"] else ():
        rows = [[f"{NAMES[name]} at observation noise", "", "", "minus the first policy", "minus its least noise"]]
        for label, entries in record["rollouts"].items():
            for entry in entries:
                numbers = entry[name]
                differences = [
                    told(numbers, difference, sign=True) for difference in ("minus_first", "minus_least_noise")
                ]
                rows.append([label, f"{entry['observation_noise']:g}", told(numbers), *differences])
        lines += ["", aligned(rows)]
    return "\n".join(lines)


def proven(own: Json) -> str:
    if own["certified_factor"] is None:
        return "nothing" if own["head_nfe"] else "no head"
    return f"<= {own['certified_factor']['factor']:.4f}"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def draw_response(axes: "Axes", record: Json, place: str) -> None:
    for style, (label, own) in zip(cycle(STYLES), record["policies"].items(), strict=False):
        axes.loglog(SIZES, [entry["change"] for entry in own["responses"][place]], style, label=label, **LINE)
    axes.loglog(SIZES, SIZES, "--", color="0.5", label="as large as the disturbance")
    axes.set(title=f"disturbed: {NAMES[place]}", xlabel="RMS of the disturbance, normalised")
    axes.set(ylabel="RMS change of the chunk, normalised")


def draw_heads(axes: "Axes", record: Json) -> None:
    """The factor of the third panel, near 1, where its lines lie on each other."""
    for style, own in zip(cycle(STYLES), record["policies"].values(), strict=False):
        entries = own["responses"]["flow"]
        axes.semilogx(SIZES, [entry["factor"]["mean"] for entry in entries], style, **LINE)
        if own["certified_factor"]:
            axes.axhline(own["certified_factor"]["factor"], color=style[:2], linestyle=":")
    axes.plot([], [], ":", color="0.5", label="certified: none larger")
    axes.set(title="what the heads let through", xlabel="RMS of the disturbance of x(1), normalised")
    axes.set(ylabel="factor (1: as it came)")
    axes.legend(fontsize=8)


def draw_spreads(axes: "Axes", record: Json) -> None:
    policies = record["policies"]
    for shift, (name, when) in enumerate({"flow": "at t = 1", "chunk": "after the head"}.items()):
        places = np.arange(len(policies)) + 0.4 * shift - 0.2
        axes.bar(places, [own["spread"][name]["mean"] for own in policies.values()], 0.38, label=when)
    axes.set_xticks(range(len(policies)), policies, rotation=30, ha="right")
    axes.set(title="chunks of one observation from different noises", ylabel="spread, normalised")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(fontsize=8)


def draw_outcome(axes: "Axes", record: Json, name: str) -> None:
    for number, (style, entries) in enumerate(zip(cycle(STYLES), record["rollouts"].values(), strict=False)):
        means = np.array([entry[name]["mean"] for entry in entries])
        ends = np.array([entry[name]["interval"] or (mean, mean) for entry, mean in zip(entries, means, strict=True)]).T
        sigma = np.array([entry["observation_noise"] for entry in entries])
        sigma += 0.012 * sigma.max() * number  # side by side
        axes.errorbar(sigma, means, np.abs(ends - means), fmt=style, capsize=3, **LINE)
    axes.set(title=f"{NAMES[name].split(',')[0]} in the simulator, 95 % intervals", ylabel=NAMES[name])
    axes.set(xlabel="standard deviation of the observation noise, normalised")


def draw(record: Json, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 4 if record["rollouts"] else 3
    figure, axes = plt.subplots(2, columns, figsize=(4.6 * columns, 8.4))
    panels = list(axes.flat)
    first = panels[0]
    for place in ("noise", "observation", "flow"):
        draw_response(panels.pop(0), record, place)
    draw_heads(panels.pop(0), record)
    draw_spreads(panels.pop(0), record)
    for name in OUTCOMES if record["rollouts"] else ():
        draw_outcome(panels.pop(0), record, name)
    for unused in panels:
        unused.axis("off")
    figure.legend(*first.get_legend_handles_labels(), loc="lower center", ncols=len(record["policies"]) + 1)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=100)


def main() -> None:
    args = parse()
    # Imported late: help and wrong arguments need not wait for torch.
    from env_configs import make_env_config
    from fm_policy.evaluation.checkpoint import load_checkpoint, name_policies
    from fm_policy.evaluation.provenance import PACKAGES, describe_hardware, versions
    from fm_policy.files import write_json

    # Nothing here needs torchcodec; LeRobot tells over a page when that finds no FFmpeg.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    try:
        names, task = name_policies(args.policy, args.label), make_env_config(args.env)
        runs = make_runs(args, task)
        loaded = [load_checkpoint(path, args.device, nfe=args.nfe) for path in args.policy]
        policies = dict(zip(names, loaded, strict=True))
        settings, responses = part_one(args, policies)
        rollouts = part_two(args.out, policies, task, runs) if runs else {}
    except ValueError as error:
        raise SystemExit(f"robustness.py: {error}") from error
    record = {
        "settings": settings,
        "policies": responses,
        "rollouts": rollouts,
        "versions": versions(PACKAGES),
        "hardware": describe_hardware(next(loaded[0].policy.parameters()).device),
        "command": shlex.join(["python", *sys.argv]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "robustness.json", record)
    print(as_text(record))
    draw(record, args.out / "robustness.png")
    print(f"{args.out}: robustness.json, robustness.png")


if __name__ == "__main__":
    main()
