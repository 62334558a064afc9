"""Scripted experts: each acts through its task's own environment and may read the simulator."""
