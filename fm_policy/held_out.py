"""What the policy does on data that it does not learn from: measured in evaluation mode, logged while training."""

from statistics import fmean

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.flow.coupling import independent
from fm_policy.flow.diagnostics import mode_changes, spread
from fm_policy.flow.losses import masked_mse
from fm_policy.net import FlowMatchingNet
from fm_policy.residual.control_synth import ControlSynth
from fm_policy.residual.stability import balanced_multipliers, contraction_rate

# Spread and changes of mode: as many solves as a batch of 128, of enough noises to tell two modes.
SPREAD_NOISES, SPREAD_ROWS = 8, 16


@torch.no_grad()
def measure(
    config: FlowMatchingConfig,
    net: FlowMatchingNet,
    base: FlowMatchingNet | None,
    batch: dict[str, Tensor],
    o: Tensor,
) -> dict[str, float]:
    """Numbers of one held-out batch.

    Args:
        config: The policy's, which names the grid.
        net: The net to measure.
        base: The one that it was trained from, if it is at hand.
        batch: Preprocessed windows.
        o: Their features by `net`, `(B, obs_dim)`.

    Returns:
        `reconstruction_error` on independent pairs, `spread` of the chunks of one observation, and, where the base is
        at hand, `mode_changes`, the share of chunks that go to another mode than the base's from the same noise; the
        latter two of `SPREAD_NOISES` noises for the first `SPREAD_ROWS` rows; all from noise of the robot's scale. Of a
        ControlSynth head `certified_rate`, the rate of contraction that balanced multipliers prove; negative: none.
    """
    x1, is_pad, scale = batch[ACTION], batch.get(f"{ACTION}_is_pad"), config.noise_scale
    chunk = net.chunk(config, independent(x1, scale=scale), o)
    logs = {"reconstruction_error": masked_mse(chunk, x1, is_pad).item()}
    x0 = independent(x1[:SPREAD_ROWS].repeat(SPREAD_NOISES, 1, 1), scale=scale)
    shape = (SPREAD_NOISES, -1, *x1.shape[1:])
    samples = net.chunk(config, x0, o[:SPREAD_ROWS].repeat(SPREAD_NOISES, 1)).view(shape)
    logs["spread"] = spread(samples).mean().item()
    if base is not None:
        rows = {name: value[:SPREAD_ROWS] for name, value in batch.items() if isinstance(value, Tensor)}
        before = base.chunk(config, x0, base.encoder(rows).repeat(SPREAD_NOISES, 1)).view(shape)
        logs["mode_changes"] = mode_changes(before, samples).float().mean().item()
    if isinstance(net.head, ControlSynth):
        matrices = net.head.matrices()
        logs["certified_rate"] = contraction_rate(matrices, balanced_multipliers(matrices)).item()
    return logs


class HeldOutMeans:
    """Collects the numbers of an evaluation's batches, which LeRobot discards, for the training steps that follow."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._means: dict[str, float] = {}

    def add(self, row: dict[str, float]) -> None:
        """Count a batch in."""
        self._rows.append(row)

    def logs(self) -> dict[str, float]:
        """Means of the last evaluation, until the next one: LeRobot's meters show a 0 for what is missing."""
        if self._rows:
            rows, self._rows = self._rows, []
            self._means = {f"held_out_{name}": fmean(row[name] for row in rows) for name in rows[0]}
        return self._means
