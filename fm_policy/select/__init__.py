"""The choice among the saved checkpoints of a training run: `python -m fm_policy.select DIR`."""
