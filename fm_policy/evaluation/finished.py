"""Evaluations that have come to their end, read back."""

import json
from pathlib import Path
from typing import Any

from fm_policy.evaluation.episodes import Episode, plan, read_episodes


def read_finished(folder: Path) -> tuple[dict[str, Any], list[Episode]]:
    """Summary and episodes of an evaluation.

    Raises:
        ValueError: If it is not there, not finished or not whole.
    """
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} holds no finished evaluation, it lacks summary.json")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    episodes = read_episodes(folder / "episodes.jsonl")
    planned = plan(range(summary["seed"], summary["seed"] + summary["episodes"]), summary["repeats"])
    if sorted(episode.key for episode in episodes) != sorted(planned):
        raise ValueError(f"{folder} is not whole: episodes.jsonl does not hold the episodes that summary.json names")
    return summary, episodes
