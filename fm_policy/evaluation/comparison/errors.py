"""How far the chunks of a table's policies lie from the demonstrations, beside how often they succeed."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fm_policy.evaluation.checkpoint import Checkpoint
from fm_policy.evaluation.held_out_windows import HeldOutWindows
from fm_policy.evaluation.policies import ChunkPolicy
from fm_policy.evaluation.statistics import Interval, mean_interval
from fm_policy.files import write_json
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.window_store import fingerprint

WINDOWS, DRAWS, SEED = 512, 4, 20000


def held_out_error(
    checkpoint: Checkpoint[ChunkPolicy], demonstrations: Path, record: Path
) -> tuple[float, Interval | None] | None:
    """The reconstruction error on held-out episodes of a data set, at the solver that the policy is set to.

    Mean squared error in normalised actions, of independent pairs of noise and data, over `WINDOWS` windows of the last
    5 % of the episodes with `DRAWS` noises each.

    Args:
        checkpoint: The policy; None is returned for one that is no flow.
        demonstrations: Folder of the data set.
        record: File that keeps the answer; what it holds of these demonstrations is not measured again. It stands in
            the folder of an evaluation, which is one checkpoint's at one solver.

    Returns:
        The mean, and its 95 % interval over the episodes; that is None where there is but one.
    """
    if not isinstance(checkpoint.policy, FlowMatchingPolicy):
        return None
    told = {"demonstrations": fingerprint(demonstrations), "windows": WINDOWS, "draws": DRAWS, "seed": SEED}
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if found.get("of") != told:
        errors = _errors(checkpoint, demonstrations)
        found = {"of": told, "error": float(errors.mean()), "interval": mean_interval(errors)}
        write_json(record, found)
    interval = found["interval"]
    return found["error"], interval and (interval[0], interval[1])


def _errors(checkpoint: Checkpoint[FlowMatchingPolicy], demonstrations: Path) -> np.ndarray:
    config = checkpoint.policy.config
    return HeldOutWindows.of_dataset(demonstrations, config, WINDOWS, DRAWS, SEED).errors(checkpoint)
