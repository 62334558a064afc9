"""`eval/env_speed.py`: that it times every way of running, on a real simulator, and writes it down."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "env_speed.py")


def test_times_every_way_and_writes_it_down(monkeypatch, tmp_path, capsys):
    if find_spec("gym_pusht") is None:
        pytest.skip("gym-pusht is not installed: needs the extra pusht")
    file = tmp_path / "speed.json"
    flags = ["--tasks", "pusht", "--batch", 4, "--processes", 1, "--steps", 40, "--rounds", 2, "--json", file]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, flags)])
    runpy.run_path(PROGRAM, run_name="__main__")
    rows = json.loads(file.read_text())["pusht"]
    assert list(rows) == ["bare", "alone", "batch of 4", "1 processes"]
    assert rows["bare"]["share"] == 1
    assert all(row["steps_per_second"] > 100 and row["share"] > 0.1 for row in rows.values())
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_every_step_is_the_simulators_even_beyond_the_end_of_an_episode(monkeypatch):
    """Ended episodes stand still and would make any simulator fast."""
    pusht = pytest.importorskip("env_configs.pusht", reason="needs the extra pusht")
    pytest.importorskip("gym_pusht", reason="needs the extra pusht")
    counted = []
    step = pusht.PushT.step
    monkeypatch.setattr(pusht.PushT, "step", lambda self, action: counted.append(1) or step(self, action))
    run = runpy.run_path(PROGRAM)["ours"]("pusht", 2, processes=False)
    for _ in range(2):  # of 300 steps each at most
        counted.clear()
        run(2 * 350)
        assert len(counted) == 2 * 350


@pytest.mark.parametrize("name", ["batch", "processes", "steps", "rounds"])
def test_nothing_is_timed_by_no_steps(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [PROGRAM, f"--{name}", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(PROGRAM, run_name="__main__")
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
