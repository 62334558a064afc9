"""`eval/growth.py`: that each sweep changes its own size, what counts as growth and as memory, and what it writes."""

import json
import mmap
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = Path(__file__).resolve().parents[2] / "eval" / "growth.py"
STATES = {"observation.state": (2,), "observation.environment_state": (16,)}


@pytest.fixture
def growth(monkeypatch):
    """The program's functions, which use those of its neighbours."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    return runpy.run_path(str(PROGRAM))


@pytest.mark.parametrize(
    ("sweep", "size", "batch", "chunk", "pictures"),
    [
        ("horizon", 8, 128, (8, 2), 0),
        ("action_dim", 5, 128, (16, 5), 0),
        ("cameras", 2, 4, (16, 2), 2),
        ("batch", 3, 3, (16, 2), 0),
    ],
)
def test_a_sweep_changes_its_own_size_alone(growth, monkeypatch, sweep, size, batch, chunk, pictures):
    from fm_policy.modeling_fm_ft import FlowMatchingPolicy

    trained, made = [], []
    forward, predict = FlowMatchingPolicy.forward, FlowMatchingPolicy.predict_action_chunk

    def noted_forward(policy, windows):
        trained.append({name: tuple(value.shape) for name, value in windows.items()})
        return forward(policy, windows)

    def noted_chunk(policy, *arguments, **named):
        made.append(predict(policy, *arguments, **named))
        return made[-1]

    monkeypatch.setattr(FlowMatchingPolicy, "forward", noted_forward)
    monkeypatch.setattr(FlowMatchingPolicy, "predict_action_chunk", noted_chunk)
    case = growth["Case"](sweep, "", size, Path())
    assert growth["train"](case)["seconds"] > 0 and growth["infer"](case)["seconds"] > 0
    seen = STATES | {f"observation.images.{i}": (3, 96, 96) for i in range(pictures)}
    shapes = {name: (batch, 1, *shape) for name, shape in seen.items()} | {"action": (batch, *chunk)}
    assert all(windows == shapes for windows in trained) and len(trained) >= 3
    assert all(actions.shape == (1, *chunk) for actions in made) and len(made) >= 3


def test_a_step_is_one_of_every_environment(growth, monkeypatch):
    pytest.importorskip("gym_pusht", reason="needs the extra pusht")
    import env_speed

    asked = []

    def ours(task, number, processes):
        return lambda steps: asked.append((number, steps)) or 100.0  # steps a second

    monkeypatch.setattr(env_speed, "ours", ours)
    assert growth["step"](growth["Case"]("environments", "step of all", 4, Path()))["seconds"] == 4 / 100
    assert set(asked[1:]) == {(4, 4 * growth["STEPS"])}


def test_memory_is_told_from_mapped_files(growth, tmp_path):
    mib = 48
    file = tmp_path / "file"
    file.write_bytes(bytes(mib << 20))

    def anonymous() -> float:
        block = np.ones(mib << 17)
        time.sleep(0.05)  # long enough to be seen; freed before the end
        return float(block[0])

    def mapped() -> float:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            total = sum(pages[:: mmap.PAGESIZE])
            time.sleep(0.05)
        return 1.0 + total

    row = growth["measured"](anonymous)
    assert row["mib"] == pytest.approx(mib, abs=4) and row["mapped_mib"] < 4 and row["seconds"] == 1
    row = growth["measured"](mapped, once=True)
    assert row["mapped_mib"] == pytest.approx(mib, abs=4) and row["mib"] < 4


@pytest.mark.parametrize("power", [0, 1, 2])
def test_exponents_of_a_power_are_that_power(growth, power):
    sizes = [2, 7, 14, 56]
    values = np.array([[speed * size**power for speed in (1.0, 3.0, 2.0)] for size in sizes])
    assert growth["exponents"](sizes, values) == pytest.approx({"last": power, "all": power, "least": power}, abs=1e-9)


def test_only_what_grows_faster_in_every_round_is_worse(growth):
    def part(*last: float) -> dict:
        rows = [[{"seconds": seconds, "mib": 1, "mapped_mib": 1} for seconds in turns] for turns in ((1, 1), last)]
        return growth["summary"]([1, 2], rows)

    told = growth["as_text"]({"batch": {"square": part(4, 4), "noise": part(2, 5), "line": part(2, 2)}})
    worse = told.split("in every round:\n")[1]
    assert worse == "batch, square: time ~ size^2.00 between the last two, size^2.00 over all"


def test_it_prints_writes_and_draws_every_size_and_round(tmp_path):
    numbers, picture, home = tmp_path / "growth.json", tmp_path / "growth.png", tmp_path / "home"
    flags = ["--sweeps", "batch=2,4", "episodes=2,3", "--rounds", 2, "--json", numbers, "--plots", picture]
    command = [sys.executable, PROGRAM, *flags]
    environment = os.environ | {"HF_HOME": str(home), "HF_LEROBOT_HOME": str(home)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True, env=environment)
    told = json.loads(numbers.read_text())
    assert told["rounds"] == 2
    assert {sweep: list(parts) for sweep, parts in told["sweeps"].items()} == {
        "batch": ["training step"],
        "episodes": ["first opening", "later opening", "batch of windows"],
    }
    for sweep, sizes in {"batch": [2, 4], "episodes": [2, 3]}.items():
        for name, part in told["sweeps"][sweep].items():
            assert part["sizes"] == sizes and f"{sweep}, {name}" in done.stdout
            for measure in ("seconds", "mib", "mapped_mib"):
                assert np.shape(part[measure]) == (2, 2) and np.min(part[measure]) > 0
    parts = told["sweeps"]["episodes"]
    assert np.min(parts["first opening"]["seconds"]) > np.max(parts["later opening"]["seconds"])
    weights = 4.15e6 * 4 / 2**20
    assert np.min(told["sweeps"]["batch"]["training step"]["mib"]) > weights  # its gradients alone
    assert not list(home.rglob("*.npy")) and not list(home.rglob("*.arrow"))
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweeps", "weight"], "unknown sweep 'weight': expected one of horizon, action_dim, cameras, batch"),
        (["--sweeps", "batch=4,x"], "expected two or more rising sizes, as in batch=8,16, got 'batch=4,x'"),
        (["--sweeps", "batch=0,4"], "expected two or more rising sizes, as in batch=8,16, got 'batch=0,4'"),
        (["--sweeps", "cameras=2"], "expected two or more rising sizes, as in cameras=8,16, got 'cameras=2'"),
        (["--sweeps", "horizon=8,10"], "the U-Net halves a horizon twice: expected multiples of 4, got 'horizon=8,10'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--json", "nowhere/growth.json"], "--json must be a file in a folder that exists, got nowhere/growth.json"),
    ],
)
def test_wrong_arguments_are_refused_by_name(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["growth.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert words in capsys.readouterr().err
