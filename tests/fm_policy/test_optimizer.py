"""The fused optimiser: LeRobot's steps, LeRobot's files."""

import draccus
import torch
from lerobot.optim.optimizers import AdamWConfig, OptimizerConfig, load_optimizer_state, save_optimizer_state

from fm_policy.optimizer import FusedAdamWConfig

SETTINGS = {"lr": 1e-2, "betas": (0.95, 0.999), "weight_decay": 0.1}


def trained(config: OptimizerConfig, steps: int, folder=None) -> torch.Tensor:
    """Weights after some steps down a fixed bowl, all in one go or over a checkpoint halfway."""
    torch.manual_seed(0)
    weights, aim = torch.nn.Parameter(torch.randn(40, 30)), torch.randn(40, 30)
    optimizer = config.build([weights])
    for step in range(steps):
        if folder is not None and step == steps // 2:
            save_optimizer_state(optimizer, folder)
            optimizer = load_optimizer_state(config.build([weights]), folder)
        optimizer.zero_grad()
        (weights - aim).square().sum().backward()
        optimizer.step()
    return weights.detach()


def test_steps_are_those_of_lerobots_adamw_to_rounding():
    ours, theirs = trained(FusedAdamWConfig(**SETTINGS), 50), trained(AdamWConfig(**SETTINGS), 50)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_goes_on_from_lerobots_checkpoint_to_the_bit(tmp_path):
    config = FusedAdamWConfig(**SETTINGS)
    assert torch.equal(trained(config, 20, tmp_path), trained(config, 20))


def test_lerobot_finds_it_by_its_name():
    config = FusedAdamWConfig(**SETTINGS)
    assert draccus.decode(OptimizerConfig, draccus.encode(config, OptimizerConfig)) == config
