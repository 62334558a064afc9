"""`eval/known_flows.py`: what it prints and draws; its numbers are tested with the bounds themselves."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "known_flows.py")


@pytest.fixture
def known_flows(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")

    return run


def test_prints_a_row_for_every_bound_and_draws_the_picture(known_flows, tmp_path, capsys):
    picture = tmp_path / "new" / "bounds.png"
    known_flows("--fields", 20, "--seed", 3, "--picture", picture)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("20 fields,")
    rows = {line[:22].strip(): line[22:].split() for line in lines[2:6]}
    assert {name: cells[:2] for name, cells in rows.items()} == {
        "(4), random steps": [str(3 * 93 * 20), "0"],
        "(4), equal steps": [str(3 * 31 * 20), "0"],
        "(5) with (1 + L/N)^N": [str(3 * 31 * 20), "0"],
        "(5) with e^L": [str(3 * 31 * 20), "0"],
    }
    assert [line.split() for line in lines[-4:]] == [
        ["4", "0.294", "0.439"],
        ["16", "0.293", "0.767"],
        ["64", "0.309", "0.931"],
        ["1024", "0.316", "0.995"],
    ]
    with Image.open(picture) as image:
        assert image.size == (700, 450)
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50  # not blank


def test_refuses_no_fields(known_flows, capsys):
    with pytest.raises(SystemExit):
        known_flows("--fields", 0)
    assert "--fields must be at least 1, got 0" in capsys.readouterr().err
