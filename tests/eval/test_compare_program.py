"""`eval/compare.py` on evaluations of the shipped policy at one and two network calls per chunk."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from env_configs import make_env_config
from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.episodes import read_episodes
from fm_policy.evaluation.runs import Run, evaluate_into

COMPARE = Path(__file__).resolve().parents[2] / "eval" / "compare.py"


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory) -> dict[int, Path]:
    """Finished evaluations of 3 seeds x 2 repeats, by their network calls."""
    folder = tmp_path_factory.mktemp("evaluations")
    task = make_env_config("pusht", starts="random_state", episode_length=120)
    for nfe in (1, 2):
        checkpoint = load_checkpoint(default_policy(), nfe=nfe)
        evaluate_into(folder / str(nfe), checkpoint, task, Run(seed=7, episodes=3, repeats=2, packages=("gym-pusht",)))
    return {nfe: folder / str(nfe) for nfe in (1, 2)}


@pytest.fixture
def compare(monkeypatch):
    """Runs `eval/compare.py` in this process with the given arguments."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(COMPARE), *map(str, arguments)])
        runpy.run_path(str(COMPARE), run_name="__main__")

    return run


def change(folder: Path, copy: Path, edit) -> Path:
    """A copy of an evaluation with an edited summary."""
    shutil.copytree(folder, copy)
    summary = json.loads((copy / "summary.json").read_text())
    edit(summary)
    (copy / "summary.json").write_text(json.dumps(summary))
    return copy


def test_differences_are_those_of_the_episodes_with_equal_seed_and_repeat(compare, evaluations, tmp_path, capsys):
    file = tmp_path / "numbers.json"
    compare(evaluations[1], evaluations[2], evaluations[1], "--json", file)
    first, second, again = json.loads(file.read_text())
    assert (first["folder"], first["nfe"], second["nfe"]) == (str(evaluations[1]), 1, 2)
    assert "against_reference" not in first

    one, two = ({e.key: e for e in read_episodes(folder / "episodes.jsonl")} for folder in evaluations.values())
    gains = np.array([[two[s, r].max_reward - one[s, r].max_reward for r in (0, 1)] for s in (7, 8, 9)])
    against = second["against_reference"]
    assert against["score"] == pytest.approx(gains.mean())
    assert against["score"] == pytest.approx(second["score"] - first["score"])
    # Student's quantile t(0.975, 2 degrees of freedom) = 4.302653 of the three seeds' means.
    half = 4.302653 * gains.mean(axis=1).std(ddof=1) / np.sqrt(3)
    assert against["score_interval"] == pytest.approx([gains.mean() - half, gains.mean() + half], rel=1e-6)
    assert again["against_reference"]["score_interval"] == [0, 0]

    printed = capsys.readouterr().out
    assert printed.count("minus the first") == 2
    assert f"score {against['score']:+.3f} [{against['score_interval'][0]:+.3f}, " in printed


def test_calls_of_a_head_are_told_and_taken_for_none_in_the_oldest_summaries(compare, evaluations, tmp_path, capsys):
    old = change(evaluations[1], tmp_path / "old", lambda summary: summary.pop("head_nfe"))
    new = change(evaluations[2], tmp_path / "new", lambda summary: summary.update(head_nfe=4))
    compare(old, new, "--json", tmp_path / "numbers.json")
    records = json.loads((tmp_path / "numbers.json").read_text())
    assert [(record["nfe"], record["head_nfe"]) for record in records] == [(1, 0), (2, 4)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("  NFE 1")
    assert lines[3].endswith("  NFE 2 + 4")


def test_wins_and_losses_count_episodes(compare, evaluations, tmp_path):
    rows = [json.loads(line) for line in (evaluations[1] / "episodes.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["seed"], row["repeat"]))
    for name, outcomes in {"reference": (0, 0, 0, 1, 0, 1), "other": (1, 1, 1, 1, 0, 0)}.items():
        copy = shutil.copytree(evaluations[1], tmp_path / name)
        lines = [json.dumps(row | {"success": bool(x)}) for row, x in zip(rows, outcomes, strict=True)]
        (copy / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    compare(tmp_path / "reference", tmp_path / "other", "--json", tmp_path / "numbers.json")
    against = json.loads((tmp_path / "numbers.json").read_text())[1]["against_reference"]
    assert (against["wins"], against["losses"], against["success"]) == (3, 1, pytest.approx(2 / 6))


def test_other_tasks_are_refused_with_the_differing_values(compare, evaluations, tmp_path):
    def narrow(summary):
        summary["task"]["config"]["block_range"] = [200, 300]
        summary["task"]["versions"]["gym-pusht"] = "0.0"

    other = change(evaluations[2], tmp_path / "other", narrow)
    with pytest.raises(SystemExit) as refusal:
        compare(evaluations[1], other)
    lines = str(refusal.value).splitlines()
    assert lines[0] == f"compare.py: {evaluations[1]} and {other} are not of the same episodes:"
    assert lines[1:] == ["  block_range: [100, 400] and [200, 300]", "  gym-pusht: '0.1.8' and '0.0'"]


def test_other_seeds_are_refused(compare, evaluations, tmp_path):
    other = change(evaluations[1], tmp_path / "other", lambda summary: summary.update(seed=8))
    lines = (other / "episodes.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    moved = [json.dumps(row | {"seed": row["seed"] + 1}) for row in rows]
    (other / "episodes.jsonl").write_text("\n".join(moved) + "\n")
    with pytest.raises(SystemExit, match="not of the same episodes:\n  seed: 7 and 8$"):
        compare(evaluations[1], other)


def test_unfinished_and_incomplete_evaluations_are_named(compare, evaluations, tmp_path):
    other = shutil.copytree(evaluations[1], tmp_path / "other")
    rows = (other / "episodes.jsonl").read_text().splitlines()
    (other / "episodes.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(SystemExit, match="other is not whole: episodes.jsonl does not hold the episodes"):
        compare(evaluations[1], other)
    (other / "summary.json").unlink()
    with pytest.raises(SystemExit, match="other holds no finished evaluation, it lacks summary.json"):
        compare(evaluations[1], other)
