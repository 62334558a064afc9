"""ODE solvers: dx/dt = v(t, x) from t = 0 (noise) to t = 1 (data).

Fixed grids are ours, one small function per scheme: they cost nothing but calls of v, they are
differentiable as they stand, and what is trained through is what the robot runs. The adaptive `dopri5`
is torchdiffeq's; its steps are chosen for a batch as a whole, so its rows are not independent.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as _checkpoint

Velocity = Callable[[float | Tensor, Tensor], Tensor]
"""v(t, x) with a scalar t in [0, 1] and x `(B, ...)`; returns the shape of x."""

Step = Callable[[Velocity, float, float, Tensor], Tensor]


def euler_step(v: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    """Euler's rule, x + h v(t, x)."""
    return x + h * v(t, x)


def midpoint_step(v: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    """The explicit midpoint rule."""
    return x + h * v(t + h / 2, x + h / 2 * v(t, x))


def heun_step(v: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    """Heun's rule: the mean of the slopes at both ends."""
    k1 = v(t, x)
    k2 = v(t + h, x + h * k1)
    return x + h / 2 * (k1 + k2)


def rk4_step(v: Velocity, t: float, h: float, x: Tensor) -> Tensor:
    """The classical Runge-Kutta rule."""
    k1 = v(t, x)
    k2 = v(t + h / 2, x + h / 2 * k1)
    k3 = v(t + h / 2, x + h / 2 * k2)
    k4 = v(t + h, x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Scheme(NamedTuple):
    """A fixed-grid scheme: its step, its order of convergence and its calls of v per step."""

    step: Step
    order: int
    calls: int


SCHEMES = {
    "euler": Scheme(euler_step, order=1, calls=1),
    "midpoint": Scheme(midpoint_step, order=2, calls=2),
    "heun": Scheme(heun_step, order=2, calls=2),
    "rk4": Scheme(rk4_step, order=4, calls=4),
}
SOLVER_CALLS: dict[str, int | None] = {name: scheme.calls for name, scheme in SCHEMES.items()} | {"dopri5": None}
"""Every solver, with its calls of v per step; None: it chooses its steps."""


class CountedVelocity:
    """A velocity that counts its calls (NFE)."""

    def __init__(self, v: Velocity) -> None:
        self.v = v
        self.calls = 0

    def __call__(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Count, and call v."""
        self.calls += 1
        return self.v(t, x)


def integrate(
    v: Velocity,
    x0: Tensor,
    solver: str,
    num_steps: int,
    tolerance: float = 1e-5,
    *,
    start: float = 0.0,
    end: float = 1.0,
    checkpoint: bool = False,
) -> Tensor:
    """Carry x0 from t = 0 (noise) to t = 1 (data) along v, or between other times, backwards too.

    A fixed grid is differentiated as it stands (discretise, then optimise): the gradient is that of the map
    which is deployed, exactly, and not the adjoint equation's approximation of another one.

    Args:
        v: Velocity field.
        x0: Start, `(B, ...)`.
        solver: One of `SOLVER_CALLS`.
        num_steps: Number of equal steps of a fixed-grid scheme, at least 1; `dopri5` chooses its own.
        tolerance: Relative and absolute tolerance of `dopri5`.
        start: Time of x0.
        end: Time of the result.
        checkpoint: Keep only the states between the steps for the backward pass and compute the rest again
            there: equal gradients, the memory of one step, one more evaluation of v per call (Chen et al. 2016).

    Raises:
        ValueError: If the solver is unknown, num_steps is below 1, or `dopri5` is to be checkpointed.
    """
    if solver == "dopri5":
        if checkpoint:
            raise ValueError("dopri5 has no fixed steps to checkpoint: choose one of " + ", ".join(SCHEMES))
        return _integrate_dopri5(v, x0, tolerance, start, end)
    step = _scheme(solver).step
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    h = (end - start) / num_steps
    x = x0
    for n in range(num_steps):
        if checkpoint and torch.is_grad_enabled():
            x = _checkpoint(step, v, start + n * h, h, x, use_reentrant=False)
        else:
            x = step(v, start + n * h, h, x)
    return x


@cache
def call_times(solver: str, num_steps: int, start: float = 0.0, end: float = 1.0) -> tuple[float, ...]:
    """When `integrate` calls v, to the bit, in order and each time once; nothing for `dopri5`, which decides later."""
    if solver == "dopri5":
        return ()
    times: dict[float, None] = {}

    def listen(t: float, x: float) -> float:
        times[t] = None
        return x

    integrate(listen, 0.0, solver, num_steps, start=start, end=end)  # type: ignore[arg-type]
    return tuple(times)


def _scheme(solver: str) -> Scheme:
    if solver not in SCHEMES:
        raise ValueError(f"unknown fixed-grid solver {solver!r}: expected one of {list(SCHEMES)}")
    return SCHEMES[solver]


def _integrate_dopri5(v: Velocity, x0: Tensor, tolerance: float, start: float, end: float) -> Tensor:
    from torchdiffeq import odeint

    ends = x0.new_tensor([start, end])
    return odeint(v, x0, ends, method="dopri5", rtol=tolerance, atol=tolerance)[-1]
