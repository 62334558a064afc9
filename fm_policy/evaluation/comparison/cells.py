"""The cells of a table: evaluations that are run where they are missing, and what they say."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lerobot.envs.configs import EnvConfig
from numpy.typing import NDArray

from fm_policy.evaluation.checkpoint import Checkpoint, load_any_checkpoint
from fm_policy.evaluation.comparison.errors import held_out_error
from fm_policy.evaluation.comparison.layout import Column, Layout, Row
from fm_policy.evaluation.episodes import Episode
from fm_policy.evaluation.finished import read_finished
from fm_policy.evaluation.held_out_windows import check_dataset
from fm_policy.evaluation.inference import ChunkSampler
from fm_policy.evaluation.policies import ChunkPolicy
from fm_policy.evaluation.provenance import PACKAGES, describe_task, versions
from fm_policy.evaluation.ranks import ALONE, Rank
from fm_policy.evaluation.report import summarise
from fm_policy.evaluation.runs import Run, evaluate_into
from fm_policy.evaluation.statistics import Interval, bootstrap_interval, sign_test, table

type MakeTask = Callable[[Column, bool], tuple[EnvConfig, tuple[str, ...]]]


class Difference(NamedTuple):
    """Of two cells of one column, paired by seed: the repeats of a seed count as their mean.

    The mean is of all repeats; wins and losses are those of `seed_differences`.
    """

    mean: float
    interval: Interval | None
    """Bootstrap over the seeds."""
    wins: int
    losses: int
    p: float
    """Of the sign test over the seeds."""


@dataclass(frozen=True)
class Cell:
    """A finished evaluation of a row in a column.

    Attributes:
        row: The method.
        column: The task.
        folder: Where the evaluation is.
        summary: What it says.
        episodes: Its rows.
        error: Reconstruction error on the column's demonstrations with its interval, if it was measured.
    """

    row: Row
    column: Column
    folder: Path
    summary: dict[str, Any]
    episodes: Sequence[Episode]
    error: tuple[float, Interval | None] | None = None

    def table(self, name: str) -> NDArray[np.float64]:
        """The `success`, zeros and ones, or the `score`, the largest reward, of the episodes, `(seeds, repeats)`."""
        return table(self.episodes, {"success": "success", "score": "max_reward"}[name])

    @property
    def ms_per_chunk(self) -> float | None:
        """Median wall time of a call over its rows; None where a continued evaluation had nothing to call for."""
        times = self.summary["ms_per_chunk"]
        return times and times["p50"] / times["rows"]


def seed_differences(values: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the repeats minus the base's, `(seeds,)`, of tables of the same seeds, on as many repeats as both have.

    One episode that succeeds would nearly always exceed the mean of ten, whichever method is better.
    """
    both = min(values.shape[1], base.shape[1])
    return values[:, :both].mean(axis=1) - base[:, :both].mean(axis=1)


def difference(values: NDArray[np.float64], base: NDArray[np.float64]) -> Difference:
    """Compare tables `(seeds, repeats)` of the same seeds."""
    each = values.mean(axis=1) - base.mean(axis=1)
    alike = seed_differences(values, base)
    wins, losses = int((alike > 0).sum()), int((alike < 0).sum())
    return Difference(float(each.mean()), bootstrap_interval(each), wins, losses, sign_test(wins, losses))


def fill(layout: Layout, folder: Path, make_task: MakeTask, device: str, rank: Rank = ALONE) -> Iterator[Cell]:
    """Yield every cell, row by row, evaluated now unless it was before.

    Each lives in a folder of its own whose name is a fingerprint of all that decides its rows, checkpoint, task, first
    seed, solver, calls, noise and versions: nothing is ever mixed with what another table, checkpoint or version left.
    A table that asks for more seeds or repeats adds to them; one that asks for fewer reads those alone.

    Args:
        layout: What the table shows.
        folder: Where the evaluations are.
        make_task: Makes the task of a column, for a policy that sees images or not, and names the distributions that
            its simulator is made of.
        device: Where the policies run.
        rank: Which of the processes that share the episodes this is.

    Raises:
        ValueError: If a checkpoint cannot be evaluated as the layout says, or a column's demonstrations are not there;
            told before anything runs.
    """
    for column in layout.columns:
        if column.demonstrations:
            check_dataset(Path(column.demonstrations))
    wanted = [(row, column) for row in layout.rows for column in layout.columns if row.policy_for(column)]
    for row, column in wanted:
        checkpoint, task, _ = _load(row, column, make_task, device)
        ChunkSampler(checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor, task)
    for row, column in wanted:
        checkpoint, task, packages = _load(row, column, make_task, device)
        run = Run(
            column.seed, column.episodes, column.repeats if row.repeats is None else row.repeats, packages=packages
        )
        where = folder / f"{column.env}-{_fingerprint(checkpoint, task, run)[:16]}"
        missing = _missing(where, run)
        if missing:
            if rank.first:
                print(f"{row.name} in {column.name}: {where}", flush=True)
            evaluate_into(where, checkpoint, task, missing, resume=where.exists(), rank=rank)
        summary, episodes = _read(where, run)
        error = None
        if column.demonstrations and rank.first:
            error = held_out_error(checkpoint, Path(column.demonstrations), where / "held_out_error.json")
        yield Cell(row, column, where, summary, episodes, error)


def _missing(where: Path, run: Run) -> Run | None:
    """The run that a folder needs before it holds all of another; None if it does."""
    if all(has >= wanted for has, wanted in zip(_size(where / "summary.json"), _size_of(run), strict=True)):
        return None
    episodes, repeats = map(max, _size(where / "run.json"), _size_of(run))  # what was begun is brought to its end
    return replace(run, episodes=episodes, repeats=repeats)


def _size(record: Path) -> tuple[int, int]:
    if not record.is_file():
        return 0, 0
    numbers = json.loads(record.read_text(encoding="utf-8"))
    return numbers["episodes"], numbers["repeats"]


def _size_of(run: Run) -> tuple[int, int]:
    return run.episodes, run.repeats


def _read(where: Path, run: Run) -> tuple[dict[str, Any], list[Episode]]:
    """Summary and rows of a run, of an evaluation that may hold more."""
    summary, episodes = read_finished(where)
    wanted = set(run.jobs)
    kept = [episode for episode in episodes if episode.key in wanted]
    return summary | summarise(kept), kept


def _load(
    row: Row, column: Column, make_task: MakeTask, device: str
) -> tuple[Checkpoint[ChunkPolicy], EnvConfig, tuple[str, ...]]:
    path = row.policy_for(column)
    assert path is not None  # `fill` leaves such cells out
    checkpoint = load_any_checkpoint(path, device, row.solver, row.nfe, row.noise_scale)
    return checkpoint, *make_task(column, bool(checkpoint.policy.config.image_features))


def _fingerprint(checkpoint: Checkpoint[ChunkPolicy], task: EnvConfig, run: Run) -> str:
    config = checkpoint.policy.config
    parts = [
        *(checkpoint.fingerprint, config.solver, config.num_solver_steps, config.noise_scale, config.device),
        *(describe_task(task, run.packages), versions(PACKAGES)),
        run.seed,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
