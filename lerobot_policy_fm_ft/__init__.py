"""The door that LeRobot knocks on: importing this registers policies, tasks and a simulated robot, nothing heavy."""

import env_configs  # noqa: F401
from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.configuration_fm_ft import FlowMatchingConfig

__all__ = ["DiffusionEmaConfig", "FlowMatchingConfig"]
