"""One row per episode, and the file that outlives a kill."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self


class EpisodeKey(NamedTuple):
    """What an episode depends on, besides policy and task: its start and its noise."""

    seed: int
    repeat: int


def plan(seeds: Iterable[int], repeats: int) -> list[EpisodeKey]:
    """All episodes, one pass over the seeds after the other, so that a part of them is already unbiased.

    Raises:
        ValueError: If there is no seed, a seed is negative or named twice, or repeats is below 1.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more distinct numbers from 0 on, got {seeds[:10]}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    return [EpisodeKey(seed, repeat) for repeat in range(repeats) for seed in seeds]


def whole(value: float) -> float:
    """A whole number as an int, so that it is written as one."""
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Episode:
    """How one episode went.

    Attributes:
        seed: Decides the start.
        repeat: Tells episodes of one seed apart; they differ in the policy's noise.
        initial_state: What the task reports of the start, or None.
        max_reward: Largest reward of a step.
        final_reward: Reward of the last step.
        measures: The task's own numbers (every float in its `info`), name to largest value over the
            steps and `final_<name>` to the last one; and `jitter` of the executed actions, see `rollouts.jitter`.
            Episodes that were written by older versions have no `jitter`.
        success: Whether any step was one of success.
        steps: Steps of the environment.
        nfe: Calls of the velocity net per chunk, the mean over the chunks where a solver chooses its own.
        chunks: Chunks that were computed.
    """

    seed: int
    repeat: int
    initial_state: list[float] | None
    max_reward: float
    final_reward: float
    measures: dict[str, float]
    success: bool
    steps: int
    nfe: float
    chunks: int

    @property
    def key(self) -> EpisodeKey:
        """Seed and repeat."""
        return EpisodeKey(self.seed, self.repeat)

    def to_row(self) -> dict[str, Any]:
        """A flat record: the measures stand beside the other fields."""
        row: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            row |= value if field.name == "measures" else {field.name: value}
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The inverse of `to_row`.

        Raises:
            KeyError: If a field is missing.
        """
        named = {field.name: row[field.name] for field in fields(cls) if field.name != "measures"}
        return cls(**named, measures={name: value for name, value in row.items() if name not in named})


def part(path: Path, rank: int) -> Path:
    """The file of one of the processes that share an evaluation: the first one writes to `path` itself."""
    return path.with_suffix(f".{rank}{path.suffix}") if rank else path


class EpisodeFile:
    """`episodes.jsonl`: a row is written and flushed as soon as its episode ends."""

    def __init__(self, path: Path) -> None:
        """Open the file, continuing it if it exists: a last row that a kill cut off is dropped."""
        self.path = path
        self.episodes = self._keep_whole_rows() if path.exists() else []
        self._file = path.open("a", encoding="utf-8")

    def append(self, episode: Episode) -> None:
        """Add a row."""
        self._file.write(json.dumps(episode.to_row()) + "\n")
        self._file.flush()
        self.episodes.append(episode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _keep_whole_rows(self) -> list[Episode]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self.path, len(whole))
        episodes = list(_parse(whole.decode("utf-8").splitlines(), self.path))
        twice = [key for key, count in Counter(episode.key for episode in episodes).items() if count > 1]
        if twice:
            raise ValueError(f"{self.path} holds episodes twice: {twice[:3]}")
        return episodes


def join_parts(path: Path) -> list[Episode]:
    """Move the rows that several processes left in their parts to `path`, and return all of its rows.

    A kill in between leaves a row in both, which counts once. None of the processes may be writing.
    """
    with EpisodeFile(path) as rows:
        known = {episode.key for episode in rows.episodes}
        for other in sorted(path.parent.glob(f"{path.stem}.*{path.suffix}")):
            with EpisodeFile(other) as left:
                for episode in left.episodes:
                    if episode.key not in known:
                        rows.append(episode)
            other.unlink()
        return rows.episodes


def read_episodes(path: Path) -> list[Episode]:
    """Read the rows of a finished evaluation.

    Raises:
        ValueError: If a line is no row.
    """
    return list(_parse(path.read_text(encoding="utf-8").splitlines(), path))


def _parse(lines: list[str], path: Path) -> Iterator[Episode]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Episode.from_row(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row of an evaluation ({error}): {line[:80]!r}") from error
