"""Randomness that a resumed training repeats."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def repeatable(key: Sequence[int], device: torch.device) -> Iterator[None]:
    """Make what is drawn inside (noise, times, crops, dropout) a function of the key and the process's rank alone.

    LeRobot restores torch's generator when it resumes, but its loader draws from it once more than the unbroken run
    did: keyed by seed and step, a resumed training repeats that run to the bit. The generators outside go on as if
    nothing had been drawn.

    Args:
        key: Non-negative numbers, e.g. seed and step.
        device: Where the draws happen, besides the CPU.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    seed = np.random.SeedSequence([*key, rank]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed[0]))
        yield
