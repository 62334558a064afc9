"""The door that LeRobot knocks on: importing this registers policies, tasks and a simulated robot, nothing heavy."""

from env_configs import FmHandoverEnv, FmKitchenEnv, FmLiftEnv, FmPushtEnv, FmSimConfig, FmTransportEnv
from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from lerobot_policy_fm_ft.refusals import tell_refusals

__all__ = ["DiffusionEmaConfig", "FlowMatchingConfig"]

TASKS = (FmHandoverEnv, FmKitchenEnv, FmLiftEnv, FmPushtEnv, FmTransportEnv)

for config in (DiffusionEmaConfig, FlowMatchingConfig, FmSimConfig, *TASKS):
    tell_refusals(config)
