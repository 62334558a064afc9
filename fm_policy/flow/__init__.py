"""The method: path, coupling, solvers and losses as pure functions on tensors.

Knows torch only: no robot, no LeRobot. Time runs from 0 (noise) to 1 (data).
"""
