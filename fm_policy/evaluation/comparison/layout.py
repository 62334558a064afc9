"""What a table shows: its rows, methods with a checkpoint, and its columns, tasks with their seeds.

As JSON:

    {"base": "FM 16",
     "methods": [{"name": "FM", "policy": "DIR", "nfe": [1, 4, 16], "repeats": 10},
                 {"name": "DDIM", "policy": {"pusht_b": "DIR", "kitchen": "DIR"}, "nfe": 16, "solver": "ddim"},
                 {"name": "FT-FM", "run": "outputs/train/second", "nfe": 16}],
     "tasks": [{"env": "pusht_b", "episodes": 500, "repeats": 2, "seed": 1000, "demonstrations": "data/pusht"}]}

Several `nfe` make a row of each; a `run` of LeRobot's trainer makes a row of each of its checkpoints. `policy` is one
folder, or one for each task. `solver`, `nfe`, `noise_scale` and `repeats`, unless named, are the checkpoint's and the
task's. Methods of one `series`, policies tuned for one call and for two, share a line in the pictures. With
`demonstrations`, a LeRobotDataset whose last 5 % of the episodes no method has learned from, the reconstruction error
of every flow policy is measured there, and held against its success.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOW = {"solver": (str,), "noise_scale": (int, float), "repeats": (int,), "series": (str,)}
"""What a method may say of its rows, in which JSON types."""

TASK = {
    **{"env": (str,), "name": (str,), "options": (dict,), "demonstrations": (str,)},
    **{"seed": (int,), "episodes": (int,), "repeats": (int,)},
}
"""What a task may say, in which JSON types."""


@dataclass(frozen=True)
class Row:
    """A method at some number of network calls.

    Attributes:
        name: The series, and what tells this row from its others.
        series: What shares a line in the pictures: the rows of a method, or of several.
        policies: Folder of the checkpoint by task; under None the one for all of them.
        nfe: Network calls per chunk; None: the checkpoint's.
        solver: None: the checkpoint's.
        noise_scale: None: the checkpoint's.
        repeats: Episodes of each seed; None: the column's.
        step: Training step, where the row is one checkpoint of a run.
    """

    name: str
    series: str
    policies: Mapping[str | None, Path]
    nfe: int | None = None
    solver: str | None = None
    noise_scale: float | None = None
    repeats: int | None = None
    step: int | None = None

    def policy_for(self, column: "Column") -> Path | None:
        """The checkpoint for a task; None where there is none."""
        return self.policies.get(column.name, self.policies.get(None))


@dataclass(frozen=True)
class Column:
    """A task and its starts; see `Run` for the numbers.

    Attributes:
        demonstrations: Folder of a LeRobotDataset; None: no reconstruction error is measured.
    """

    name: str
    env: str
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 1000
    episodes: int = 500
    repeats: int = 1
    demonstrations: str | None = None


@dataclass(frozen=True)
class Layout:
    """Rows, columns, and the row that the others are compared with."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    base: Row


def read_layout(description: Mapping[str, Any]) -> Layout:
    """Read a description, as above.

    Raises:
        ValueError: If something in it is unknown, missing or named twice.
    """
    _check_names(description, "the table", {"methods", "tasks"}, {"base"})
    columns = [_column(task) for task in description["tasks"]]
    rows = [row for method in description["methods"] for row in _rows(method)]
    for kind, names in {"method": [row.name for row in rows], "task": [column.name for column in columns]}.items():
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ValueError(f"a table needs {kind}s with different names, got {twice or 'none'}")
    unknown = {task for row in rows for task in row.policies} - {None, *(column.name for column in columns)}
    if unknown:
        raise ValueError(f"a policy is named for tasks that the table lacks: {sorted(map(str, unknown))}")
    base = description.get("base", rows[0].name)
    known = {row.name: row for row in rows}
    if base not in known:
        raise ValueError(f"the base must be one of the methods {list(known)}, not {base!r}")
    return Layout(rows, columns, known[base])


def _column(task: Mapping[str, Any]) -> Column:
    _check_names(task, "a task", {"env"}, TASK.keys() - {"env"})
    for key, kinds in TASK.items():
        _check_type("task", task["env"], key, task.get(key), kinds)
    return Column(**({"name": task["env"]} | dict(task)))


def _rows(method: Mapping[str, Any]) -> Iterator[Row]:
    _check_names(method, "a method", {"name"}, {"policy", "run", "nfe", *HOW})
    _check_type("method", method["name"], "name", method["name"], (str,))
    if ("policy" in method) == ("run" in method):
        raise ValueError(f"method {method['name']!r} needs either a policy, a checkpoint's folder, or a run")
    if {"run", "series"} <= method.keys():
        raise ValueError(f"method {method['name']!r} is a run, which is a line of its own: leave its series away")
    nfe = method.get("nfe")
    calls = nfe if isinstance(nfe, list) else [nfe]
    how: dict[str, Any] = {key: method.get(key) for key in HOW}
    if how["series"] is None:
        how["series"] = method["name"]
    if not calls:
        raise ValueError(f"nfe of method {method['name']!r} is an empty list: name some network calls")
    for number in calls:
        _check_type("method", method["name"], "nfe", number, (int,))
    for key, value in how.items():
        _check_type("method", method["name"], key, value, HOW[key])
    _check_type("method", method["name"], "policy", method.get("policy"), (str, dict))
    _check_type("method", method["name"], "run", method.get("run"), (str,))
    checkpoints = _checkpoints(Path(method["run"])) if "run" in method else {None: _policies(method["policy"])}
    for step, policies in checkpoints.items():
        for number in calls:
            marks = [str(number)] * (len(calls) > 1) + [f"step {step}"] * (step is not None)
            name = " ".join([method["name"], *marks])
            yield Row(name, policies=policies, nfe=number, **how, step=step)


def _policies(policy: str | Mapping[str, str]) -> dict[str | None, Path]:
    return {None: Path(policy)} if isinstance(policy, str) else {task: Path(path) for task, path in policy.items()}


def _checkpoints(run: Path) -> dict[int | None, dict[str | None, Path]]:
    """The checkpoints of a run of LeRobot's trainer by their step."""
    folders = [path for path in sorted((run / "checkpoints").glob("*/pretrained_model")) if path.parent.name.isdigit()]
    if not folders:
        raise ValueError(f"{run} is no training run: it holds no checkpoints/<step>/pretrained_model")
    return {int(folder.parent.name): {None: folder} for folder in folders}


def _check_type(part: str, name: object, key: str, value: object, kinds: tuple[type, ...]) -> None:
    if value is not None and type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{key} of {part} {name!r} must be of type {wanted}, got {value!r}")


def _check_names(part: Any, what: str, needed: set[str], known: AbstractSet[str]) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"{what} needs {sorted(needed)} by name, got {part!r}")
    missing, unknown = needed - part.keys(), part.keys() - needed - known
    if missing or unknown:
        raise ValueError(
            f"{what} needs {sorted(needed)} and may have {sorted(known)}; "
            f"it lacks {sorted(missing)} and has unknown {sorted(unknown)}: {dict(part)}"
        )
