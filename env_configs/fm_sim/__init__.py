"""A LeRobot robot that is a simulator in real time: a deployment rehearsed without hardware.

Importing this registers the type `fm_sim` with LeRobot; the robot itself and its simulator come when one is made.
"""

from env_configs.fm_sim.config_fm_sim import FmSimConfig

__all__ = ["FmSimConfig"]
