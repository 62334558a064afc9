"""How time and memory grow with size: `python eval/growth.py --json growth.json --plots growth.png`.

Each size is swept alone, on one thread, with the rest as in the recipe of Push-T from states:

    horizon, action_dim, batch   a training step on random windows, of `finetune_cost.py`; and a chunk for one robot, of
                                 `latency.py`, which the batch of training is nothing to
    cameras                      the same with pictures of 96 x 96 beside the states, in batches of 4
    episodes                     the window store of random episodes of 125 frames: opened for the first time, which
                                 builds it from the data set's files; opened again; and a batch of 128 windows gathered
                                 from it at random, out of the page cache, in which a store is that was built just now
    environments                 a step of a whole batch of Push-T in one process, of `env_speed.py`

Sizes take turns, each in a process of its own for every part. Memory is the peak of anonymous pages, looked at every
2 ms, above what the process held before the first call: of a training step gradients, the optimiser's state and
activations. Mapped is the same of files' pages, code among them, which the kernel drops where memory is short. Growth
is the exponent p of size^p.
"""

import argparse
import ctypes
import gc
import json
import logging
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# LeRobot tells over a page when it finds no FFmpeg, which nothing here needs: to be silenced before it is imported, and
# this module is the first that the processes import.
logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)

IMPORTS = ["__main__", "fm_policy.modeling_fm_ft", "env_configs.pusht"]  # once for all processes
BATCH, PICTURES, FRAMES, STEPS = 128, 4, 125, 100  # the recipe's batch, that with pictures; of an episode; simulated
CALLS, SECONDS = 3, 0.2  # at the least; the first call warms up
WATCH = 0.002  # seconds from one look at the memory to the next
COARSE = 256  # KiB by which the kernel's counts may be wrong: less counts as so much
NOISE = 0.1  # of an exponent: 7 % between sizes of which one is twice the other
MEASURES = {"seconds": "time", "mib": "memory", "mapped_mib": "mapped"}

Row = dict[str, float]
Table = dict[str, dict[str, dict[str, Any]]]
"""Sweep -> part -> `sizes`; of each measure the values, `(sizes, rounds)`; of time and memory the `exponents`."""


class Case(NamedTuple):
    """What is measured at a time, and the folder of what is written for it."""

    sweep: str
    part: str
    size: int
    folder: Path


def measured(call: Callable[[], float], once: bool = False) -> Row:
    """Median of the seconds that calls return, and the MiB that they take; see the module (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, unseen
    taken, seen, over, end = list[float](), [memory()], Event(), time.perf_counter() + SECONDS

    def watch() -> None:
        while not over.wait(WATCH):
            seen.append(memory())

    Thread(target=watch, daemon=True).start()
    while not taken or (not once and (len(taken) < CALLS or time.perf_counter() < end)):
        taken.append(call())
    over.set()
    seen.append(memory())
    mib, mapped = np.maximum(np.max(seen, axis=0) - seen[0], COARSE) / 1024
    return {"seconds": statistics.median(taken[1:] or taken), "mib": float(mib), "mapped_mib": float(mapped)}


def memory() -> list[int]:
    """Anonymous and mapped pages of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))]


def recipe() -> Any:
    """The recipe's configuration, as the shipped pre-trained policy has it."""
    from lerobot.configs import PreTrainedConfig

    from fm_policy.assets import pretrained_policy

    return PreTrainedConfig.from_pretrained(pretrained_policy())


def varied(case: Case) -> tuple[int, dict[str, Any]]:
    """Batch of the training, and what the case changes in the recipe's configuration."""
    from lerobot.configs import FeatureType, PolicyFeature

    if case.sweep == "batch":
        return case.size, {}
    if case.sweep == "horizon":
        return BATCH, {"horizon": case.size}
    if case.sweep == "action_dim":
        return BATCH, {"output_features": {"action": PolicyFeature(FeatureType.ACTION, (case.size,))}}
    pictures = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)) for i in range(case.size)}
    return PICTURES, {"input_features": recipe().input_features | pictures}


def train(case: Case) -> Row:
    from finetune_cost import make_step

    batch, changes = varied(case)
    return measured(make_step(batch, **changes))


def infer(case: Case) -> Row:
    from latency import chunk_of, observe, seconds

    from fm_policy.modeling_fm_ft import FlowMatchingPolicy

    config = recipe()
    for name, value in varied(case)[1].items():
        setattr(config, name, value)
    chunk = chunk_of(FlowMatchingPolicy(config).eval(), observe(config, "cpu"))
    return measured(lambda: seconds(chunk))


def write_episodes(root: Path, episodes: int) -> None:
    """A LeRobotDataset with the states and actions of Push-T, at random, described as the shipped one."""
    from datasets import Dataset
    from lerobot.datasets import LeRobotDataset

    from fm_policy.assets import default_demos

    shutil.copytree(default_demos() / "meta", root / "meta", ignore=shutil.ignore_patterns("episodes"))
    info = json.loads((root / "meta" / "info.json").read_text())
    index, number, random = np.arange(episodes * FRAMES), np.arange(episodes), np.random.default_rng(0)
    frames: dict[str, np.ndarray] = {"index": index, "episode_index": index // FRAMES}
    for key in ("observation.state", "observation.environment_state", "action"):
        frames[key] = random.random((len(index), *info["features"][key]["shape"]), dtype=np.float32)
    ends = {"dataset_from_index": FRAMES * number, "dataset_to_index": FRAMES * (number + 1)}
    for part, columns in {"data": frames, "meta/episodes": {"episode_index": number, **ends}}.items():
        file = root / part / "chunk-000" / "file-000.parquet"
        file.parent.mkdir(parents=True)
        Dataset.from_dict(columns).to_parquet(file)
    info["features"] = {key: info["features"][key] for key in frames}
    info |= {"total_episodes": episodes, "total_frames": len(index)}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    LeRobotDataset("local/pusht", root=root)  # copies it to its cache: a trainer has done so when the policy is made


def store(case: Case) -> Row:
    from latency import seconds
    from lerobot.datasets import LeRobotDatasetMetadata

    from fm_policy.window_store import WindowStore, open_store

    meta, config = LeRobotDatasetMetadata("local/pusht", root=case.folder / str(case.size)), recipe()

    def opened() -> WindowStore:
        return open_store(meta, config.observation_window, config.action_window)

    if case.part == "first opening":
        shutil.rmtree(case.folder / "fm_ft", ignore_errors=True)  # the stores
        return measured(lambda: seconds(opened), once=True)
    if case.part == "later opening":
        return measured(lambda: seconds(opened))
    windows, random = opened(), np.random.default_rng(0)

    def gather() -> None:
        index = random.integers(windows.ends[-1], size=BATCH)
        for key in windows.windows:
            windows.gather(key, index)

    return measured(lambda: seconds(gather))


def step(case: Case) -> Row:
    from env_speed import ours

    ours("pusht", 1, processes=False)(1)  # imports the simulator
    # Made and reset once: what resets leave to the garbage collection would be counted, more of it the longer it runs.
    return measured(lambda: case.size / ours("pusht", case.size, processes=False)(STEPS * case.size), once=True)


class Sweep(NamedTuple):
    """What a size counts, the usual sizes, and what is measured at each."""

    unit: str
    sizes: list[int]
    parts: dict[str, Callable[[Case], Row]]


NETS: dict[str, Callable[[Case], Row]] = {"training step": train, "chunk": infer}
STORES: dict[str, Callable[[Case], Row]] = dict.fromkeys(("first opening", "later opening", "batch of windows"), store)
SWEEPS = {
    "horizon": Sweep("actions in a chunk", [16, 32, 64, 128], NETS),
    "action_dim": Sweep("numbers in an action", [2, 7, 14, 28, 56], NETS),
    "cameras": Sweep("cameras", [1, 2, 3, 4], NETS),
    "batch": Sweep("windows in a batch", [16, 32, 64, 128, 256], {"training step": train}),
    "episodes": Sweep("episodes in the data set", [206, 1000, 5000, 20000], STORES),
    "environments": Sweep("environments in a batch", [1, 4, 16, 64, 128], {"step of all": step}),
}


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns, run in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure(sweeps: dict[str, list[int]], rounds: int, folder: Path) -> Table:
    """All numbers; the folder takes what is written for them."""
    from tqdm import tqdm

    # For the processes, where they import: one thread, no bars beside ours, and the user's home stays as it is.
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    os.environ |= {"HF_LEROBOT_HOME": str(folder), "HF_DATASETS_CACHE": str(folder / "cache")}
    for size in tqdm(sweeps.get("episodes", []), desc="writing episodes", unit="data set"):
        apart(write_episodes, folder / str(size), size)
    cases = [Case(sweep, part, n, folder) for sweep in sweeps for n in sweeps[sweep] for part in SWEEPS[sweep].parts]
    rows: dict[Case, list[Row]] = {case: [] for case in cases}
    for case in tqdm(cases * rounds, desc="measuring", unit="case"):
        rows[case].append(apart(SWEEPS[case.sweep].parts[case.part], case))
    table: Table = {sweep: {} for sweep in sweeps}
    for sweep, part in dict.fromkeys(case[:2] for case in cases):
        turns = [rows[Case(sweep, part, size, folder)] for size in sweeps[sweep]]
        table[sweep][part] = summary(sweeps[sweep], turns)
    return table


def summary(sizes: list[int], rows: list[list[Row]]) -> dict[str, Any]:
    """A part of a table, from the rows of its rounds for each size."""
    values = {name: [[row[name] for row in turns] for turns in rows] for name in MEASURES}
    fits = {name: exponents(sizes, np.array(values[name])) for name in ("seconds", "mib")}
    return {"sizes": sizes, **values, "exponents": fits}


def exponents(sizes: list[int], values: np.ndarray) -> dict[str, float]:
    """The p of value ~ size^p, for values `(sizes, rounds)`.

    Returns:
        `last`: between the medians of the last two sizes; `all`: over all medians, by least squares in logs; `least`:
        the smallest `last` of a round.
    """
    x, y, medians = np.log(sizes), np.log(values), np.log(np.median(values, axis=1))
    last, fit = (np.polyfit(x[first:], medians[first:], 1)[0] for first in (-2, 0))
    return {"last": float(last), "all": float(fit), "least": float(((y[-1] - y[-2]) / (x[-1] - x[-2])).min())}


def as_text(table: Table) -> str:
    """Medians, exponents, and what grows faster than its size."""
    lines, worse = [], []
    for title, part in ((f"{sweep}, {name}", part) for sweep, parts in table.items() for name, part in parts.items()):
        lines.append(f"{title}\n{'size':>8s}{'ms':>12s}{'ms / size':>12s}{'MiB':>10s}{'mapped MiB':>12s}")
        medians = [np.median(part[name], axis=1) for name in MEASURES]
        for size, seconds, mib, mapped in zip(part["sizes"], *medians, strict=True):
            lines.append(f"{size:8d}{1e3 * seconds:12.3f}{1e3 * seconds / size:12.3g}{mib:10.2f}{mapped:12.1f}")
        for name, fit in part["exponents"].items():
            growth = f"{MEASURES[name]} ~ size^{fit['last']:.2f} between the last two, size^{fit['all']:.2f} over all"
            lines.append(f"{'':8s}{growth}")
            if fit["least"] > 1 + NOISE:
                worse.append(f"{title}: {growth}")
    lines.append(f"Above size^{1 + NOISE:g} between the last two in every round:")
    return "\n".join([*lines, *(worse or ["nothing"])])


def draw(table: Table, file: Path) -> None:
    """Two panels for each sweep, memory below time."""
    from matplotlib.figure import Figure

    columns = min(3, len(table))
    rows = 2 * math.ceil(len(table) / columns)
    figure = Figure(figsize=(4 * columns, 3.3 * rows), layout="constrained")
    for i, (sweep, parts) in enumerate(table.items()):
        for j, name in enumerate(("seconds", "mib")):
            axes = figure.add_subplot(rows, columns, (i // columns * 2 + j) * columns + i % columns + 1)
            draw_growth(axes, parts, name)
            axes.set_title(f"{sweep}: {MEASURES[name]}", pad=20)
            axes.set_xlabel(SWEEPS[sweep].unit)
    figure.savefig(file, format="png", dpi=100)


def draw_growth(axes: "Axes", parts: dict[str, Any], name: str) -> None:
    from matplotlib.ticker import LogFormatter

    unit, scale = {"seconds": ("ms", 1e3), "mib": ("MiB", 1)}[name]
    for i, (part, numbers) in enumerate(parts.items()):
        sizes, values = np.array(numbers["sizes"]), np.median(numbers[name], axis=1) * scale
        axes.plot(sizes, values, "o-", color=f"C{i}", label=part)
        axes.plot(sizes, values[-1] * sizes / sizes[-1], ":", color=f"C{i}")
    axes.plot([], [], ":", color="0.4", label="linear")
    axes.set(xscale="log", yscale="log", ylabel=unit)
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())
    narrow: dict[str, Any] = {"ncols": 4, "frameon": False, "fontsize": 8, "handlelength": 1.3, "columnspacing": 1}
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), **narrow)


def sweep_of(text: str) -> tuple[str, list[int]]:
    """`NAME`, with the sizes above, or `NAME=SIZE,SIZE...`."""
    name, given, words = text.partition("=")
    if name not in SWEEPS:
        raise argparse.ArgumentTypeError(f"unknown sweep {name!r}: expected one of {', '.join(SWEEPS)}")
    sizes = [int(word) if word.isdecimal() else 0 for word in words.split(",")] if given else SWEEPS[name].sizes
    if len(sizes) < 2 or sizes[0] < 1 or sizes != sorted(set(sizes)):
        raise argparse.ArgumentTypeError(f"expected two or more rising sizes, as in {name}=8,16, got {text!r}")
    if name == "horizon" and any(size % 4 for size in sizes):
        raise argparse.ArgumentTypeError(f"the U-Net halves a horizon twice: expected multiples of 4, got {text!r}")
    return name, sizes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = f"among {', '.join(SWEEPS)}, with sizes as in batch=16,32 if not the usual ones (all)"
    add("--sweeps", type=sweep_of, nargs="+", metavar="NAME", default=[*map(sweep_of, SWEEPS)], help=names)
    add("--rounds", type=int, default=5, help="turns of each size (5)")
    add("--json", type=Path, help="file for the numbers")
    add("--plots", type=Path, help="PNG file for the plots")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    for name in ("json", "plots"):  # found out now, not after minutes
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            parser.error(f"--{name} must be a file in a folder that exists, got {file}")
    return args


def main() -> None:
    args = parse()
    sweeps = dict(args.sweeps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            table = measure(sweeps, args.rounds, Path(folder))
        except ModuleNotFoundError as error:
            raise SystemExit(f"growth.py: {error}") from error
    print(as_text(table))
    if args.json:
        args.json.write_text(json.dumps({"rounds": args.rounds, "sweeps": table}, indent=1) + "\n", encoding="utf-8")
    if args.plots:
        draw(table, args.plots)


if __name__ == "__main__":
    main()
