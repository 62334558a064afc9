"""What a velocity field is like where its flow passes: the L and M of Theorem 1 (arXiv 2510.02081), measured.

Everything here is taken at the points of one trajectory. A constant of the theorem is a supremum over all the points
between the true and the numerical trajectory, so what is measured is no larger than it, and a bound made of it no
proof. Norms are Euclidean, over all numbers of a row (of a policy: a chunk).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fm_policy.flow.noise import sample_noise
from fm_policy.flow.solvers import Velocity, integrate


class Jacobian:
    """J = dv/dx at points of one time, row by row, as products with vectors; no row of v may depend on another.

    Both products are backward passes: J w is the derivative of J^T u, which is linear in u, in direction w.

    Attributes:
        value: v(t, x), `(B, ...)`.
    """

    def __init__(self, v: Velocity, t: float, x: Tensor) -> None:
        """Linearise v around x, `(B, ...)`, at time t."""
        # The fused kernels of attention can be differentiated only once, and not forward.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._x, self._t = x.detach().requires_grad_(), x.new_tensor(t).requires_grad_()
            self._y = v(self._t, self._x) + 0 * (self._x + self._t)  # a field that ignores t or x has a derivative too
            self._u = torch.zeros_like(self._y, requires_grad=True)
            self._pulled = torch.autograd.grad(self._y, (self._t, self._x), self._u, create_graph=True)
        self.value = self._y.detach()

    def times(self, w: Tensor, rate: float = 0.0) -> Tensor:
        """J w + rate dv/dt, where w is `(B, ...)`."""
        along = (self._t.new_tensor(rate), w)
        return torch.autograd.grad(self._pulled, self._u, along, retain_graph=True)[0]

    def transposed_times(self, z: Tensor) -> Tensor:
        """J^T z, where z is `(B, ...)`."""
        return torch.autograd.grad(self._y, self._x, z, retain_graph=True)[0]

    def acceleration(self) -> Tensor:
        """d²ψ_t / dt² = dv/dt + J v of the trajectories through these points, `(B, ...)`."""
        return self.times(self.value, rate=1.0)

    def matrix(self) -> Tensor:
        """J itself, `(B, d, d)` for rows of d numbers, by d backward passes."""
        d = self.value[0].numel()
        units = torch.eye(d, dtype=self.value.dtype, device=self.value.device).view(d, *self.value.shape[1:])
        return torch.stack([self.transposed_times(e.expand_as(self.value)).flatten(1) for e in units], dim=1)

    def largest_singular_value(self, products: int = 6, generator: torch.Generator | None = None) -> Tensor:
        """|J| = sigma_max(J), the Lipschitz constant of v at these points, from below, `(B,)`.

        Power iteration with J^T J that keeps its iterates and takes the best vector of their span (Golub and Kahan
        1965): never above sigma_max, never below what the last iterate alone gives, and exact after d products.

        Args:
            products: Number of products with J and with J^T, at least 1.
            generator: Source of the first vector.

        Raises:
            ValueError: If products is below 1.
        """
        if products < 1:
            raise ValueError(f"products must be at least 1, got {products}")
        shape, dtype, device = self.value.shape, self.value.dtype, self.value.device
        w = sample_noise(shape, generator, device, dtype).flatten(1)
        basis, images = w.new_zeros(*w.shape, 0), w.new_zeros(*w.shape, 0)
        for _ in range(min(products, w.shape[1])):
            # Householder's: its last column is orthogonal to the others even where w lies in their span.
            w = torch.linalg.qr(torch.cat([basis, w.unsqueeze(2)], 2)).Q[:, :, -1]
            z = self.times(w.view(shape))
            basis, images = torch.cat([basis, w.unsqueeze(2)], 2), torch.cat([images, z.flatten(1).unsqueeze(2)], 2)
            w = self.transposed_times(z).flatten(1)
        return torch.linalg.svdvals(images)[:, 0]


class Spectrum(NamedTuple):
    """Extremes of J, `(B,)` each.

    Attributes:
        least: Least real part of an eigenvalue: an Euler step h is stable on a real one only if h |least| <= 2.
        largest: Largest real part of an eigenvalue.
        logarithmic_norm: Largest eigenvalue of (J + J^T) / 2: neighbouring trajectories part at this rate at most,
            where L, which is blind to signs, would allow |J|.
    """

    least: Tensor
    largest: Tensor
    logarithmic_norm: Tensor


def spectrum(matrix: Tensor) -> Spectrum:
    """The extremes of Jacobians `(B, d, d)`."""
    real = torch.linalg.eigvals(matrix).real
    symmetric = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return Spectrum(real.amin(1), real.amax(1), symmetric[:, -1])


class Profile(NamedTuple):
    """A field along the fine reference trajectories of a batch, at K + 1 equally spaced times.

    Attributes:
        times: From 0 to 1, `(K + 1,)`.
        states: psi_t, `(K + 1, B, ...)`.
        lipschitz: L, from below, `(K + 1, B)`.
        curvature: |d²ψ_t / dt²|, `(K + 1, B)`; M is its maximum over time.
        straightness: Mean over time of |v(t, psi_t) - (psi_1 - psi_0)|² / |psi_1 - psi_0|², `(B,)`; 0: straight, at
            constant speed (S of Liu et al. 2022, Rectified Flow, sec. 2.2, here relative to the way's length).
    """

    times: Tensor
    states: Tensor
    lipschitz: Tensor
    curvature: Tensor
    straightness: Tensor

    def on_grid(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """L at the start of each of N equal steps, and M within it, `(B, N)` each.

        The latter is the largest at the times of the profile in the step, ends included.

        Raises:
            ValueError: If N does not divide K, so that a step would start between two times.
        """
        k = len(self.times) - 1
        if num_steps < 1 or k % num_steps:
            raise ValueError(f"num_steps must divide the {k} intervals of the profile, got {num_steps}")
        width = k // num_steps
        bends = [self.curvature[start : start + width + 1].amax(0) for start in range(0, k, width)]
        return self.lipschitz[:-1:width].T, torch.stack(bends, dim=1)


def profile(
    v: Velocity,
    x0: Tensor,
    times: int = 32,
    substeps: int = 4,
    products: int = 6,
    generator: torch.Generator | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Profile:
    """Follow the flow of v from x0 at t = 0 to t = 1, and measure v on the way.

    Args:
        v: Velocity field.
        x0: Starts, `(B, ...)`.
        times: K, at least 1: v is measured at 0, 1 / K, ..., 1.
        substeps: rk4 steps between two of them.
        products: As in `Jacobian.largest_singular_value`.
        generator: As there.
        progress: Called after each time.

    Raises:
        ValueError: If a number is below 1.
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}")
    states, velocities, rates, bends = [x0.detach()], [], [], []
    for k in range(times + 1):
        jacobian = Jacobian(v, k / times, states[-1])
        velocities.append(jacobian.value)
        rates.append(jacobian.largest_singular_value(products, generator))
        bends.append(_norm(jacobian.acceleration()))
        if k < times:
            with torch.no_grad():
                states.append(integrate(v, states[-1], "rk4", substeps, start=k / times, end=(k + 1) / times))
        progress()
    straight = straightness(torch.stack(velocities), states[-1] - states[0])
    grid = torch.linspace(0, 1, times + 1, dtype=torch.float64)
    return Profile(grid, torch.stack(states), torch.stack(rates), torch.stack(bends), straight)


def straightness(velocities: Tensor, way: Tensor) -> Tensor:
    """The straightness of `Profile`, by the trapezoidal rule.

    Args:
        velocities: At equally spaced times from 0 to 1, `(K + 1, B, ...)`, K at least 1.
        way: psi_1 - psi_0, `(B, ...)`.
    """
    deviation = (velocities - way).flatten(2).square().sum(2)
    return torch.trapezoid(deviation, dx=1 / (len(velocities) - 1), dim=0) / _norm(way).square()


def _norm(rows: Tensor) -> Tensor:
    return rows.flatten(1).norm(dim=1)
