import json
import shutil

import pytest
import torch

from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.checkpoint import fingerprint, load_any_checkpoint, load_checkpoint


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(checkpoint.path, tmp_path / "copy")


def test_loads_policy_and_processors_in_evaluation_mode(checkpoint):
    assert not checkpoint.policy.training
    corner = torch.full((1, 2), 512.0)
    batch = {"observation.state": corner, "observation.environment_state": torch.zeros(1, 16)}
    assert checkpoint.preprocessor(batch)["observation.state"].tolist() == [[1.0, 1.0]]
    assert checkpoint.postprocessor(torch.zeros(1, 2)).tolist() == [[256.0, 256.0]]
    assert checkpoint.note == ""


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "policy_preprocessor.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"it lacks {name}"):
        load_checkpoint(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("pattern", ["config.json", "model.safetensors", "*preprocessor*.safetensors", "*post*.json"])
def test_a_file_that_was_cut_off_is_named(folder, pattern):
    (file,) = folder.glob(pattern)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{file.name} is broken, perhaps cut off when it was copied"):
        load_any_checkpoint(folder)


def test_the_folder_around_a_checkpoint_gets_a_hint(folder, tmp_path):
    folder.rename(tmp_path / "pretrained_model")
    with pytest.raises(ValueError, match="did you mean .*pretrained_model"):
        load_checkpoint(tmp_path)


def test_a_policy_of_another_type_is_named(folder):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"type": "diffusion"}))
    with pytest.raises(ValueError, match="type 'diffusion', expected 'fm_ft'"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match=r"type 'diffusion', expected one of \['dp_ema', 'fm_ft'\]"):
        load_any_checkpoint(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(checkpoint):
    with pytest.raises(ValueError, match="'cuda' but CUDA is not available"):
        load_checkpoint(checkpoint.path, device="cuda")


def test_fingerprint_sees_weights_configuration_and_processors_and_nothing_else(checkpoint, folder):
    before = fingerprint(folder)
    assert before == checkpoint.fingerprint
    (folder / "README.md").write_text("about")
    (folder / "train_config.json").write_text("{}")
    assert fingerprint(folder) == before
    seen = ["config.json", *(path.name for path in folder.glob("policy_*")), "model.safetensors"]
    assert len(seen) == 6
    for name in seen:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert fingerprint(folder) != before, name
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("solver", "nfe", "steps"),
    [(None, None, 16), (None, 4, 4), ("heun", None, 8), ("heun", 4, 2), ("rk4", 16, 4), ("midpoint", 2, 1)],
)
def test_nfe_is_network_calls_whatever_the_solver(solver, nfe, steps):
    config = FlowMatchingConfig(device="cpu", solver="euler", num_solver_steps=16)
    config.set_solver(solver, nfe)
    assert (config.solver, config.num_solver_steps) == (solver or "euler", steps)
    assert config.nfe == (nfe or 16)


@pytest.mark.parametrize(
    ("solver", "nfe", "message"),
    [
        ("heun", 5, "heun calls the network 2 times per step.* got 5"),
        ("rk4", 2, "rk4 calls the network 4 times per step.* got 2"),
        (None, 0, "must be a positive multiple, got 0"),
        ("dopri5", 8, "NFE 8 cannot be set"),
        ("magic", None, "unknown solver 'magic'.*'euler'"),
    ],
)
def test_solvers_that_cannot_be_had_are_refused(solver, nfe, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchingConfig(device="cpu").set_solver(solver, nfe)


def test_an_adaptive_checkpoint_needs_an_nfe_for_a_fixed_solver():
    with pytest.raises(ValueError, match="must be a positive multiple, got None"):
        FlowMatchingConfig(device="cpu", solver="dopri5").set_solver("euler", None)


def test_another_nfe_than_the_checkpoints_is_said(checkpoint):
    changed = load_checkpoint(checkpoint.path, nfe=8)
    assert changed.note == "evaluating with euler at NFE 8; the checkpoint's own is euler at NFE 2"
    batch = {"observation.state": torch.zeros(1, 2), "observation.environment_state": torch.zeros(1, 16)}
    changed.policy.predict_action_chunk(batch)
    assert changed.policy.nfe == 8


def test_another_scale_of_noise_than_the_checkpoints_is_said(checkpoint):
    changed = load_checkpoint(checkpoint.path, noise_scale=0.75)
    note = "evaluating with euler at NFE 2 from noise of 0.75; the checkpoint's own is euler at NFE 2"
    assert (changed.note, changed.policy.config.noise_scale) == (note, 0.75)
    with pytest.raises(ValueError, match="noise_scale must be finite and 0 or more, got -1"):
        load_checkpoint(checkpoint.path, noise_scale=-1.0)


def test_the_calls_of_a_head_are_said_beside_the_nets(make_checkpoint):
    path = make_checkpoint(stage="residual", head="unet", head_steps=3).path
    note = "evaluating with heun at NFE 4 + 3; the checkpoint was fine-tuned through euler at NFE 2 + 3"
    assert load_checkpoint(path, solver="heun", nfe=4).note == note
