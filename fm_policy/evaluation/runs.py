"""An evaluation as a folder: `run.json`, `episodes.jsonl`, `summary.json` and `videos`, continued after a kill."""

import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lerobot.envs.configs import EnvConfig
from tqdm import tqdm

from fm_policy.evaluation.checkpoint import Checkpoint
from fm_policy.evaluation.episodes import Episode, EpisodeFile, EpisodeKey, join_parts, part, plan, read_episodes
from fm_policy.evaluation.inference import ChunkSampler
from fm_policy.evaluation.policies import ChunkPolicy
from fm_policy.evaluation.provenance import PACKAGES, describe_hardware, describe_task, versions
from fm_policy.evaluation.ranks import ALONE, Rank
from fm_policy.evaluation.report import chunk_times, summarise
from fm_policy.evaluation.rollouts import BATCH_SIZE, run_episodes
from fm_policy.evaluation.videos import Camera, film_of
from fm_policy.files import write_json
from fm_policy.sources import source_fingerprint

# Settings that the oldest records lack, and what held then.
ADDED_SETTINGS: dict[str, Any] = {"observation_noise": 0.0, "noise_scale": 1.0}

# What an evaluation may be continued to more of: a row depends on its own seed and repeat alone.
GROWING = ("episodes", "repeats")


@dataclass(frozen=True)
class Run:
    """Which episodes to run, and how.

    Attributes:
        seed: First seed; the others follow it.
        episodes: Number of seeds.
        repeats: Episodes of each seed.
        n_action_steps: Actions of a chunk to execute; None: as the policy is configured.
        batch_size: Most environments at a time; None: as many as the task says (`BATCH_SIZE`), or 64.
        use_async_envs: Give each environment its own process.
        videos: Episodes to film, the first of the plan.
        packages: Distributions that the task's simulator is made of, for the record.
        observation_noise: Standard deviation of noise in every normalised number of the observations, at least 0.
    """

    seed: int = 1000
    episodes: int = 500
    repeats: int = 1
    n_action_steps: int | None = None
    batch_size: int | None = None
    use_async_envs: bool = False
    videos: int = 0
    packages: tuple[str, ...] = ()
    observation_noise: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.observation_noise) and self.observation_noise >= 0):
            raise ValueError(f"observation_noise must be finite and at least 0, got {self.observation_noise}")
        for name, least in {"seed": 0, "episodes": 1, "repeats": 1, "batch_size": 1, "videos": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def at_once(self, env_config: EnvConfig) -> int:
        """Most environments of a task at a time."""
        of_the_task: int = getattr(env_config, "BATCH_SIZE", BATCH_SIZE)
        return of_the_task if self.batch_size is None else self.batch_size

    @property
    def jobs(self) -> list[EpisodeKey]:
        """The plan."""
        return plan(range(self.seed, self.seed + self.episodes), self.repeats)


def evaluate_into(
    folder: Path,
    checkpoint: Checkpoint[ChunkPolicy],
    env_config: EnvConfig,
    run: Run,
    resume: bool = False,
    seconds: dict[str, float] | None = None,
    rank: Rank = ALONE,
) -> dict[str, Any]:
    """Run an evaluation, or what is left of it, and write it down.

    Several processes that call this together, with their ranks, share the episodes. What they write is what one alone
    writes, but for the order of the rows; each can be killed and any number of them continue.

    Args:
        folder: Where to; made when needed.
        checkpoint: The policy.
        env_config: The task.
        run: Which episodes.
        resume: Continue what the folder holds, to more seeds or repeats if the run has more.
        seconds: Wall seconds that went before, by what took them, for the record.
        rank: Which of these processes this is.

    Returns:
        The summary, as written; of an evaluation that was finished before, with the times of then.

    Raises:
        ValueError: If the folder is not empty and not to be continued, holds another evaluation, or is being written
            to by one.
    """
    start = time.perf_counter()
    sampler = ChunkSampler(
        checkpoint.policy,
        checkpoint.preprocessor,
        checkpoint.postprocessor,
        env_config,
        run.n_action_steps,
        run.at_once(env_config),
        run.observation_noise,
    )
    settings = _settings(checkpoint, env_config, run, sampler)
    with _alone_in(folder) if rank.first else nullcontext():
        path = folder / "episodes.jsonl"
        if rank.first:
            _claim(folder, settings, resume)
            join_parts(path)
        rank.wait()
        done = read_episodes(path)
        rank.wait()  # nobody writes before everybody has read
        left = _left(run, done)
        if rank.first:
            _tell_unfilmed(run, left, folder / "videos")
        if not left and (folder / "summary.json").is_file():
            if rank.first:  # what was measured while the episodes ran stays
                write_json(folder / "summary.json", _read_summary(folder) | {"episodes_run_now": 0})
            rank.wait()
            return _read_summary(folder)
        share = rank.share(left)
        with EpisodeFile(part(path, rank.number)) as rows:
            episodes = _run_share(run, share, sampler, env_config, folder)
            for episode in _progress(episodes, done, len(share), silent=not rank.first):
                rows.append(episode)
        rank.wait()
        if rank.first:
            rows_now = join_parts(path)
            summary = {
                **summarise(rows_now),
                "head_nfe": checkpoint.policy.config.head_nfe,
                "ms_per_chunk": chunk_times(sampler.calls),
                **settings,
                **_provenance(checkpoint),
                "processes": rank.processes,
                "seconds": {**(seconds or {}), "evaluation": round(time.perf_counter() - start, 2)},
                "episodes_run_now": len(rows_now) - len(done),
            }
            write_json(folder / "summary.json", summary)
        rank.wait()
        return _read_summary(folder)


def _read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other evaluations out of a folder, whose rows two of them would write twice."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file, expected a folder")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"another evaluation is writing to {folder} at this moment: wait for it") from error


def _settings(
    checkpoint: Checkpoint[ChunkPolicy], env_config: EnvConfig, run: Run, sampler: ChunkSampler
) -> dict[str, Any]:
    """All that decides which episodes there are and what happens in them."""
    config = checkpoint.policy.config
    return {
        "policy": checkpoint.fingerprint,
        "task": describe_task(env_config, run.packages),
        "seed": run.seed,
        "episodes": run.episodes,
        "repeats": run.repeats,
        "solver": config.solver,
        "num_solver_steps": config.num_solver_steps,
        "noise_scale": config.noise_scale,
        "n_action_steps": sampler.n_action_steps,
        "observation_noise": run.observation_noise,
        "device": config.device,
        "row_block": sampler.row_block,
        "versions": versions(PACKAGES),
    }


def _provenance(checkpoint: Checkpoint[ChunkPolicy]) -> dict[str, Any]:
    return {
        "policy": {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint},
        "code": source_fingerprint(("fm_policy", "env_configs")),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": describe_hardware(next(checkpoint.policy.parameters()).device),
    }


def _left(run: Run, done: list[Episode]) -> list[EpisodeKey]:
    keys = {episode.key for episode in done}
    return [key for key in run.jobs if key not in keys]


def _tell_unfilmed(run: Run, left: Sequence[EpisodeKey], folder: Path) -> None:
    """Films are made while an episode runs; of those that ran before without, none will be."""
    ran = [key for key in run.jobs[: run.videos] if key not in left]
    if missing := [key.seed for key in ran if not film_of(folder, key).is_file()]:
        logging.warning(f"not filmed, since their episodes ran before: seeds {missing}")


def _run_share(
    run: Run, share: Sequence[EpisodeKey], sampler: ChunkSampler, env_config: EnvConfig, folder: Path
) -> Iterator[Episode]:
    camera = Camera(folder / "videos", run.jobs[: run.videos]) if run.videos else None
    return run_episodes(sampler, env_config, share, run.at_once(env_config), run.use_async_envs, camera)


def _claim(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    folder.mkdir(exist_ok=True)
    present = sorted(path.name for path in folder.iterdir() if path.suffix != ".part")  # a draft, left by a kill
    record = folder / "run.json"
    if not present:
        write_json(record, settings)
    elif not resume:
        raise ValueError(f"{folder} is not empty: choose another folder, or continue the evaluation in it (resume)")
    elif not record.is_file():
        raise ValueError(f"{folder} holds no evaluation to continue: {record.name} is missing beside {present[:5]}")
    else:
        stored = json.loads(record.read_text(encoding="utf-8"))
        _check_same(stored, settings, folder)
        if any(stored[name] < settings[name] for name in GROWING):
            (folder / "summary.json").unlink(missing_ok=True)  # first: it must never stand beside rows of a larger run
            write_json(record, settings)


def _check_same(stored: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    before, now = _flatten(ADDED_SETTINGS | stored), _flatten(settings)
    before |= {name: now[name] for name in GROWING if before.get(name, now[name]) < now[name]}
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if differing:
        pairs = [f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in differing]
        raise ValueError(f"{folder} holds another evaluation:\n  " + "\n  ".join(pairs))


def _flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _progress(episodes: Iterable[Episode], done: list[Episode], share: int, silent: bool) -> Iterable[Episode]:
    """The episodes, with a bar of this process's share that shows the means so far, those of earlier runs included."""
    rewards = sum(episode.max_reward for episode in done)
    successes = sum(episode.success for episode in done)
    with tqdm(total=len(done) + share, initial=len(done), desc="episodes", unit="ep", disable=silent) as bar:
        for number, episode in enumerate(episodes, start=len(done) + 1):
            rewards += episode.max_reward
            successes += episode.success
            bar.update()
            bar.set_postfix(score=f"{rewards / number:.3f}", success=f"{successes / number:.3f}")
            yield episode
