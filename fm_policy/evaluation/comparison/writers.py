"""A table as records, Markdown, CSV and one HTML page that needs no other file."""

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fm_policy.evaluation.comparison.cells import Cell, Difference, difference
from fm_policy.evaluation.comparison.layout import Layout
from fm_policy.evaluation.report import nfe_text
from fm_policy.evaluation.statistics import Interval

HEADER = (
    *("method", "best of R / mean score", "success [95 %]", "network calls", "ms per chunk"),
    *("success minus {base}", "wins : losses, sign test", "score minus {base}"),
)
SOURCE = {
    "method": "method",
    "policy": "folder",
    "policy_fingerprint": "SHA-256",
    "solver": "solver",
    "noise_scale": "noise scaled by",
}
NOTES = (
    "Score: an episode's largest reward. Best of R: mean over the starts of the best of R episodes; it grows with R, so"
    " that only rows of one R can be compared in it. Mean: of all episodes.",
    "Intervals hold 95 % over the starts: Wilson's of a success rate, at the number of independent episodes that the"
    " repeats are worth; a bootstrap over the starts of a difference, which is paired by start. The sign test counts"
    " the starts on which a method succeeds more, or less, often than the base, on as many repeats as both have.",
    "Network calls are those of a chunk; a head's stand behind a plus sign. Milliseconds per chunk: median wall time of"
    " a batched call, processors included, over its rows; on a busy machine it says little.",
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 82em; margin: 2em auto; padding: 0 1em; color: #1a1a1a }
table { border-collapse: collapse; margin: .6em 0 1.6em; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { background: #f4f4f4; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
tr.base { background: #fbf6e6 } img { max-width: 100%; height: auto } figcaption, .note { color: #555; max-width: 60em }
"""


def records(layout: Layout, cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A flat record for each cell, with its differences from the base's cell of the same task, where there is one."""
    cells = list(cells)
    bases = {cell.column.name: cell for cell in cells if cell.row is layout.base}
    return [_record(cell, bases.get(cell.column.name)) for cell in cells]


def _record(cell: Cell, base: Cell | None) -> dict[str, Any]:
    summary = cell.summary
    record = {
        "task": cell.column.name,
        "method": cell.row.name,
        "best_of_r": summary["best_of_r"],
        "score": summary["score"],
        **_ends("score", summary["score_interval"]),
        "success": summary["success"],
        **_ends("success", summary["success_interval"]),
        "nfe": summary["nfe"],
        "head_nfe": summary["head_nfe"],
        "solver": summary["solver"],
        "noise_scale": summary["noise_scale"],
        "ms_per_chunk": cell.ms_per_chunk,
        "held_out_error": cell.error and cell.error[0],
        **_ends("held_out_error", cell.error and cell.error[1]),
        "seeds": summary["episodes"],
        "repeats": summary["repeats"],
        "first_seed": summary["seed"],
        "step": cell.row.step,
    }
    for name in ("success", "score"):
        compared = difference(cell.table(name), base.table(name)) if base and base is not cell else None
        record |= _flat(f"{name}_minus_base", compared)
    return record | {
        "policy": summary["policy"]["path"],
        "policy_fingerprint": summary["policy"]["fingerprint"],
        "task_fingerprint": summary["task"]["fingerprint"],
        "folder": str(cell.folder),
    }


def _flat(name: str, compared: Difference | None) -> dict[str, Any]:
    if compared is None:
        return dict.fromkeys([name, *_ends(name, None), f"{name}_wins", f"{name}_losses", f"{name}_p"])
    return {
        name: compared.mean,
        **_ends(name, compared.interval),
        f"{name}_wins": compared.wins,
        f"{name}_losses": compared.losses,
        f"{name}_p": compared.p,
    }


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Every number, a line for each cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()


def as_markdown(table: Sequence[Mapping[str, Any]], base: str) -> str:
    """A table for each task."""
    parts = []
    for task, lines in _by_task(table).items():
        rows = [_header(base), ["---"] * len(HEADER), *_rows(lines)]
        parts += [f"## {_title(task, lines)}\n", *(f"| {' | '.join(map(_escaped, row))} |" for row in rows), ""]
    return "\n".join([*parts, *(f"{note}\n" for note in NOTES)])


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def as_html(table: Sequence[Mapping[str, Any]], base: str, pictures: Mapping[str, Mapping[str, str]]) -> str:
    """One page with the tables and, below each, its pictures.

    Args:
        table: The records.
        base: Name of the row that the others are compared with.
        pictures: By task, the address of each picture by its caption; `data:` keeps the page self-contained.
    """
    parts = ["<h1>Methods and tasks</h1>"]
    for task, lines in _by_task(table).items():
        head = "".join(f"<th>{html.escape(text)}</th>" for text in _header(base))
        body = "".join(_html_row(cells, cells[0] == base) for cells in _rows(lines))
        parts += [f"<h2>{html.escape(_title(task, lines))}</h2>", f"<table><tr>{head}</tr>{body}</table>"]
        for caption, address in pictures.get(task, {}).items():
            text = html.escape(caption)
            parts.append(f'<figure><img alt="{text}" src="{address}"><figcaption>{text}</figcaption></figure>')
    head = "".join(f"<th>{text}</th>" for text in SOURCE.values())
    parts.append(f"<h2>Checkpoints</h2><table><tr>{head}</tr>")
    used = dict.fromkeys(tuple(str(line[name]) for name in SOURCE) for line in table)
    parts += [*(_html_row([*texts], is_base=False) for texts in used), "</table>"]
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in NOTES)
    head = f'<meta charset="utf-8"><title>Methods and tasks</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}{notes}</body></html>\n'


def _html_row(texts: Sequence[str], is_base: bool) -> str:
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
    return f'<tr class="base">{cells}</tr>' if is_base else f"<tr>{cells}</tr>"


def _by_task(table: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    tasks = dict.fromkeys(line["task"] for line in table)
    return {task: [line for line in table if line["task"] == task] for task in tasks}


def _title(task: str, lines: Sequence[Mapping[str, Any]]) -> str:
    first, seeds = lines[0]["first_seed"], lines[0]["seeds"]
    repeats = sorted({line["repeats"] for line in lines})
    return f"{task}: seeds {first}-{first + seeds - 1}, R = {' or '.join(map(str, repeats))}"


def _header(base: str) -> list[str]:
    return [text.format(base=base) for text in HEADER]


def _rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What the rows of a task show, as in `HEADER`; R only where it is not the same for all of them."""
    same = len({line["repeats"] for line in lines}) == 1
    return [_texts(line, "" if same else f" (R = {line['repeats']})") for line in lines]


def _texts(line: Mapping[str, Any], repeats: str) -> list[str]:
    ms = line["ms_per_chunk"]
    wins, losses, p = (line[f"success_minus_base_{name}"] for name in ("wins", "losses", "p"))
    return [
        line["method"],
        f"{line['best_of_r']:.3f}{repeats} / {line['score']:.3f}",
        _with_ends(line, "success"),
        nfe_text(line).removeprefix("NFE "),
        "-" if ms is None else f"{ms:.1f}",
        _with_ends(line, "success_minus_base", "+"),
        "-" if wins is None else f"{wins} : {losses}, p = {p:.2g}",
        _with_ends(line, "score_minus_base", "+"),
    ]


def _with_ends(line: Mapping[str, Any], name: str, sign: str = "") -> str:
    value, low, high = (line[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")
