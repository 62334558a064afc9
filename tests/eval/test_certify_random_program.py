"""`eval/certify_random.py`: heads far from the start of training, what is certified of them, and when it complains."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from fm_policy.residual.inequalities import jacobian
from fm_policy.residual.stability import linear_penalty, row_bounds

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "certify_random.py")


@pytest.fixture
def certify_random(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")

    return run


def test_penalties_are_met_by_heads_whose_units_still_matter():
    draw_head = runpy.run_path(PROGRAM)["draw_head"]
    row, linear = (draw_head(kind, 2, 0, 1.0) for kind in ("row", "linear"))
    assert row_bounds(row.matrices()).max() <= -0.02
    assert linear_penalty(linear.matrices(), 0.02) == 0
    for head in (row, linear, draw_head("constructed", 2, 0, 1.0), draw_head("free", 2, 0, 1.0)):
        system = head.system()
        units = jacobian(system, system.stacked_beta) - system.a0
        assert torch.linalg.matrix_norm(torch.from_numpy(units), 2) > 0.1


def test_tells_what_is_certified_of_each_kind(certify_random, tmp_path, capsys):
    file = tmp_path / "random.json"
    options = ("--sizes", 2, "--seeds", 1, "--pairs", 30, "--method", "identity", "--json", file)
    certify_random(*options, "--kinds", "constructed", "row", "free")
    rows = {row["kind"]: row for row in json.loads(file.read_text())["heads"]}
    for kind in ("constructed", "row"):
        assert rows[kind]["contraction"]["rate"] >= 0.02 * (1 - 1e-6)
        assert rows[kind]["worst_rate"] >= rows[kind]["contraction"]["rate"]
        assert rows[kind]["worst_factor"] <= rows[kind]["euler"].get("factor", 1)
        assert rows[kind]["violations"] == []
    assert rows["free"]["contraction"]["answer"] == "infeasible"
    assert rows["free"]["contraction"]["amount"] > 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:3] for line in lines] == [["2", "constructed", "1/1"], ["2", "row", "1/1"], ["2", "free", "0/1"]]


def test_fails_where_it_takes_too_long(certify_random, capsys):
    options = ("--sizes", 2, "--seeds", 1, "--pairs", 3, "--method", "identity", "--kinds", "constructed")
    with pytest.raises(SystemExit) as stopped:
        certify_random(*options, "--limit", 1e-9)
    assert stopped.value.code == 1
    assert "n=2 constructed seed 0: contraction certified, 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seeds", "pairs", "sizes"])
def test_no_heads_are_no_answer(certify_random, capsys, name):
    with pytest.raises(SystemExit):
        certify_random(f"--{name}", 0)
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
