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
