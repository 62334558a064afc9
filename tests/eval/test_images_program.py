"""`eval/images.py`: a whole small table, stopped and continued, and CIFAR-10's recipe on generated pictures."""

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "images.py")
SMALL = ("--steps", 6, "--tuning-steps", 2, "--batch", 4, "--solver-steps", 2, "--channels", 8, 8, "--samples", 10)
ROWS = ("i-cfm", "i-cfm-ft-ot", "i-cfm-resft-control_synth")
COLUMNS = ("euler4", "euler16")


@pytest.fixture
def program(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")

    return run


def not_blank(file):
    with Image.open(file) as image:
        return len(image.convert("RGB").getcolors(image.width * image.height)) > 20


def table(folder):
    return json.loads((folder / "table.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small table of two seeds, made in one go."""
    folder = tmp_path_factory.mktemp("made")
    command = (
        *SMALL,
        "--seeds",
        0,
        1,
        "--rows",
        *ROWS,
        "--columns",
        *COLUMNS,
        "--classifier-steps",
        200,
        "--out",
        folder,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [PROGRAM, *map(str, command)])
        runpy.run_path(PROGRAM, run_name="__main__")
    return folder, command


def test_every_cell_is_there(made):
    folder, _ = made
    numbers = table(folder)
    assert list(numbers["rows"]) == list(ROWS)
    for key, row in numbers["rows"].items():
        for column in COLUMNS:
            cell = row["columns"][column]
            values = [cell["seeds"][seed]["distance"] for seed in ("0", "1")]
            assert cell["mean"] == pytest.approx(sum(values) / 2) and values[0] != values[1]
            assert cell["interval"][0] < cell["mean"] < cell["interval"][1]
            assert numbers["floor"] < min(values) and math.isfinite(max(values))
            if key != "i-cfm":
                base = numbers["rows"]["i-cfm"]["columns"][column]["mean"]
                assert cell["minus_start"][0] == pytest.approx(cell["mean"] - base)
        assert [row["columns"][column]["seeds"]["0"]["nfe"] for column in COLUMNS] == [4, 16]
        assert row["columns"]["euler4"]["seeds"]["0"]["head_calls"] == (4 if "resft" in key else 0)


def test_the_table_reads_well(made):
    folder, _ = made
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "% right on held-out ones" in text and "| | Euler 4 | Euler 16 |" in text
    assert "| FT from I-CFM, ot | " in text and "(16 + 4) |" in text
    assert "Minus the base, paired by seed:" in text
    assert not_blank(folder / "curves.png") and not_blank(folder / "same_noise.png")


def test_stopped_and_continued_it_makes_the_same_table(made, program, tmp_path, capsys):
    folder, command = made
    command = (*command[:-1], tmp_path)
    with pytest.raises(SystemExit) as stopped:
        program(*command, "--minutes", 1e-6)
    assert stopped.value.code == 75 and "goes on from here" in capsys.readouterr().err
    program(*command)
    assert table(tmp_path) == table(folder)


def test_other_settings_in_the_same_folder_are_refused(made, program):
    _, command = made
    with pytest.raises(SystemExit, match=r"was made with recipe.steps 6 instead of 7: choose another --out"):
        program(*command, "--steps", 7)


def test_what_followed_from_other_settings_is_refused_where_they_were_removed(made, program, tmp_path):
    """A base, or the classifier, trained anew: nothing that was made with the old one goes into the new table."""
    folder, command = made
    command = (*command[:-1], shutil.copytree(folder, tmp_path / "copy"))
    models, tuned = command[-1] / "models", next(key for key in ROWS if key != "i-cfm")
    for seed in (0, 1):
        (models / f"i-cfm-{seed}.safetensors").unlink()
    longer = ("--steps", 7)
    for file in (command[-1] / "cells").glob("i-cfm-[01]-*"):
        file.unlink()
    with pytest.raises(SystemExit, match=rf"{tuned}-0.safetensors was made with start '\w+' instead of '\w+'"):
        program(*command, *longer)
    shutil.copytree(folder, command[-1], dirs_exist_ok=True)
    (models / "classifier.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"was made with features 'classifier \w+' instead of 'classifier \w+'"):
        program(*command, "--classifier-steps", 9)


def test_cifar10_s_recipe_runs_on_pictures_of_its_size(program, tmp_path):
    """Generated ones; the net keeps its depth and its attention, but not its width."""
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
    out = tmp_path / "out"
    sizes = ("--steps", 2, "--tuning-steps", 1, "--batch", 2, "--solver-steps", 2, "--channels", 32, 64, 64, 64)
    rows = ("i-cfm", "i-cfm-ft-inverse", "i-cfm-resft-control_synth")
    data = ("--data", "cifar10", "--root", tmp_path, "--samples", 4, "--classifier-steps", 3)
    program(*data, *sizes, "--seeds", 0, "--rows", *rows, "--columns", "euler4", "--out", out)
    assert list(table(out)["rows"]) == list(rows)
    assert not_blank(out / "same_noise.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rows", "ddpm"), "--rows must be among i-cfm, .*, got 'ddpm'"),
        (("--samples", 0), "--samples must be above 0, got 0"),
        (("--seeds", 0, 1, 0), r"--seeds must differ, got \[0, 1, 0\]"),
        (("--columns", "heun4"), "invalid choice: 'heun4'"),
    ],
)
def test_refuses_what_it_does_not_know(program, capsys, arguments, message):
    with pytest.raises(SystemExit):
        program(*arguments)
    assert re.search(message, capsys.readouterr().err)


def test_names_the_files_that_are_missing(program, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* lacks data_batch_1.bin, .*, test_batch.bin of cifar10"):
        program("--data", "cifar10", "--root", tmp_path)
