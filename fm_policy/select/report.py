"""The choice as text."""

from collections.abc import Mapping
from typing import Any

from fm_policy.evaluation.statistics import Interval
from fm_policy.select.choice import Standing

NAMES = {"error": "smallest held-out reconstruction error", "coverage": "highest score"}
DIGITS = {"error": 5, "coverage": 3}


def reason(best: str, standings: Mapping[str, Standing], by: str, sample: str) -> str:
    """One sentence: why this checkpoint, and what the data do not decide."""
    if len(standings) == 1:
        return f"Checkpoint {best} is chosen: it is the only one."
    ties = [step for step, standing in standings.items() if step != best and not standing.separated]
    rest = (
        f"not separated from it by the paired 95 % intervals, and passed over for their means alone: {', '.join(ties)}"
        if ties
        else "the paired 95 % intervals separate it from every other one"
    )
    return f"Checkpoint {best} is chosen for the {NAMES[by]} ({sample}); {rest}."


def as_table(rows: Mapping[str, Mapping[str, Any]], best: str, by: str) -> str:
    """A line for each checkpoint, with intervals of 95 %."""
    head = ["step", "error" if by == "error" else "score"]
    head += [] if by == "error" else ["success"]
    lines = [[*head, "difference to the best", ""]]
    lines += [[step, *_numbers(row, by), *_verdict(row, step == best, by)] for step, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _numbers(row: Mapping[str, Any], by: str) -> list[str]:
    mean = _with_interval(row["mean"], row["interval"], by)
    return [mean] if by == "error" else [mean, _with_interval(row["success"], row["success_interval"], by)]


def _verdict(row: Mapping[str, Any], is_best: bool, by: str) -> list[str]:
    if is_best:
        return ["", "best"]
    difference = _with_interval(row["difference"], row["difference_interval"], by, "+")
    return [difference, "" if row["separated"] else "not separated"]


def _with_interval(value: float, interval: Interval | None, by: str, sign: str = "") -> str:
    form = f"{sign}.{DIGITS[by]}f"
    ends = "unknown" if interval is None else ", ".join(format(end, form) for end in interval)
    return f"{value:{form}} [{ends}]"
