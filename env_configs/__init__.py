"""The tasks: simulated environments and a simulated robot for LeRobot, and the demonstrations for them.

Importing this package registers the types with LeRobot and gymnasium; no simulator is imported before an environment
is built.
"""

import gymnasium

from env_configs.fm_sim import FmSimConfig
from env_configs.kitchen import FmKitchenEnv
from env_configs.presets import PRESETS, make_env_config, parse_options
from env_configs.pusht import FmPushtEnv
from env_configs.robosuite_tasks import CONFIGS, FmHandoverEnv, FmLiftEnv, FmTransportEnv

__all__ = [
    "PRESETS",
    "FmHandoverEnv",
    "FmKitchenEnv",
    "FmLiftEnv",
    "FmPushtEnv",
    "FmSimConfig",
    "FmTransportEnv",
    "make_env_config",
    "parse_options",
]

gymnasium.register(id=FmKitchenEnv.GYM_ID, entry_point="env_configs.kitchen:Kitchen")
gymnasium.register(id=FmPushtEnv.GYM_ID, entry_point="env_configs.pusht:PushT")
for config in CONFIGS:
    gymnasium.register(
        id=config().gym_id,
        entry_point="env_configs.robosuite_tasks:RobosuiteTask",
        kwargs={"name": config.NAME},
    )
