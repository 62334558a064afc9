"""The result of an evaluation, as a record and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fm_policy.evaluation.episodes import Episode, whole
from fm_policy.evaluation.statistics import Interval, best_of_repeats, mean_interval, share_interval, table


def summarise(episodes: Sequence[Episode]) -> dict[str, Any]:
    """What the episodes say.

    Returns:
        `score`: mean of the largest reward, `score_interval`: its 95 % interval, None for a single seed;
        `success`: share of successful episodes, `success_interval`: its 95 % interval (Wilson);
        `best_of_r`: mean over the seeds of the best repeat's largest reward; `measures`: means of those that
        every episode has; `episodes`: number of seeds, `repeats`: episodes of each; `steps`: mean length; `nfe`:
        network calls per chunk.
    """
    episodes = sorted(episodes, key=lambda episode: episode.key)  # the last bit of a mean depends on the order
    rewards, successes = table(episodes, "max_reward"), table(episodes, "success")
    return {
        "score": float(rewards.mean()),
        "score_interval": mean_interval(rewards),
        "success": float(successes.mean()),
        "success_interval": share_interval(successes),
        "best_of_r": best_of_repeats(rewards),
        "episodes": len(rewards),
        "repeats": rewards.shape[1],
        "measures": {
            name: float(np.mean([episode.measures[name] for episode in episodes]))
            for name in episodes[0].measures
            if all(name in episode.measures for episode in episodes)
        },
        "steps": float(np.mean([episode.steps for episode in episodes])),
        "nfe": whole(float(np.average([e.nfe for e in episodes], weights=[e.chunks for e in episodes]))),
    }


def chunk_times(calls: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """Wall time of an inference call, processors included: percentiles in ms over the calls of the usual size.

    Args:
        calls: Rows and seconds of every call.

    Returns:
        `p50`, `p99` and `rows`, the usual number of rows; None if nothing was called.
    """
    if not calls:
        return None
    rows, seconds = np.array([rows for rows, _ in calls]), np.array([seconds for _, seconds in calls])
    usual = int(np.bincount(rows).argmax())
    p50, p99 = np.percentile(1e3 * seconds[rows == usual], [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "rows": usual}


def as_text(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    lines = [
        f"score      {summary['score']:.3f}  {_interval(summary['score_interval'])}  mean of the largest reward",
        f"success    {summary['success']:.3f}  {_interval(summary['success_interval'])}",
        f"episodes   {summary['episodes']} seeds x {summary['repeats']} repeats, {nfe_text(summary)} per chunk",
    ]
    if summary["repeats"] > 1:
        lines.insert(2, f"best of {summary['repeats']:<2d} {summary['best_of_r']:.3f}")
    if (scale := summary.get("noise_scale", 1)) != 1:  # the oldest summaries lack it
        lines[-1] += f", of noise scaled by {scale:g}"
    if (jitter := summary["measures"].get("jitter")) is not None:
        lines.append(f"jitter     {jitter:.3g}  mean square of the actions' second difference, in the task's units")
    if noise := summary.get("observation_noise"):
        lines.append(f"noise      {noise:g} in every normalised number of the observations")
    if times := summary.get("ms_per_chunk"):
        lines.append(f"inference  {times['p50']:.1f} ms per call of {times['rows']} rows (p99 {times['p99']:.1f} ms)")
    return "\n".join(lines)


def nfe_text(record: Mapping[str, Any]) -> str:
    """The calls per chunk that a record names: of the velocity net, and the head's beside them where there is one."""
    return f"NFE {record['nfe']:g}" + (f" + {record['head_nfe']}" if record["head_nfe"] else "")


def _interval(interval: Interval | None) -> str:
    return "[one seed: no interval]" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
