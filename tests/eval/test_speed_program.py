"""`eval/speed.py`: that what it tells follows from the files, and that the README tells it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = str(REPOSITORY / "eval" / "speed.py")
FILES = REPOSITORY / "docs" / "speed"


@pytest.fixture(scope="module")
def speed():
    """The program's functions."""
    return runpy.run_path(PROGRAM)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
    runpy.run_path(PROGRAM, run_name="__main__")


def write(folder: Path, name: str, numbers: dict, **machine: object) -> None:
    folder.mkdir(exist_ok=True)
    where = {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.11"} | machine
    told = {"command": "python", "machine": where, "numbers": numbers}
    (folder / f"{name}.json").write_text(json.dumps(told))


def test_the_readmes_table_is_what_the_files_say(speed):
    page = (REPOSITORY / "README.md").read_text()
    told = page.partition(speed["BEGIN"])[2].partition(speed["END"])[0].strip()
    assert told == speed["table"](*speed["read"](FILES))
    assert told.count("\n") > 20


def test_every_file_of_the_page_was_made_by_the_programs_own_command(speed):
    todo = speed["measurements"](Path("DIR"))
    for name in todo:
        file = FILES / f"{name}.json"
        if file.exists():
            command = json.loads(file.read_text())["command"]
            assert command.split("--root")[0] == speed["command_of"](todo[name]).split("--root")[0]


def test_a_rate_is_compared_in_its_own_round(speed):
    """The machine was half as fast in the second round: for both."""
    rates = {"bare loop": [100.0, 50.0], "fm_ft": [80.0, 40.0], "diffusion, 0 workers": [20.0, 10.0]}
    numbers = {"samples_per_second": rates, "obs": "state", "batch_size": 4}
    bare, peer = speed["training"](numbers)
    assert (bare.what, bare.ours, bare.times) == ("training from states, batches of 4", "60 samples/s", 0.8)
    assert (peer.beside, peer.times) == ("LeRobot's diffusion policy, same net, 0 workers: 15", 4)


def test_twice_the_seconds_are_half_as_fast(speed):
    turn = {"lerobot-eval": [{"counted": 30.0}], "eval/rollout.py": [{"counted": 15.0}]}
    (line,) = speed["evaluation"]("1 network call")({"episodes": 7, "turns": turn})
    assert line == ("7 Push-T episodes, 1 network call, imports apart", "15.0 s", "`lerobot-eval`: 30.0 s", 2)
    cost = {"flow_matching_mib": 3, "S=2": {"time": 1.6}, "S=2, nearest of 5": {"time": 3.2}, "S=4": {"time": 5}}
    assert [line.times for line in speed["finetune"](cost)] == [1.25, 0.8, 0.5]
    row = {"p50_ms": 2.0, "p99_ms": 3.0}
    rows = {"NFE 1": row | {"over_limit": 1.25}, "bare call": row, "peer ddpm/9": row | {"p50_ms": 50.0}}
    assert [line.times for line in speed["latency"]({"rows": rows})] == [0.8, 25]
    ways = {"bare": {"steps_per_second": 10, "share": 1}, "alone": {"steps_per_second": 9, "share": 0.9}}
    (line,) = speed["simulators"]({"lift": ways})
    assert line == ("stepping `lift`, alone", "9 steps/s", "the bare simulator: 10", 0.9)


def test_measures_what_is_missing_and_writes_the_table_into_the_page(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- speed -->\nof old\n<!-- end of speed -->\nbelow\n")
    run(monkeypatch, "--out", tmp_path / "files", "--only", "import", "--into", page)
    told = json.loads((tmp_path / "files" / "import.json").read_text())
    assert told["command"].startswith("python -c ") and told["machine"]["cores"] >= 1
    text = page.read_text()
    assert text.startswith("above\n<!-- speed -->\n") and text.endswith("<!-- end of speed -->\nbelow\n")
    assert f"| {told['numbers']['seconds']:.3f} s |" in text and "of old" not in text
    capsys.readouterr()
    run(monkeypatch, "--out", tmp_path / "files", "--only", "import", "--into", page)
    assert "python -c" not in capsys.readouterr().out and page.read_text() == text  # nothing was measured again


def test_what_is_written_into_the_page_meanwhile_stays(monkeypatch, tmp_path, speed):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- speed -->\nof old\n<!-- end of speed -->\nbelow\n")
    measure = speed["main"].__globals__["run"]

    def edited(*arguments):
        measure(*arguments)
        page.write_text(page.read_text().replace("above", "above, edited"))

    monkeypatch.setitem(speed["main"].__globals__, "run", edited)
    monkeypatch.setattr(
        sys, "argv", [PROGRAM, "--out", str(tmp_path / "files"), "--only", "import", "--into", str(page)]
    )
    speed["main"]()
    assert page.read_text().startswith("above, edited\n<!-- speed -->\n\n| what |") and "of old" not in page.read_text()


def test_a_program_that_fails_leaves_no_file(monkeypatch, tmp_path, speed):
    failing = speed["Measurement"](("-c", "raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="ended with 3"):
        speed["run"](tmp_path, {"latency": failing})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda files: write(files, "import", {"seconds": 1}, cpu="another"), [], "of different machines"),
        (lambda files: (files / "import.json").write_text("[]"), [], "import.json is no file of speed.py"),
        (lambda files: None, ["--into", "no page"], "speed.py:.*no page"),
        (lambda files: None, ["--into", __file__], "has no line <!-- speed -->"),
    ],
)
def test_what_cannot_be_told_is_refused(monkeypatch, tmp_path, speed, prepare, arguments, message):
    write(tmp_path, "episodes", {"seconds": {"evaluation": 1}, "episodes": 2, "nfe": 1})
    write(tmp_path, "import", {"seconds": 1})
    prepare(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--out", tmp_path, "--only", "import", *arguments)


def test_nothing_is_measured_that_could_not_be_told(monkeypatch, tmp_path):
    """Half an hour later is too late."""
    write(tmp_path, "episodes", {}, cpu="another")
    with pytest.raises(SystemExit, match="are of another machine than this one"):
        run(monkeypatch, "--out", tmp_path, "--only", "import")
    with pytest.raises(SystemExit, match="has no line <!-- speed -->"):
        run(monkeypatch, "--out", tmp_path / "new", "--only", "import", "--into", __file__)
    assert [file.name for file in tmp_path.iterdir()] == ["episodes.json"]


def test_pixels_need_a_data_set(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", "nowhere", "--only", "training_pixels")
    assert "training_pixels needs --pixels" in capsys.readouterr().err
