"""The straight path from noise to data (Lipman et al. 2022; Liu et al. 2022; sigma = 0)."""

from torch import Tensor


def interpolate(t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """Point of the path at time t: psi_t(x0 | x1) = (1 - t) x0 + t x1, the argument of v in eq. (3).

    Args:
        t: Times in [0, 1], `(B,)`.
        x0: Noise, `(B, horizon, action_dim)`.
        x1: Data, the same shape.
    """
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return x0 + t * (x1 - x0)


def path_velocity(x0: Tensor, x1: Tensor) -> Tensor:
    """Velocity of the path, d/dt psi_t(x0 | x1) = x1 - x0, the target of v in eq. (3)."""
    return x1 - x0
