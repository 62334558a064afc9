"""`eval/realtime.py`: what it tells of short episodes with LeRobot's two engines."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm_policy.assets import default_policy
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.checkpoint import load_checkpoint

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "realtime.py")


def test_it_tells_what_a_slow_policy_misses_and_where_chunks_meet(monkeypatch, tmp_path, capsys):
    file = tmp_path / "told.json"
    engines = ["sync", "rtc:direct"]
    arguments = ["--engine", *engines, "--latency", "0.25", "--episodes", "1", "--nfe", "2", "--seconds", "3"]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *arguments, "--out", str(file)])
    here = Path.cwd()
    runpy.run_path(PROGRAM, run_name="__main__")
    assert Path.cwd() == here
    told = json.loads(file.read_text())
    assert [(run["engine"], run["latency"]) for run in told["runs"]] == [(engine, 0.25) for engine in engines]
    sync, rtc = told["runs"]
    assert rtc["missed"] < sync["missed"] < 0.6
    assert sync["missed"] > 0.1  # two or three of every ten steps
    for run in told["runs"]:
        (row,) = run["rows"]
        assert (row["seed"], row["steps"], row["ended"]) == (1000, 30, "time")
        assert 2 <= row["chunks"] <= 10
        assert row["chunk_s"] > 0.25
        assert min(row["jerk"], row["jerk_at_seams"], row["jerk_between"]) > 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [run["score"] for run in shown] == [run["score"] for run in told["runs"]]


@pytest.mark.parametrize(("solver", "nfe", "steps"), [("euler", 4, 4), ("heun", 4, 2)])
def test_every_engine_makes_the_asked_network_calls(tmp_path, solver, nfe, steps):
    """The server reads them from the configuration, as steps; a field younger than the policy has its default."""
    policy = Path(shutil.copytree(default_policy(), tmp_path / "policy"))
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"solver": solver}))
    whole = FlowMatchingConfig.from_pretrained(policy)
    prepare = runpy.run_path(PROGRAM)["prepared"]
    copy = prepare(SimpleNamespace(policy=policy, nfe=nfe), tmp_path / "copies")
    told = json.loads((copy / "config.json").read_text())
    whole.save_pretrained(policy)
    saved = json.loads((policy / "config.json").read_text())
    assert told == saved | {"num_solver_steps": steps}
    assert {name: told[name] for name in config} == config | {"solver": solver, "num_solver_steps": steps}
    assert load_checkpoint(copy).policy.config.nfe == nfe


def test_what_was_measured_before_is_not_written_over(monkeypatch, tmp_path):
    (tmp_path / "told.json").write_text("mine")
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--out", str(tmp_path / "told.json")])
    with pytest.raises(SystemExit, match="told.json exists: choose another --out"):
        runpy.run_path(PROGRAM, run_name="__main__")
    assert (tmp_path / "told.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "asynch"], "invalid choice: 'asynch'"),
        (["--engine", "rtc:guided"], "invalid choice: 'rtc:guided'"),
        (["--episodes", "0"], "--episodes and --seconds must be above 0"),
        (["--latency", "-0.1"], "--latency not below 0"),
        (["--policy", "nowhere"], "realtime.py: no checkpoint: .*nowhere is no folder"),
        (["--nfe", "0"], "realtime.py: euler calls the network 1 times per step"),
    ],
)
def test_wrong_arguments_are_refused_before_a_robot_moves(monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", [PROGRAM, *arguments, "--out", str(tmp_path / "told.json")])
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(PROGRAM, run_name="__main__")
    assert re.search(words, f"{refusal.value} {capsys.readouterr().err}")
    assert not list(tmp_path.iterdir())
