"""Every speed that we tell, in one table: `python eval/speed.py --out docs/speed --into README.md`.

Runs the measuring programs below whose file is not in the folder, one after another, each a process of its own, so the
machine should have nothing else to do (half an hour on two cores); after a kill the same command goes on. A file keeps
its command, the machine and the versions beside the numbers; files of two machines are not put into one table. That has
a figure a line, what stands beside it in the same run, and how many times as fast it is.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = Path(__file__).parent
HERE = "HERE"  # in a command: the folder that it writes to
BEGIN, END = "<!-- speed -->", "<!-- end of speed -->"
IMPORT = "; ".join(
    [
        "import json, pathlib, sys, time, lerobot.policies.factory, lerobot.envs.configs, lerobot.datasets",
        "start = time.perf_counter()",
        "import lerobot_policy_fm_ft",
        "numbers = {'seconds': time.perf_counter() - start}",
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(numbers))",
    ]
)
Numbers = dict[str, Any]


class Measurement(NamedTuple):
    """A command without the interpreter, the file that it leaves, and what is kept of that (all if not named)."""

    words: tuple[str, ...]
    file: str = "numbers.json"
    kept: tuple[str, ...] = ()


class Line(NamedTuple):
    """What is told, ours, what stands beside it, and how many times as fast ours is."""

    what: str
    ours: str
    beside: str = ""
    times: float | None = None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the files of the programs")
    add("--only", nargs="+", choices=list(LINES), help="programs to run; all if not given")
    add("--pixels", type=Path, help="LeRobotDataset of Push-T with pixels, to train from; left out if not given")
    add("--into", type=Path, help=f"a page that has the lines {BEGIN} and {END}, for the table between them")
    args = parser.parse_args()
    if "training_pixels" in (args.only or ()) and args.pixels is None:
        parser.error("training_pixels needs --pixels, a data set with pixels: none ships with the package")
    return args


def measurements(pixels: Path | None) -> dict[str, Measurement]:
    """What is measured, by the name of its file."""

    def program(name: str, *words: str) -> Measurement:
        return Measurement((str(PROGRAMS / name), *words, "--json", f"{HERE}/numbers.json"))

    one_call = str(PROGRAMS.parent / "fm_policy" / "assets" / "pusht_one_call")
    episodes = (str(PROGRAMS / "rollout.py"), "--episodes", "500", "--processes", "2", "--out", f"{HERE}/run")
    few = ("--steps", "8", "--obs", "image", "--batch-size", "32", "--root", str(pixels))
    from_pixels = {} if pixels is None else {"training_pixels": program("training_speed.py", *few)}
    return {
        "latency": program("latency.py", "--rounds", "25", "--calls", "20"),
        "training": program("training_speed.py", "--steps", "30"),
        **from_pixels,
        "finetune": program("finetune_cost.py", "--steps", "1", "2", "4", "16"),
        "evaluation": program("evaluation_speed.py"),
        "evaluation_one_call": program("evaluation_speed.py", "--policy", one_call),
        "episodes": Measurement(episodes, "run/summary.json", ("episodes", "nfe", "success", "seconds")),
        "simulators": program("env_speed.py", "--batch", "8"),
        "import": Measurement(("-c", IMPORT, f"{HERE}/numbers.json")),
    }


def measure(measurement: Measurement) -> Numbers:
    """Run a program, and read what it leaves.

    Raises:
        RuntimeError: If it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(word.replace(HERE, folder) for word in measurement.words)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
        left = json.loads(Path(folder, measurement.file).read_text(encoding="utf-8"))
    return {name: left[name] for name in measurement.kept or left}


def command_of(measurement: Measurement) -> str:
    """As a reader would type it, whatever the folder."""
    words = [word.replace(f"{PROGRAMS.parent}/", "") for word in measurement.words]
    return shlex.join(["python", *words])


def machine() -> dict[str, Any]:
    """Hardware and versions, as far as they decide a speed."""
    import torch

    from fm_policy.evaluation.provenance import PACKAGES, describe_hardware, versions

    hardware = describe_hardware(torch.device("cpu"))
    return {name: hardware[name] for name in ("cpu", "cores", "threads")} | versions(PACKAGES[1:])


def run(folder: Path, todo: dict[str, Measurement]) -> None:
    """Measure what is not in the folder yet.

    Raises:
        RuntimeError: If a program fails.
        ValueError: Before anything is measured, if the folder's files are not of this machine, or as `read`.
    """
    from fm_policy.files import write_json

    files = {folder / f"{name}.json": measurement for name, measurement in todo.items()}
    missing = {file: measurement for file, measurement in files.items() if not file.exists()}
    here = machine() if missing else {}
    if missing and any((folder / f"{name}.json").exists() for name in LINES) and read(folder)[1] != here:
        raise ValueError(f"the files in {folder} are of another machine than this one, {here}: choose another folder")
    for file, measurement in missing.items():
        print(command_of(measurement), flush=True)
        start = time.perf_counter()
        numbers = measure(measurement)
        write_json(file, {"command": command_of(measurement), "machine": here, "numbers": numbers})
        print(f"{file}: {time.perf_counter() - start:.0f} s", flush=True)


def read(folder: Path) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """The numbers of every file, and the one machine that they come from.

    Raises:
        ValueError: If there is none, one is not what this program writes, or two are of different machines.
    """
    found: dict[str, Numbers] = {}
    where: dict[str, str] = {}
    for name in LINES:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            found[name], where[name] = told["numbers"], json.dumps(told["machine"], sort_keys=True)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no file of speed.py: {error!r}") from error
    if not found:
        raise ValueError(f"no measurement in {folder}")
    if len(set(where.values())) > 1:
        raise ValueError(f"the files in {folder} are of different machines: {where}")
    return found, json.loads(next(iter(where.values())))


# What the files say, a line for each figure.


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def latency(numbers: Numbers) -> Iterator[Line]:
    rows = numbers["rows"]
    peers = {name.removeprefix("peer "): row for name, row in rows.items() if name.startswith("peer ")}
    for name, row in rows.items():
        if name.startswith("NFE "):
            calls = counted(int(name.removeprefix("NFE ")), "call")
            what, beside = f"a robot's chunk, {calls}: p50, p99", f"{calls} of the bare network, and the encoder"
            yield Line(what, f"{row['p50_ms']:.1f}, {row['p99_ms']:.1f} ms", beside, 1 / row["over_limit"])
    one = rows["NFE 1"]["p50_ms"]
    for name, row in peers.items():
        kind, _, calls = name.partition("/")
        beside = f"LeRobot's diffusion policy, {kind.upper()} {calls}: {row['p50_ms']:.0f} ms"
        yield Line("a robot's chunk, 1 call", f"{one:.1f} ms", beside, row["p50_ms"] / one)


def training(numbers: Numbers) -> Iterator[Line]:
    rates: dict[str, list[float]] = numbers["samples_per_second"]
    ours = rates["fm_ft"]
    seen = "pixels" if numbers["obs"] == "image" else "states"
    what = f"training from {seen}, batches of {numbers['batch_size']}"
    told = f"{statistics.median(ours):.0f} samples/s"
    for name, values in rates.items():
        if name != "fm_ft":
            beside = name.replace("diffusion,", "LeRobot's diffusion policy, same net,").replace("fm_ft,", "ours,")
            times = statistics.median(mine / its for mine, its in zip(ours, values, strict=True))
            yield Line(what, told, f"{beside}: {statistics.median(values):.0f}", times)


def finetune(numbers: Numbers) -> Iterator[Line]:
    plain = {name: row["time"] for name, row in numbers.items() if isinstance(row, dict)}
    for name, cost in plain.items():
        if name.startswith("S=") and "," not in name:
            steps = int(name.removeprefix("S="))
            what = f"a fine-tuning step through {counted(steps, 'solver step')}: its cost"
            yield Line(what, f"{cost:.2f}", f"{counted(steps, 'step')} of flow matching", steps / cost)
    nearest = plain["S=2, nearest of 5"]
    yield Line("... 2 solver steps, `nearest` of 5 noises", f"{nearest:.2f}", "one noise", plain["S=2"] / nearest)


def evaluation(calls: str) -> Callable[[Numbers], Iterator[Line]]:
    """The lines of a policy with so many network calls a chunk."""

    def lines(numbers: Numbers) -> Iterator[Line]:
        their, our = (
            [turn["counted"] for turn in numbers["turns"][name]] for name in ("lerobot-eval", "eval/rollout.py")
        )
        times = statistics.median(its / mine for its, mine in zip(their, our, strict=True))
        what = f"{numbers['episodes']} Push-T episodes, {calls}, imports apart"
        beside = f"`lerobot-eval`: {statistics.median(their):.1f} s"
        yield Line(what, f"{statistics.median(our):.1f} s", beside, times)

    return lines


def episodes(numbers: Numbers) -> Iterator[Line]:
    seconds = numbers["seconds"]["evaluation"]
    what = f"{numbers['episodes']} Push-T episodes, {numbers['nfe']} calls, imports apart"
    yield Line(what, f"{seconds:.0f} s")


def simulators(numbers: Numbers) -> Iterator[Line]:
    for task, rows in numbers.items():
        bare = rows["bare"]["steps_per_second"]
        way = max((way for way in rows if way != "bare"), key=lambda way: rows[way]["share"])
        ours = f"{rows[way]['steps_per_second']:.0f} steps/s"
        yield Line(f"stepping `{task}`, {way}", ours, f"the bare simulator: {bare:.0f}", rows[way]["share"])


def importing(numbers: Numbers) -> Iterator[Line]:
    yield Line("`import lerobot_policy_fm_ft`, after LeRobot's own", f"{numbers['seconds']:.3f} s")


LINES: dict[str, Callable[[Numbers], Iterator[Line]]] = {
    "latency": latency,
    "training": training,
    "training_pixels": training,
    "finetune": finetune,
    "evaluation": evaluation("16 calls"),
    "evaluation_one_call": evaluation("1 call"),
    "episodes": episodes,
    "simulators": simulators,
    "import": importing,
}


def table(found: dict[str, Numbers], where: dict[str, Any]) -> str:
    """The table in Markdown, with the machine below it."""
    rows = [line for name, numbers in found.items() for line in LINES[name](numbers)]
    head = ["| what | ours | beside it | times as fast |", "|---|---|---|---|"]
    versions = ", ".join(f"{name} {value}" for name, value in where.items() if name not in ("cpu", "cores", "threads"))
    below = f"{where['cores']} cores of {where['cpu']}, {where['threads']} threads of torch where not one; {versions}."
    return "\n".join([*head, *map(shown, rows), "", below])


def shown(line: Line) -> str:
    """A line of the table, in Markdown."""
    times = "" if line.times is None else f"{line.times:.{0 if line.times >= 10 else 2}f}"
    return f"| {line.what} | {line.ours} | {line.beside} | {times} |"


def around(page: Path) -> tuple[str, str]:
    """What a page has up to its first mark, and from its second one on.

    Raises:
        ValueError: If it has not both of them, in their order.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise ValueError(f"{page} has no line {BEGIN} with a line {END} after it")
    return before + begin, end + after


def main() -> None:
    args = parse()
    try:
        todo = measurements(args.pixels)
        if args.into:
            around(args.into)  # a wrong one is told before anything is measured
        run(args.out, {name: todo[name] for name in args.only or todo})
        text = table(*read(args.out))
        if args.into:
            before, after = around(args.into)  # as it is now: half an hour has passed
            args.into.write_text(f"{before}\n{text}\n\n{after}", encoding="utf-8")
    except (RuntimeError, ValueError, OSError) as error:
        raise SystemExit(f"speed.py: {error}") from error
    print(text)


if __name__ == "__main__":
    main()
