"""How far the deployed sample can lie from the true flow's: Theorem 1 of arXiv 2510.02081, eqs. (4) and (5).

The true flow solves dψ/dt = u(t, ψ); the policy takes N Euler steps along the learned field v,
φ_{n+1} = φ_n + τ_n v(t_n, φ_n), with t_0 = 0 and t_{n+1} = t_n + τ_n. Assumed, in one norm |.| throughout:

- L (`lipschitz`): |u(t, x) - u(t, y)| <= L |x - y|;
- M (`curvature`): |d²ψ_t / dt²| <= M along the true trajectory;
- δ (`delta`): |v(t, x) - u(t, x)| <= δ at every point that the solver visits.

Then, by (B.3), the error ε_n = ψ_{t_n} - φ_n obeys the recursion of which the functions below bound the end:

    |ε_{n+1}| <= (1 + L τ_n) |ε_n| + δ τ_n + M τ_n² / 2.

In it L need hold at t_n only, and M within the step: `recursion_bound` takes them step by step.

This is analysis, not a monitor: on real data u is unknown, and with it L, M and δ. And δ is the largest error of the
marginal field, not the conditional flow-matching loss (3), which is a mean and contains the variance of x1 - x0 given
the point of the path, which no field removes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Number = float | Tensor

# Below it, an amplification like (e^L - 1) / L equals its limit 1 to rounding.
SMALLEST_RATE = torch.finfo(torch.float64).eps


def any_grid_bound(
    lipschitz: Number, curvature: Number, delta: Number, steps: Sequence[float] | Tensor, initial: Number = 0.0
) -> Tensor:
    """Eq. (4): |ε_N| <= e^{L t_{N-1}} Σ_j (δ τ_j + M τ_j² / 2) + e^{L t_N} |ε_0|, for any step sizes.

    An error at the start passes all N steps, hence its larger factor; the theorem itself has |ε_0| = 0.

    Args:
        lipschitz: L >= 0. This and every other number may be a tensor; their shapes broadcast.
        curvature: M >= 0.
        delta: δ >= 0.
        steps: τ_j > 0, `(..., N)`; their sum is the length of the flow, 1 from noise to data.
        initial: |ε_0| >= 0, how far the solver's start lies from the flow's.

    Returns:
        The bound, in double precision and of the broadcast shape.

    Raises:
        ValueError: If a number is negative or not finite, or there is no step, or one is not positive.
    """
    # Grönwall's discrete lemma gives the factor e^{L (t_N - t_1)}, which is this one on equal steps. On others (4) is
    # true by what a step adds, ξ_j = τ_j or τ_j². With s = τ_{N-1} and f(t) = (1 + L s) e^{-L t} - 1, the recursion
    # unrolled, 1 + L τ <= e^{L τ} and a division by e^{L t_{N-1}} turn the claim into
    #     Σ_{j<N-1} ξ_j f(t_{j+1}) <= ξ_{N-1} (1 - e^{-L t_{N-1}}).
    # Only terms with t_{j+1} < s are positive; there τ_j² <= s τ_j, so that ξ_j = τ_j is left to show. f decreases, so
    # up to the last of these terms, at T <= min(s, t_{N-1}), the sum is at most the integral of f from 0 to T,
    #     (1 / L + s) (1 - e^{-L T}) - T <= s (1 - e^{-L T}).
    rate, bend, field_error = _sizes(lipschitz=lipschitz, curvature=curvature, delta=delta)
    (start_error,) = _sizes(initial=initial)
    tau = _steps(steps)
    added = field_error * tau.sum(-1) + bend / 2 * tau.square().sum(-1)
    last_start, end = tau[..., :-1].sum(-1), tau.sum(-1)  # t_{N-1} and t_N
    return _amplified(added, (rate * last_start).exp()) + _amplified(start_error, (rate * end).exp())


def uniform_grid_bound(lipschitz: Number, curvature: Number, delta: Number, num_steps: int) -> Tensor:
    """Eq. (5), middle part: |ε_N| <= ((1 + L/N)^N - 1) / L (δ + M / (2N)), for N equal steps from 0 to 1.

    The solution of the recursion, so the least that L, M and δ allow by (B.3): u = L x with v = u + δ attains it.
    At L = 0 it is δ + M / (2N).

    Args:
        lipschitz: L >= 0. L, M and δ may be tensors; their shapes broadcast.
        curvature: M >= 0.
        delta: δ >= 0.
        num_steps: N >= 1.

    Returns:
        The bound, in double precision and of the broadcast shape.

    Raises:
        ValueError: If a number is negative or not finite, or num_steps is no whole number of at least 1.
    """
    rate, bend, field_error = _sizes(lipschitz=lipschitz, curvature=curvature, delta=delta)
    n = _whole(num_steps)
    rate = rate.clamp_min(SMALLEST_RATE)
    return _amplified(field_error + bend / (2 * n), torch.expm1(n * torch.log1p(rate / n)) / rate)


def uniform_grid_bound_exponential(lipschitz: Number, curvature: Number, delta: Number, num_steps: int) -> Tensor:
    """Eq. (5), right-hand side: |ε_N| <= (e^L - 1) / L (δ + M / (2N)), for N equal steps from 0 to 1.

    Easier to read than `uniform_grid_bound`, which is smaller and tends to this: δ is amplified by a constant that no
    number of steps removes, while the curvature's part dies as 1 / N. Arguments, result and errors are the same.
    """
    rate, bend, field_error = _sizes(lipschitz=lipschitz, curvature=curvature, delta=delta)
    n = _whole(num_steps)
    rate = rate.clamp_min(SMALLEST_RATE)
    return _amplified(field_error + bend / (2 * n), torch.expm1(rate) / rate)


def recursion_bound(lipschitz: Number, curvature: Number, delta: Number, steps: Sequence[float] | Tensor) -> Tensor:
    """(B.3) with equality, from ε_0 = 0: the least bound where L, M and δ may differ from step to step.

    With the same L, M and δ in all of N equal steps it is `uniform_grid_bound`.

    Args:
        lipschitz: L >= 0 of u(t_n, .) at each step, `(..., N)`, or one for all.
        curvature: M >= 0 within each step, the same.
        delta: δ >= 0 at each step, the same.
        steps: τ_j > 0, `(..., N)`.

    Returns:
        The bound on |ε_N|, in double precision, `(...)`.

    Raises:
        ValueError: As `any_grid_bound`.
    """
    sizes = _sizes(lipschitz=lipschitz, curvature=curvature, delta=delta)
    rates, bends, field_errors, tau = torch.broadcast_tensors(*sizes, _steps(steps))
    error = torch.zeros_like(tau[..., 0])
    for n in range(tau.shape[-1]):
        h = tau[..., n]
        error = _amplified(error, 1 + rates[..., n] * h) + field_errors[..., n] * h + bends[..., n] / 2 * h**2
    return error


def _amplified(size: Tensor, factor: Tensor) -> Tensor:
    # A factor may overflow to infinity, which is a bound still, while infinity times 0 is none.
    return torch.where(size == 0, 0.0, size * factor)


def _sizes(**numbers: Number) -> list[Tensor]:
    tensors = []
    for name, number in numbers.items():
        tensor = torch.as_tensor(number, dtype=torch.float64)
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError(f"{name} must be finite and at least 0, got {number}")
        tensors.append(tensor)
    return tensors


def _steps(steps: Sequence[float] | Tensor) -> Tensor:
    tau = torch.as_tensor(steps, dtype=torch.float64)
    if tau.ndim == 0 or tau.shape[-1] == 0 or not bool((tau.isfinite() & (tau > 0)).all()):
        raise ValueError(f"steps must be one or more step sizes, all finite and positive, got {steps}")
    return tau


def _whole(num_steps: int) -> int:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps}")
    return num_steps
