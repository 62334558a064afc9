"""`eval/training_speed.py`: that the contenders share data, batch and shape, and that the trainer's count is read."""

import json
import runpy
import sys
from pathlib import Path

import draccus
import pytest
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

from fm_policy.assets import default_demos, default_policy
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "training_speed.py")


@pytest.fixture(scope="module")
def speed():
    """The program's functions."""
    return runpy.run_path(PROGRAM)


def test_contenders_share_the_data_and_the_size_of_the_net(speed):
    flags = speed["contenders"]("state", default_demos(), [0, 2])
    assert list(flags) == ["fm_ft", "fm_ft, LeRobot's loader", "diffusion, 0 workers", "diffusion, 2 workers"]
    assert all(f"--dataset.root={default_demos()}" in words for words in flags.values())
    words = [word.replace("--policy.", "--") for word in flags["diffusion, 0 workers"] if word.startswith("--policy.")]
    peer = draccus.parse(DiffusionConfig, args=[word for word in words if word != "--type=diffusion"])
    ours = FlowMatchingPolicy.from_pretrained(default_policy())
    peer.input_features, peer.output_features = ours.config.input_features, ours.config.output_features
    size, peer_size = (sum(p.numel() for p in policy.parameters()) for policy in (ours, DiffusionPolicy(peer)))
    assert peer_size == pytest.approx(size, rel=0.15)


def test_a_bare_loop_and_the_trainer_tell_their_rate(speed):
    assert speed["bare"]("state", 4, 2) > 0
    assert speed["trained"](speed["contenders"]("state", default_demos(), [])["fm_ft"], 4, 2) > 0


def test_a_trainer_that_fails_is_shown_with_its_message(speed):
    with pytest.raises(RuntimeError, match=r"(?s)lerobot-train --policy.type=nothing ended with \d.*nothing"):
        speed["trained"](["--policy.type=nothing"], 4, 2)


def test_too_few_steps_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--steps", "2"])
    with pytest.raises(SystemExit):
        runpy.run_path(PROGRAM, run_name="__main__")
    assert "--steps must be at least 4, got 2" in capsys.readouterr().err


def test_pixels_need_a_data_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--obs", "image"])
    with pytest.raises(SystemExit):
        runpy.run_path(PROGRAM, run_name="__main__")
    assert "--obs image needs --root" in capsys.readouterr().err


def test_contenders_see_the_same_pixels(speed, tmp_path):
    flags = speed["contenders"]("image", tmp_path, [0])
    words = [word.replace("--policy.", "--") for word in flags["diffusion, 0 workers"] if word.startswith("--policy.")]
    peer = draccus.parse(DiffusionConfig, args=[word for word in words if word != "--type=diffusion"])
    settings = json.loads(speed["recipe"]("image").read_text())["policy"]
    assert [*peer.crop_shape] == settings["crop_shape"]
    assert (peer.n_obs_steps, peer.use_group_norm, peer.pretrained_backbone_weights) == (1, True, None)
