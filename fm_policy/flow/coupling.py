"""Which noise is paired with which data: the coupling q(x0, x1 | o).

Flow matching needs the independent coupling: inference draws its noise whatever it observes. For the reconstruction
loss, eq. (6), the pairs decide what is learned, since its minimiser over all maps is E[x1 | x0, o].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fm_policy.flow.losses import masked_mse
from fm_policy.flow.noise import sample_noise
from fm_policy.flow.solvers import Velocity, integrate

COUPLINGS = {
    "independent": "noise without regard to the data: the reconstruction drifts towards E[x1 | o], the modes' average",
    "nearest": "of several noises the one whose chunk comes nearest to the data: each mode keeps its noises",
    "inverse": "the data carried back to noise by the frozen base: pairs that the base itself made",
    "reflow": "noise and the chunk that the frozen base makes of it in many steps, which fewer steps learn to make",
}

TAUGHT = ("inverse", "reflow")
"""Couplings whose pairs a base makes."""

REFUSED = {
    "ot": "mini-batch optimal transport pairs noise and data without regard to the observation, so that training sees "
    "another noise under each observation than the N(0, I) which inference draws (Cheng & Schwing 2025, C2OT). On "
    "Push-T it takes the score from .92 to .15 while the training loss looks better",
}

# Two calls each: 32 calls, so that the error of the pair is that of the deployed grid and not of the way back.
INVERSE_SOLVER, INVERSE_STEPS = "midpoint", 16


def independent(x1: Tensor, generator: torch.Generator | None = None, *, scale: float = 1.0) -> Tensor:
    """Noise drawn without regard to the data: q(x0, x1 | o) = N(x0; 0, scale^2 I) p(x1 | o).

    The only coupling under which training sees, for every observation, the noise that inference draws:
    mini-batch optimal transport ignores the condition and skews it (Cheng & Schwing 2025, C2OT).

    Args:
        x1: Data, `(B, horizon, action_dim)`; the noise takes its shape, type and device.
        generator: Source of randomness; torch's global one when None.
        scale: Its standard deviation: 1 for flow matching; for a map that is trained as it runs, the robot's.
    """
    return scale * sample_noise(x1.shape, generator, device=x1.device, dtype=x1.dtype)


@torch.no_grad()
def minibatch_ot(x0: Tensor, x1: Tensor) -> Tensor:
    """The noise of a batch, handed out anew so that the sum of |x0 - x1|^2 is least (OT-CFM, Tong et al. 2024).

    Right only where nothing is observed. There, any handing out leaves the noise as a whole N(0, I); under an
    observation it does not, so policies are refused it (`REFUSED`). The data stay where they are, and every noise is
    used once: whatever belongs to a row of the data still does.

    Args:
        x0: Noise, `(B, ...)`.
        x1: Data, the same shape.

    Returns:
        The rows of x0 in another order, row i for row i of the data.

    Raises:
        ValueError: If the shapes differ, or a number is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if x0.shape != x1.shape:
        raise ValueError(f"noise {tuple(x0.shape)} and data {tuple(x1.shape)} must have one shape to be paired")
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square()
    if not cost.isfinite().all():
        raise ValueError("noise and data must be finite to be paired")
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return x0[torch.from_numpy(order).to(x0.device)]


@torch.no_grad()
def nearest(
    x1: Tensor,
    k: int,
    solve: Callable[[Tensor], Tensor],
    is_pad: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Of k noises per row, the one whose chunk comes nearest to the data (as in IMLE, Li & Malik 2018).

    x0 = argmin_j |phi(x0_j, o) - x1|^2. Each mode of the data keeps the noises that lead there, so that the
    reconstruction loss does not average over modes. The price: the noises of training are a selection.

    Args:
        x1: Data, `(B, horizon, action_dim)`.
        k: Noises per row, at least 1.
        solve: The map phi from noise to chunk, `(k B, horizon, action_dim)` in one batch; row j B + i of it
            belongs to row i of the data. No gradient is kept.
        is_pad: True where a time step lies beyond its episode, `(B, horizon)`.
        generator: Source of randomness; torch's global one when None.
        scale: Standard deviation of the noises.
    """
    if k < 1:
        raise ValueError(f"nearest needs at least 1 noise per row, got k={k}")
    repeated, mask = x1.repeat(k, 1, 1), None if is_pad is None else is_pad.repeat(k, 1)
    noises = independent(repeated, generator, scale=scale)
    errors = masked_mse(solve(noises), repeated, mask, "none").view(k, len(x1))
    rows = torch.arange(len(x1), device=x1.device)
    return noises.view(k, *x1.shape)[errors.argmin(dim=0), rows]


@torch.no_grad()
def inverse(x1: Tensor, velocity: Velocity) -> Tensor:
    """Carry the data back from t = 1 to t = 0 along a frozen velocity, finely: the noise that the base maps to it.

    Args:
        x1: Data, `(B, horizon, action_dim)`; padding repeats the last action and is carried along.
        velocity: The base's v(t, x), for the observations of these rows.
    """
    return integrate(velocity, x1, INVERSE_SOLVER, INVERSE_STEPS, start=1.0, end=0.0)


@torch.no_grad()
def reflow(
    x1: Tensor, velocity: Velocity, steps: int, generator: torch.Generator | None = None, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Noise and its end under a frozen velocity: the pairs that distil a rectified flow (Liu et al. 2022).

    The end is a function of noise and observation, so that a map of fewer solver steps can learn it without averaging
    over modes; it is what the base does, not what was demonstrated.

    Args:
        x1: Data, `(B, horizon, action_dim)`, for its shape, type and device alone.
        velocity: The base's v(t, x), for the observations of these rows.
        steps: Euler steps of the base, at least 1.
        generator: Source of randomness; torch's global one when None.
        scale: Standard deviation of the noise.

    Returns:
        Noise and ends, both of the data's shape.
    """
    x0 = independent(x1, generator, scale=scale)
    return x0, integrate(velocity, x0, "euler", steps)
