"""Randomness that a resumed training repeats."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

HELD_OUT_KEY = (0, 0)


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


def of_step(training: bool, steps: Tensor) -> AbstractContextManager[None]:
    """Randomness by `--seed` and step in training; otherwise one draw for ever, so that weights are compared.

    Args:
        training: Whether the policy is in training mode.
        steps: Its counter of training steps, a buffer `()`; in training mode it is moved on.
    """
    if not training:
        return repeatable(HELD_OUT_KEY, steps.device)
    steps += 1
    # The seed that torch was last seeded with is LeRobot's `--seed`.
    return repeatable((torch.initial_seed(), int(steps)), steps.device)
