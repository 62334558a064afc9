"""The same weights with other names do the same."""

import json
import shutil

import pytest
import torch

from fm_policy.assets import default_policy
from fm_policy.deploy.as_motors import as_motors, main
from fm_policy.evaluation.checkpoint import load_checkpoint


def test_it_acts_as_before(motors_policy):
    before, after = load_checkpoint(default_policy()), load_checkpoint(motors_policy)
    numbers = torch.rand(18, generator=torch.Generator().manual_seed(0)) * 512
    split = {"observation.state": numbers[:2], "observation.environment_state": numbers[2:]}
    actions = [
        checkpoint.postprocessor(
            checkpoint.policy.select_action(checkpoint.preprocessor(observation), torch.ones(1, 16, 2))
        )
        for checkpoint, observation in ((before, split), (after, {"observation.state": numbers}))
    ]
    assert torch.equal(*actions)


def test_it_has_a_robots_names(motors_policy):
    config = json.loads((motors_policy / "config.json").read_text())
    assert config["input_features"] == {"observation.state": {"type": "STATE", "shape": [18]}}
    assert config["action_feature_names"] == ["x.pos", "y.pos"]


def test_numbers_in_another_order_are_refused(tmp_path):
    """Under one name the robot's come first, and the weights would meet the objects' in their place."""
    folder = tmp_path / "policy"
    shutil.copytree(default_policy(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["input_features"] = dict(reversed(config["input_features"].items()))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="puts 'observation.environment_state' before 'observation.state'"):
        as_motors(folder, tmp_path / "out")


def test_what_cannot_be_done_is_refused(motors_policy, tmp_path, capsys):
    with pytest.raises(FileExistsError, match="name a new folder"):
        as_motors(default_policy(), motors_policy)
    assert main(["--policy", str(motors_policy), "--out", str(tmp_path / "twice")]) == 1
    assert "must observe 'observation.state' and 'observation.environment_state'" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()
