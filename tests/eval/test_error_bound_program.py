"""`eval/error_bound.py` on the shipped policy and demonstrations: what it measures, writes and refuses."""

import json
import math
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from statistics import fmean

import pytest
from lerobot.utils.constants import ACTION
from PIL import Image

from fm_policy.assets import default_demos, pretrained_policy
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.flow.losses import masked_mse
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

FILE = str(Path(__file__).resolve().parents[2] / "eval" / "error_bound.py")
PROGRAM = runpy.run_path(FILE)
SMALL = ("--samples", 2, "--times", 4, "--tolerance", 1e-2)


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [FILE, *map(str, arguments)])
        runpy.run_path(FILE, run_name="__main__")


@pytest.fixture(scope="module")
def headed(tmp_path_factory) -> Path:
    """The shipped policy at 2 steps with a new constructed head behind it."""
    folder = tmp_path_factory.mktemp("runs") / "third" / "checkpoints" / "last" / "pretrained_model"
    shipped = load_checkpoint(pretrained_policy())
    config = shipped.policy.config
    config.stage, config.head, config.num_solver_steps = "residual", "control_synth", 2
    policy = FlowMatchingPolicy(config)
    policy.net.load_state_dict(shipped.policy.net.state_dict(), strict=False)
    for part in (policy, shipped.preprocessor, shipped.postprocessor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    """What the program writes on the shipped policy with a fine reference."""
    out = tmp_path_factory.mktemp("fine") / "new"
    run("--policy", pretrained_policy(), *SMALL, "--reference-steps", 128, "--steps", 64, 128, "--out", out)
    return out


@pytest.fixture(scope="module")
def two(headed, tmp_path_factory) -> Path:
    """What it writes on two policies."""
    out = tmp_path_factory.mktemp("two")
    arguments = (*SMALL, "--draws", 2, "--reference-steps", 8, "--steps", 2, 1)
    run("--policy", headed, pretrained_policy(), *arguments, "--out", out)
    return out


def records(out: Path) -> list[dict]:
    return json.loads((out / "error_bound.json").read_text())["policies"]


def test_the_solver_error_falls_at_first_order_and_the_bounds_hold(fine):
    (record,) = records(fine)
    rows = {row["n"]: row for row in record["steps"]}
    assert list(rows) == [64, 128]
    assert record["reference_error"]["median"] < rows[128]["error"]["median"] / 3
    assert rows[64]["error"]["median"] / rows[128]["error"]["median"] == pytest.approx(2, abs=0.4)
    for row in rows.values():
        assert row["bound_5_held"] == 1.0
        assert "recursion" not in row  # 4 times do not tell L at the start of 64 steps


def test_the_field_carries_to_a_point_in_every_direction(fine):
    """Where the data of an observation are nearly one point, J = -1 / (1 - t) but for their spread."""
    (record,) = records(fine)
    for row, lipschitz in zip(record["spectrum"]["rows"][:4], record["lipschitz"]["median"], strict=False):
        assert row["least"] == pytest.approx(-1 / (1 - row["t"]), rel=0.1)
        assert lipschitz == pytest.approx(-row["least"], rel=0.1)
        assert row["logarithmic_norm"] < 0
    assert -1e-5 < record["spectrum"]["shortfall"] < 0.1
    assert 0 < record["straightness"] < 0.1


def test_the_steps_own_l_and_m_make_a_smaller_bound(two):
    for record in records(two):
        assert [row["n"] for row in record["steps"]] == [1, 2]
        for row in record["steps"]:
            assert row["recursion_held"] == row["bound_5_held"] == 1.0
        one, other = record["steps"]
        assert one["recursion"]["median"] == pytest.approx(one["bound_5"]["median"], rel=1e-5)
        assert other["recursion"]["median"] < other["bound_5"]["median"] / 10


def test_a_head_is_measured_and_stands_in_the_reconstruction_error(two, headed):
    record, plain = records(two)
    assert "head" not in plain
    assert (record["label"], plain["label"]) == ("third", "pusht_state")
    assert record["deployed"] == {"solver": "euler", "num_solver_steps": 2, "head_steps": 4}
    config = load_checkpoint(headed).policy.config
    assert record["head"]["factor"]["max"] < math.exp(-config.head_rate * config.head_span)
    assert record["head"]["lipschitz"]["max"] >= config.head_rate
    for row, other in zip(record["steps"], plain["steps"], strict=True):
        assert row["error"] == other["error"]  # the solver error is that of the flow, which is the same
        assert row["reconstruction"] != other["reconstruction"]


def test_the_reconstruction_error_is_that_of_the_deployed_map(two, headed):
    checkpoint = load_checkpoint(headed)
    args = Namespace(root=default_demos(), eval_split=0.05, samples=2, draws=2, seed=0)
    batch, noises = PROGRAM["held_out_windows"](checkpoint, args)
    chunks = [checkpoint.policy.reconstruct(batch, noise) for noise in noises]
    expected = fmean(masked_mse(chunk, batch[ACTION], batch[f"{ACTION}_is_pad"]).item() for chunk in chunks)
    row = next(row for row in records(two)[0]["steps"] if row["n"] == 2)
    assert row["reconstruction"] == pytest.approx(expected, rel=1e-5)


def test_table_and_picture(two):
    headed, plain = map(PROGRAM["as_table"], records(two))
    assert headed.startswith("third: stage residual, deployed with euler, 2 steps, then 4 of the head")
    assert [line.split()[0] for line in headed.splitlines() if line.endswith("<- deployed")] == ["2"]
    assert "factor |dy/dx| of the head" in headed and "head" not in plain
    assert "<- deployed" not in plain  # at 16 steps, which were not asked for
    with Image.open(two / "error_bound.png") as image:
        assert image.size == (1600, 500)
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50  # not blank


def test_the_order_is_that_of_the_fall():
    rows = [{"n": n, "error": {"median": 5 / n**2}} for n in (2, 6)]
    assert PROGRAM["order"](*rows) == "2.00" and PROGRAM["order"](None, rows[0]) == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--policy", default_demos()), "is no whole checkpoint, it lacks config.json"),
        (("--policy", pretrained_policy(), "--root", pretrained_policy()), "no LeRobotDataset: "),
        (("--policy", pretrained_policy(), "--samples", 0), "samples must be at least 1, got 0"),
        (
            ("--policy", pretrained_policy(), "--label", "a", "b"),
            "--label needs 1 different names that folders can have",
        ),
    ],
)
def test_refuses_by_name(arguments, complaint, tmp_path):
    with pytest.raises(SystemExit, match=complaint):
        run(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--steps", 0, 4), "--steps must be at least 1, got 0"),
        (("--times", 24), "--reference-steps must be a multiple of --times"),
    ],
)
def test_refuses_wrong_arguments(arguments, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--policy", pretrained_policy(), *arguments, "--out", tmp_path)
    assert complaint in capsys.readouterr().err
