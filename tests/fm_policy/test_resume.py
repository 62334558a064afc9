"""A training that is killed and resumed repeats the unbroken one to the bit."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from safetensors.torch import load_file

from fm_policy import cli

STEPS = ["--steps=24", "--save_freq=8", "--batch_size=8", "--log_freq=8", "--eval_steps=0", "--env_eval_freq=0"]


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Random states and actions of Push-T's shapes."""
    root = tmp_path_factory.mktemp("demonstrations") / "noise"
    shapes = {"observation.state": 2, "observation.environment_state": 16, "action": 2}
    features = {name: {"dtype": "float32", "shape": (size,), "names": None} for name, size in shapes.items()}
    dataset = LeRobotDataset.create("local/noise", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(30):
        for _ in range(20):
            frame = {name: rng.uniform(0, 512, size).astype(np.float32) for name, size in shapes.items()}
            dataset.add_frame(frame | {"task": "push"})
        dataset.save_episode()
    dataset.finalize()
    return root


def words(demonstrations: Path, run: Path) -> list[str]:
    where = [f"--dataset.root={demonstrations}", f"--output_dir={run}", "--policy.device=cpu"]
    # Dropout, noise and times all draw random numbers.
    return ["train", "policy=fm_ft", "env=pusht", "net=transformer", *STEPS, *where]


def kill_after_the_first_checkpoint(command: list[str], last: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "fm_policy.cli", *command], stderr=subprocess.DEVNULL, env=environment
    )
    while not last.exists():
        assert process.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_killed_and_resumed_training_is_the_unbroken_one(demonstrations, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cli.main(words(demonstrations, whole))
    last = broken / "checkpoints" / "last"
    kill_after_the_first_checkpoint(words(demonstrations, broken), last)
    assert last.resolve().name != "000024"
    cli.main(["train", f"--config_path={last / 'pretrained_model' / 'train_config.json'}", "--resume=true"])
    file = Path("checkpoints", "000024", "pretrained_model", "model.safetensors")
    expected, resumed = load_file(whole / file), load_file(broken / file)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], weights) for name, weights in expected.items())
