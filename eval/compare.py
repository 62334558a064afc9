"""Compare finished evaluations with the first, paired by seed and repeat: `python eval/compare.py A B [C ...]`."""

import argparse
import json
from pathlib import Path
from typing import Any

from fm_policy.evaluation.finished import read_finished
from fm_policy.evaluation.report import nfe_text
from fm_policy.evaluation.statistics import Interval, paired_difference, table, wins_and_losses

KEPT = ("score", "score_interval", "success", "success_interval", "nfe")
# Kept too; the oldest summaries lack them, and these are what held then.
ADDED = {"head_nfe": 0, "observation_noise": 0.0}


def kept(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an evaluation."""
    values = {name: summary[name] for name in KEPT}
    added = {name: summary.get(name, value) for name, value in ADDED.items()}
    return {"folder": str(folder)} | values | added


def conditions(summary: dict[str, Any], any_noise: bool) -> dict[str, Any]:
    """What must be equal for episodes to be paired: starts, task, simulator and noise in the observations."""
    task = summary["task"]
    starts = {name: summary[name] for name in ("seed", "episodes", "repeats")}
    noise = {} if any_noise else {"observation_noise": summary.get("observation_noise", ADDED["observation_noise"])}
    return starts | noise | {"task": task["type"]} | task["config"] | task["versions"]


def compare(folders: list[Path], any_noise: bool = False) -> list[dict[str, Any]]:
    """A record for each evaluation; from the second on with its differences to the first.

    Args:
        folders: The evaluations.
        any_noise: Compare those with different noise in the observations, too: what the noise costs.

    Raises:
        ValueError: If one cannot be read, or is not of the first one's seeds, repeats and task.
    """
    (expected, reference), *others = [read_finished(folder) for folder in folders]
    records = [kept(folders[0], expected)]
    for folder, (summary, episodes) in zip(folders[1:], others, strict=True):
        there, here = conditions(expected, any_noise), conditions(summary, any_noise)
        differing = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
        if differing:
            pairs = "\n  ".join(f"{name}: {there.get(name)!r} and {here.get(name)!r}" for name in differing)
            raise ValueError(f"{folders[0]} and {folder} are not of the same episodes:\n  {pairs}")
        scores, successes = ((table(episodes, name), table(reference, name)) for name in ("max_reward", "success"))
        differences: dict[str, Any] = {}
        differences["score"], differences["score_interval"] = paired_difference(*scores)
        differences["success"], differences["success_interval"] = paired_difference(*successes)
        differences["wins"], differences["losses"] = wins_and_losses(*successes)
        records.append(kept(folder, summary) | {"against_reference": differences})
    return records


def with_interval(record: dict[str, Any], name: str, sign: str = "") -> str:
    interval: Interval | None = record[f"{name}_interval"]
    ends = "one seed: no interval" if interval is None else ", ".join(f"{end:{sign}.3f}" for end in interval)
    return f"{name} {record[name]:{sign}.3f} [{ends}]"


def as_text(record: dict[str, Any]) -> str:
    numbers = [with_interval(record, name) for name in ("score", "success")]
    noise = f"  observation noise {record['observation_noise']:g}" if record["observation_noise"] else ""
    lines = [record["folder"], f"  {'  '.join(numbers)}  {nfe_text(record)}{noise}"]
    if differences := record.get("against_reference"):
        numbers = [with_interval(differences, name, "+") for name in ("score", "success")]
        counts = f"{differences['wins']}:{differences['losses']}"
        lines.append(f"  minus the first: {'  '.join(numbers)}  success wins:losses {counts}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("reference", type=Path, metavar="A", help="folder that eval/rollout.py wrote: the reference")
    parser.add_argument("others", type=Path, metavar="B", nargs="+", help="folders to compare with it")
    parser.add_argument("--any-noise", action="store_true", help="compare different noise in the observations, too")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args()
    try:
        records = compare([args.reference, *args.others], args.any_noise)
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare.py: {error}") from error
    print("\n".join(map(as_text, records)))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
