"""`eval/table.py` with the shipped policy, at one and two network calls per chunk."""

import runpy
import sys
from pathlib import Path

import pytest

from fm_policy.assets import default_policy

TABLE = Path(__file__).resolve().parents[2] / "eval" / "table.py"


@pytest.fixture
def table(monkeypatch):
    """Runs `eval/table.py` in this process with the given arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TABLE), *map(str, arguments)])
        runpy.run_path(str(TABLE), run_name="__main__")

    return run


def test_fills_a_table_and_takes_it_up_again(table, tmp_path, capsys):
    policy = default_policy()
    methods = ("--method", f"two={policy}@2/euler", "--method", f"one={policy}@1")
    table(*methods, "--episodes", 2, "--base", "one", "--out", tmp_path)
    first = capsys.readouterr()
    assert first.err.count("2/2") >= 2
    assert "| two |" in first.out and "success minus one" in first.out
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "table.md", "table.csv", "table.html"}
    written = (tmp_path / "table.md").read_text()
    assert written in first.out
    table(*methods, "--episodes", 2, "--base", "one", "--out", tmp_path)
    assert "2/2" not in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == written


def test_the_numbers_are_written_where_no_picture_can_be_drawn(table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"table\.py: matplotlib is not installed: .*\[pictures\]"):
        table("--method", f"one={default_policy()}@1", "--episodes", 1, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "table.md", "table.csv"}


def test_a_layout_says_its_tasks_alone(table, tmp_path, capsys):
    with pytest.raises(SystemExit):
        table("--table", tmp_path / "t.json", "--repeats", 5, "--base", "x")
    assert "t.json says the tasks and the base: leave --repeats, --base away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "FM"], r"table\.py: a method is NAME=DIR\[@NFE\[/SOLVER\]\].* not 'FM'"),
        (["--method", "FM=nowhere"], r"table\.py: no checkpoint: nowhere is no folder"),
        (["--table", "nowhere.json"], r"table\.py: .*nowhere\.json"),
        (["--method", f"FM={default_policy()}", "--env", "pusht_b", "pushh"], r"table\.py: unknown task 'pushh'"),
        (["--method", f"FM={default_policy()}", "--env", "pusht_b", "kitchen"], "the policy is of another task"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(table, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        table(*arguments)
    assert not list(tmp_path.iterdir())
