"""The shipped policy with a robot's motors, and LeRobot's rollout of it on the simulated robot."""

import socket
import sys
import threading
from pathlib import Path

import pytest
from lerobot.configs.policies import PreTrainedConfig
from lerobot.rollout import RolloutConfig, build_rollout_context, create_strategy

from env_configs import FmSimConfig
from fm_policy.assets import default_policy
from fm_policy.deploy.as_motors import as_motors


@pytest.fixture(scope="session")
def motors_policy(tmp_path_factory) -> Path:
    """The shipped policy's checkpoint, with 18 motors."""
    folder = tmp_path_factory.mktemp("policy") / "motors"
    as_motors(default_policy(), folder)
    return folder


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def rollout(motors_policy, tmp_path, monkeypatch):
    """Runs what `lerobot-rollout` runs, and returns its context and robot."""
    monkeypatch.setattr(sys, "argv", ["lerobot-rollout"])

    def run(
        seconds: float,
        robot: dict | None = None,
        policy: dict | None = None,
        changes=None,
        checkpoint: Path = motors_policy,
        **fields,
    ):
        config = PreTrainedConfig.from_pretrained(checkpoint)
        config.pretrained_path = checkpoint
        config.num_solver_steps = 2
        for name, value in (policy or {}).items():
            setattr(config, name, value)
        fm_sim = FmSimConfig(calibration_dir=tmp_path / "calibration", **(robot or {}))
        settings = {"fps": 10.0, "task": "push", "return_to_initial_position": False, "play_sounds": False}
        cfg = RolloutConfig(robot=fm_sim, policy=config, duration=seconds, **settings | fields)
        context = build_rollout_context(cfg, threading.Event())
        if changes:
            changes(context)
        strategy = create_strategy(cfg.strategy)
        try:
            strategy.setup(context)
            strategy.run(context)
        finally:
            strategy.teardown(context)
        return context, context.hardware.robot_wrapper.inner

    return run
