"""`eval/record.py`: which episodes are kept, up to where, and that a failure is kept only where it is asked for."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from fm_policy.assets import one_call_policy

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "record.py")


@pytest.mark.parametrize("words", [[], ["--failures"]], ids=["successes", "all"])
def test_an_episode_ends_with_its_only_success_or_with_the_time(words, monkeypatch, tmp_path):
    program = runpy.run_path(PROGRAM)
    monkeypatch.setitem(program["main"].__globals__, "BATCH", 6)
    arguments = [f"--root={tmp_path / 'own'}", f"--policy={one_call_policy()}", "--episodes=6", "--seed=70000", *words]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *arguments])
    program["main"]()
    dataset = LeRobotDataset("local/own", root=tmp_path / "own")
    assert dataset.num_episodes == 6
    columns = dataset.hf_dataset.with_format("numpy")
    success, done = (np.ravel(columns[f"next.{name}"][:]) for name in ("success", "done"))
    ends = np.asarray(dataset.meta.episodes["dataset_to_index"])
    assert np.array_equal(np.flatnonzero(done), ends - 1)
    assert set(np.flatnonzero(success)) <= set(ends - 1)
    solved, lengths = success[ends - 1], np.diff(ends, prepend=0)
    assert (lengths[~solved] == 300).all()
    assert not solved.all() if words else solved.all()
    assert solved.any()
