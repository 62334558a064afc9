"""Choose among the saved checkpoints of a training run, and say why: `python -m fm_policy.select DIR`.

By the reconstruction error on the episodes that the run held out, or by the score in the run's own task, on starts
that no result is reported on.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

# The starts of published results (Diffusion Policy's, see RESULTS.md). A checkpoint chosen on them would be reported
# on the luck that it was chosen for.
REPORT_SEEDS = range(1000, 1500)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = _parse(argv)
    try:
        _select(args)
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"select: {error}") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fm_policy.select",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="DIR", help="output folder of a training, or the checkpoints folder in it")
    add("--by", choices=("error", "coverage"), default="error", help="held-out reconstruction error, or largest reward")
    add("--samples", type=int, default=1024, help="error: windows, spaced evenly over the held-out frames")
    add("--draws", type=int, default=4, help="error: draws of noise for each window")
    add("--episodes", type=int, default=100, help="coverage: number of seeds, each one a start")
    add("--repeats", type=int, default=1, help="coverage: episodes of each seed, with different noise")
    add("--seed", type=int, default=20000, help="coverage: first seed; error: seed of the noise")
    add("--work", type=Path, help="coverage: folder of the evaluations, gone on with after a kill; else DIR/select")
    add("--out", type=Path, help="folder to write the chosen policy to, with its averaged weights alone")
    add("--device", default="cpu", help="where the policies run, and the one in --out unless told otherwise")
    args = parser.parse_args(argv)
    args.work = args.work or args.run / "select"
    return args


def _select(args: argparse.Namespace) -> None:
    if args.by == "coverage":
        _check_seeds(range(args.seed, args.seed + args.episodes))
    # Imported late: help and wrong arguments need not wait for torch.
    from lerobot.utils.import_utils import register_third_party_plugins

    from fm_policy.average import export
    from fm_policy.evaluation.provenance import PACKAGES, versions
    from fm_policy.files import check_free, write_json
    from fm_policy.select.choice import choose, usable
    from fm_policy.select.criteria import measure_coverage, measure_error
    from fm_policy.select.report import as_table, reason
    from fm_policy.select.saved_run import open_run

    if args.out:
        check_free(args.out)
    # Nothing here needs torchcodec; LeRobot tells over a page when that finds no FFmpeg.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    register_third_party_plugins()  # as LeRobot's programs do: the policy and the tasks become known
    run = open_run(args.run)
    _tell_skipped(run.skipped)
    if args.by == "error":
        measured = measure_error(run, args.samples, args.draws, args.seed, args.device)
    else:
        measured = measure_coverage(run, args.seed, args.episodes, args.repeats, args.work, args.device)
    values, diverged = usable(measured.values)
    _tell_skipped(diverged)
    best, standings = choose(values, smallest=args.by == "error")
    why, path = reason(best, standings, args.by, measured.sample), run.checkpoints[best]
    rows = {
        step: {"path": str(run.checkpoints[step]), **asdict(standing), **measured.details[step]}
        for step, standing in standings.items()
    }
    record = {
        "chosen": best,
        "path": str(path),
        "reason": why,
        "criterion": {"by": args.by, **measured.settings},
        "checkpoints": rows,
        "skipped": run.skipped | diverged,
        "versions": versions(PACKAGES),
        "command": shlex.join(["python", "-m", "fm_policy.select", *sys.argv[1:]]),
    }
    write_json(args.run / "select.json", record)
    print(f"{as_table(rows, best, args.by)}\n\n{why}\n{path}")
    if args.out:
        export([path], args.out, args.device)
        print(f"{args.out}: the same with its averaged weights alone")


def _tell_skipped(skipped: Mapping[str, str]) -> None:
    for step, trouble in skipped.items():
        print(f"select: checkpoint {step} is skipped: {trouble}", file=sys.stderr)


def _check_seeds(seeds: range) -> None:
    if set(seeds) & set(REPORT_SEEDS):
        raise ValueError(
            f"the seeds {seeds[0]}-{seeds[-1]} overlap {REPORT_SEEDS[0]}-{REPORT_SEEDS[-1]}, on which results are "
            "reported: choose on others, as by --seed 20000"
        )


if __name__ == "__main__":
    main()
