"""The tasks: simulated environments for LeRobot and the demonstrations for them.

Importing this package registers the environment types with LeRobot and gymnasium; no simulator is imported
before an environment is built.
"""

import gymnasium

from env_configs.presets import PRESETS, make_env_config
from env_configs.pusht import FmPushtEnv

__all__ = ["PRESETS", "FmPushtEnv", "make_env_config"]

gymnasium.register(id=FmPushtEnv.GYM_ID, entry_point="env_configs.pusht:PushT")
