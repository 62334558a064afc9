"""The exported folder of the shipped policy, as a robot without torch meets it."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fm_policy.assets import default_policy
from fm_policy.deploy.__main__ import main
from fm_policy.deploy.envelope import ConfigurationError
from fm_policy.deploy.export import export
from fm_policy.deploy.fuzz import fuzz
from fm_policy.deploy.runner import blank, load, read_settings

STRANGERS = ("torch", "lerobot", "fm_policy", "lerobot_policy_fm_ft", "onnx", "gymnasium", "safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The shipped policy at 2 network calls."""
    folder = tmp_path_factory.mktemp("exported") / "robot"
    main(["export", "--policy", str(default_policy()), "--out", str(folder), "--nfe", "2"])
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return Path(shutil.copytree(default_policy(), tmp_path / "checkpoint"))


def run(folder: Path, *arguments: str) -> str:
    """Run the folder's own runner where nothing of this package, nor torch, can be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({STRANGERS}))"
    code = f"{block}; sys.argv = ['runner.py', *{list(arguments)}]; import runner; runner.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What is written


def test_the_folder_holds_all_it_needs(exported):
    assert {file.name for file in exported.iterdir()} == {"policy.onnx", "settings.json", "runner.py", "envelope.py"}
    assert [*exported.parent.iterdir()] == [exported]


def test_it_describes_itself_without_torch(exported):
    told = run(exported, "--describe")
    for line in (
        "euler, 2 network calls, 0 of the head",
        "expects observation.environment_state: numbers (16,)",
        "promises actions ['x', 'y'] of 2 numbers",
        "limit deadline: 0.5",
    ):
        assert line in told


def test_it_measures_itself_without_torch(exported):
    told = run(exported, "--benchmark", "5")
    assert "5 chunks on one thread\n  wall: p50" in told
    assert "cold start" in told and "peak memory" in told


def test_it_measures_itself_where_a_chunk_takes_longer_than_the_deadline(copied):
    settings = json.loads((copied / "settings.json").read_text())
    settings["limits"]["deadline"] = 1e-6
    (copied / "settings.json").write_text(json.dumps(settings))
    assert "2 chunks on one thread\n  wall: p50" in run(copied, "--benchmark", "2")


def test_a_graph_that_is_cut_off_is_not_measured(copied):
    graph = copied / "policy.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    done = subprocess.run([sys.executable, "runner.py", "--benchmark", "2"], cwd=copied, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "runner.py: policy.onnx is not the graph that settings.json was written with\n"


@pytest.mark.parametrize("missing", ["format", "limits", "certificate", "noise_shape"])
def test_settings_that_lack_something_are_refused_by_name(copied, missing):
    settings = json.loads((copied / "settings.json").read_text())
    del settings[missing]
    (copied / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match=rf"copy is no whole exported policy: KeyError\('{missing}'\)"):
        read_settings(copied)


def test_the_range_of_the_data_limits_the_actions(exported):
    settings = json.loads((exported / "settings.json").read_text())
    low, high = settings["action"]["data_min"], settings["action"]["data_max"]
    assert (low, high) == ([1, 1], [511, 511])  # of the human demonstrations and their mirror images
    np.testing.assert_allclose(settings["limits"]["low"], [1 - 51, 1 - 51])
    np.testing.assert_allclose(settings["limits"]["high"], [511 + 51, 511 + 51])
    np.testing.assert_allclose(settings["limits"]["step"], [255, 255])


# What is refused


def test_a_folder_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="exists: choose another folder"):
        export(default_policy(), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_a_solver_without_a_grid(checkpoint, tmp_path):
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"solver": "dopri5"}))
    with pytest.raises(SystemExit, match="dopri5.* has no grid to export: .*--solver euler --nfe 16"):
        main(["export", "--policy", str(checkpoint), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def cut(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[:1000])


def spoil_weight(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["net.velocity.out.1.bias"][0] = torch.nan
    save_file(weights, checkpoint / "model.safetensors")


BROKEN = {
    "weights cut off": (lambda folder: cut(folder, "model.safetensors"), "model.safetensors is broken"),
    "configuration cut off": (lambda folder: cut(folder, "config.json"), "config.json is broken"),
    "processor cut off": (lambda folder: cut(folder, "policy_preprocessor.json"), "policy_preprocessor.json is broken"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
    "a weight is NaN": (spoil_weight, "1 weights hold NaN or infinity, velocity.out.1.bias among them"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(spoil, message, checkpoint, tmp_path):
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message) as refusal:
        export(checkpoint, tmp_path / "out")
    assert str(checkpoint) in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_export_is_refused(copied):
    (copied / "policy.onnx").write_bytes(b"another one")
    with pytest.raises(ConfigurationError, match=r"policy.onnx is not the graph that settings.json was written with"):
        load(copied)


@pytest.mark.parametrize("name", ["policy.onnx", "settings.json"])
def test_a_folder_that_is_not_whole_is_refused(name, copied):
    (copied / name).unlink()
    with pytest.raises(ConfigurationError, match="is no whole exported policy"):
        load(copied)


def test_a_limit_that_is_misspelt_is_refused(exported):
    with pytest.raises(ConfigurationError, match=r"unknown limits \['max_agee'\]"):
        load(exported, max_agee=1.0)


def test_a_robot_with_other_actions_is_refused(exported):
    assert load(exported, action_names=["x", "y"]).events == {}
    with pytest.raises(ConfigurationError, match=r"its actions are \['x', 'y'\], got \['y', 'x'\]"):
        load(exported, action_names=["y", "x"])


def test_limits_can_be_edited_and_overridden(copied):
    file = copied / "settings.json"
    settings = json.loads(file.read_text())
    settings["limits"] |= {"velocity": [100.0, 100.0], "fallback": "rest"}
    file.write_text(json.dumps(settings))
    limits = load(copied, fallback="zero").envelope.limits
    assert (limits.velocity, limits.fallback) == ([100.0, 100.0], "zero")


# What it does


def test_no_random_observation_drives_an_action_out_of_its_limits(exported, caplog):
    with caplog.at_level(logging.CRITICAL):
        result = fuzz(exported, 2000)
    assert result.violations == []
    assert result.actions > 1800
    wanted = {"misfit", "not_finite", "stale", "clock", "failed", "fallback", "clipped", "step_limited"}
    assert wanted <= set(result.events)


def test_it_acts_in_the_units_of_the_robot(exported):
    runner = load(exported)
    seen = {"observation.state": [250, 250], "observation.environment_state": np.full(16, 250.0)}
    action = runner.act(seen, timestamp=runner.envelope.clock())
    assert action.shape == (2,)
    assert ((action > 12) & (action < 511)).all()
    assert runner.act(blank(runner.settings)) is not None
