"""`eval/evaluation_speed.py`: that both programs run the episodes that were asked for, and what is told of them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from fm_policy.assets import default_policy

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "evaluation_speed.py")


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
    runpy.run_path(PROGRAM, run_name="__main__")


def test_both_evaluate_and_are_told(monkeypatch, capsys, tmp_path):
    one_call = default_policy().with_name("pusht_one_call")
    few = ("--policy", one_call, "--episodes", 1, "--rounds", 1, "--processes", 1, "--env", "pusht_a")
    run(monkeypatch, *few, "--json", tmp_path / "speed.json")
    assert "pusht_a, 1 episodes" in capsys.readouterr().out
    told = json.loads((tmp_path / "speed.json").read_text())
    assert [*told["turns"]] == ["lerobot-eval", "eval/rollout.py"]
    for (turn,) in told["turns"].values():
        assert 0 < turn["counted"] < turn["process"] and turn["success"] in (0, 1)


def test_a_program_that_fails_is_shown_with_its_message():
    timed = runpy.run_path(PROGRAM)["timed"]
    with pytest.raises(RuntimeError, match=r"(?s)python.* -c .* ended with 1:.*no such task"):
        timed([sys.executable, "-c", "raise SystemExit('no such task')"])


@pytest.mark.parametrize(
    ("env", "message"), [("pushh", "unknown task 'pushh'; known are"), ("handover", "no policy ships for the task")]
)
def test_a_task_that_cannot_be_run_is_named(monkeypatch, env, message):
    with pytest.raises(SystemExit, match=f"evaluation_speed.py: {message}"):
        run(monkeypatch, "--env", env)


def test_no_episodes_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--episodes", 0)
    assert "--episodes must be at least 1, got 0" in capsys.readouterr().err
