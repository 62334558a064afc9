"""`eval/replay.py`: episodes of a scripted and of a human data set succeed again, from the right starts only."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import h5py
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from env_configs.demos.__main__ import main as demos

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "replay.py")
LIFT = "demo_8"
"""A short demonstration."""


@pytest.fixture
def replay(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")

    return run


@pytest.mark.skipif(find_spec("gymnasium_robotics") is None, reason="needs the extra kitchen")
def test_a_scripted_episode_succeeds_again_from_its_seed_with_its_own_actions(replay, tmp_path, capsys):
    root, file = tmp_path / "set", tmp_path / "outcomes.json"
    recording = ["kitchen", "--scripted", "--episodes", "1", "--workers", "1", "--actions", "velocity"]
    assert demos([*recording, "--root", str(root)]) == 0
    replay("--env", "kitchen", "--root", root, "--json", file)
    assert "1 of 1 episodes replayed to success" in capsys.readouterr().out
    (outcome,) = json.loads(file.read_text())
    solved = LeRobotDataset("local/set", root=root).hf_dataset.with_format("numpy")["next.success"]
    assert outcome["success"] and outcome["steps"] == 1 + np.argmax(solved)
    scripted = root / "meta" / "scripted.json"
    about = json.loads(scripted.read_text())
    scripted.write_text(json.dumps(about | {"seeds": [*about["seeds"], 7]}))
    with pytest.raises(SystemExit, match="has 1 episodes, but 2 starts are known"):
        replay("--env", "kitchen", "--root", root)


@pytest.mark.skipif(find_spec("robosuite") is None, reason="needs the extra robosuite")
def test_a_human_episode_succeeds_from_the_recorded_start_alone(replay, fm_data, tmp_path, capsys):
    source, away, root = tmp_path / "one.hdf5", tmp_path / "away.hdf5", tmp_path / "set"
    for path in (source, away):
        with h5py.File(fm_data / "robomimic" / "lift_ph_10demos_low_dim.hdf5") as whole, h5py.File(path, "w") as part:
            data = part.create_group("data")
            data.attrs.update(whole["data"].attrs)
            whole.copy(f"data/{LIFT}", data, "demo_0")
    with h5py.File(away, "r+") as file:  # the cube starts 10 cm aside
        state = file["data/demo_0/states"][0]
        state[10] += 0.1
        file["data/demo_0/states"][0] = state
    assert demos(["lift", "--source", str(source), "--root", str(root)]) == 0
    replay("--env", "lift", "--root", root, "--source", source)
    replay("--env", "lift", "--root", root, "--source", away)
    counts = [line for line in capsys.readouterr().out.splitlines() if "replayed" in line]
    assert ["1 of 1" in counts[0], "0 of 1" in counts[1]] == [True, True]
    with pytest.raises(SystemExit, match="nothing tells where the episodes of .* start: give the recording"):
        replay("--env", "lift", "--root", root)


def test_what_is_no_data_set_is_named(replay, tmp_path):
    with pytest.raises(SystemExit, match="is no LeRobotDataset: it lacks meta/info.json"):
        replay("--env", "kitchen", "--root", tmp_path)
    with pytest.raises(SystemExit, match="--episodes must be at least 1, not 0"):
        replay("--env", "kitchen", "--root", tmp_path, "--episodes", 0)
