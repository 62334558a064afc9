"""Flow-matching robot policies for LeRobot.

Importing the package imports nothing else: `fm_policy.flow` and `fm_policy.velocity` need torch alone.
"""
