"""The search for a certificate by descent: the largest eigenvalue of an inequality, minimised over P and T.

Each question of `certificate` is written as: how small can the largest eigenvalue of a symmetric matrix be made?
In the coordinates z = S x, P = Sᵀ S is the identity. The set of (P, T) that reach a value is convex, so descent finds
the least one; only what `inequalities` then confirms is a certificate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import cholesky, eigh, eigvalsh, solve
from scipy.optimize import minimize

from fm_policy.residual.inequalities import jacobian
from fm_policy.residual.system import Array, System


class Pencil(NamedTuple):
    """The eigenvalue problem M v = value D v, and how its values change."""

    matrix: Array
    """M, symmetric."""
    weight: Array | None
    """D, symmetric and positive definite; None for the identity."""
    pull: Callable[[Array, Array], tuple[Array, Array]]
    """Gradients of sum c vᵀ (M - value D) v in E, where dS = E S, and in log tau.

    From the sum of c v vᵀ, and that of c value v vᵀ, over eigenvectors v with vᵀ D v = 1.
    """


Form = Callable[[Array, Array], Pencil]
"""From S, `(n, n)`, and tau, `(K,)`, to the problem whose largest eigenvalue is to be small."""

# log(sum(exp(eigenvalues / s))) s exceeds the largest by s log(n) at most; s falls from stage to stage, in units of
# the largest modulus of an eigenvalue at the start.
SMOOTHING = (1e-1, 1e-2, 1e-3, 1e-4)
STEPS = 300
SMALLEST_SECTOR = 1e-3
LARGEST_CONDITION = 1e4  # of S: beyond P = Sᵀ S of condition 1e8, rounding would take the proof away


@dataclass(frozen=True)
class Balanced:
    """A system in the form that the search likes: sectors centred, and every unit as large on both sides.

    With slopes c ± d / 2, A f(W x) = A c W x and a rest with slopes ± d / 2. The unit's column a and row w are scaled
    to |a| = |w|, with d = 1. Then tau = 1 is a fair first guess, and T = scale tau.
    """

    a0: Array
    """`(n, n)`: the Jacobian at the middle slopes."""
    a: Array
    """`(n, K)`."""
    w: Array
    """`(K, n)`."""
    scale: Array
    """`(K,)`."""


def balance(system: System, alpha: Array) -> Balanced:
    """The system with slopes from `alpha`, `(K,)`, to its own beta."""
    beta = system.stacked_beta
    # A narrower sector would want an infinite multiplier. A wider one with the same middle asks for more: still sound.
    width = np.maximum(beta - alpha, SMALLEST_SECTOR * np.where(beta > 0, beta, 1.0))
    into = _no_zeros(np.linalg.norm(system.stacked_a, axis=0))
    out_of = _no_zeros(np.linalg.norm(system.stacked_w, axis=1))
    scale = into / (width * out_of)
    root = np.sqrt(scale)
    middle = jacobian(system, (alpha + beta) / 2)
    return Balanced(middle, system.stacked_a / root, system.stacked_w * (width * root)[:, None], scale)


def rate_form(balanced: Balanced) -> Form:
    """-2 rate: the contraction inequality after Schur's complement, with P = I and T = tau."""

    def form(s: Array, tau: Array) -> Pencil:
        moved = _Moved.by(balanced, s, tau)
        return Pencil(moved.sum(), None, lambda v, _: moved.pull(v, v, v))

    return form


def factor_form(balanced: Balanced) -> Form:
    """The factor of one Euler step of 1 unit of time, with P = I and T = factor tau.

    Schur's complement and a congruence make the inequality [½ Wᵀ tau W, Fᵀ; F, ½ A tau⁻¹ Aᵀ] <= factor I, F = I + A0:
    one eigenvalue takes the place of a search for the factor.
    """
    n = len(balanced.a0)

    def form(s: Array, tau: Array) -> Pencil:
        moved = _Moved.by(balanced, s, tau)
        f = np.eye(n) + moved.a0
        matrix = np.block([[moved.out_of / 2, f.T], [f, moved.into / 2]])
        return Pencil(matrix, None, lambda v, _: moved.pull(v[n:, :n], v[n:, n:], v[:n, :n]))

    return form


def gain_form(balanced: Balanced) -> Form:
    """-1 / sqrt(phi): the inequality of input-to-state stability without integral terms, P = Sᵀ S sqrt(phi)."""

    def form(s: Array, tau: Array) -> Pencil:
        moved, outer = _Moved.by(balanced, s, tau), s @ s.T
        inverse = np.linalg.inv(outer)

        def pull(v: Array, weighted: Array) -> tuple[Array, Array]:
            by_s, by_tau = moved.pull(v, v, v)
            return by_s - 2 * (weighted @ outer - inverse @ weighted), by_tau

        return Pencil(moved.sum(), outer + inverse, pull)

    return form


STRUCTURES = ("full", "diagonal", "identity")


def descend(form: Form, balanced: Balanced, structure: str) -> tuple[Array, Array, float]:
    """The least largest eigenvalue of `form` that descent finds from P = I, tau = 1.

    Args:
        form: What is to be small.
        balanced: The system that it is made of.
        structure: Of P: `full`, `diagonal`, or `identity`, which means a multiple of it.

    Returns:
        P = Sᵀ S, tau and the largest eigenvalue there.
    """
    n, units = balanced.a.shape
    start = {"full": np.eye(n).ravel(), "diagonal": np.zeros(n), "identity": np.zeros(1)}[structure]
    best: list[tuple[float, Array]] = []

    def split(x: Array) -> tuple[Array, Array]:
        s = x[units:].reshape(n, n) if structure == "full" else np.diag(np.broadcast_to(np.exp(x[units:]), n))
        return s, np.exp(x[:units])

    def along(s: Array, by_s: Array) -> Array:
        if structure == "full":
            return solve(s, by_s.T).T.ravel()
        return by_s.diagonal() if structure == "diagonal" else by_s.trace()[None]

    def smoothed(x: Array, smoothing: float) -> tuple[float, Array]:
        s, tau = split(x)
        try:
            pencil = form(s, tau)
            values, vectors = eigh(pencil.matrix, pencil.weight)
        except np.linalg.LinAlgError:  # S is singular: as bad as can be, and the line search steps back
            return math.inf, np.zeros_like(x)
        if not best or (values[-1] < best[0][0] and np.linalg.cond(s) <= LARGEST_CONDITION):
            best[:] = [(float(values[-1]), x.copy())]
        shares = np.exp((values - values[-1]) / smoothing)
        value = values[-1] + smoothing * math.log(shares.sum())
        shares /= shares.sum()
        by_s, by_tau = pencil.pull(vectors * shares @ vectors.T, vectors * (shares * values) @ vectors.T)
        return value, np.concatenate([by_tau, along(s, by_s)])

    x = np.concatenate([np.zeros(units), start])
    unit = max(np.abs(eigvalsh(*form(*split(x))[:2])).max(), np.finfo(np.float64).tiny)
    for smoothing in SMOOTHING:
        options = {"maxiter": STEPS, "maxfun": 2 * STEPS}
        x = minimize(smoothed, x, args=(smoothing * unit,), jac=True, method="L-BFGS-B", options=options).x
    value, x = best[0]
    s, tau = split(x)
    return s.T @ s, tau, value


def largest_eigenvalue(form: Form, p: Array, tau: Array) -> float:
    """The largest eigenvalue of `form` at any P > 0 and tau > 0."""
    return float(eigvalsh(*form(cholesky(p), tau)[:2])[-1])


class _Moved(NamedTuple):
    """A balanced system in the coordinates z = S x."""

    a0: Array
    a: Array
    w: Array
    tau: Array
    into: Array
    """A tau⁻¹ Aᵀ."""
    out_of: Array
    """Wᵀ tau W."""

    @classmethod
    def by(cls, balanced: Balanced, s: Array, tau: Array) -> "_Moved":
        inverse = np.linalg.inv(s)
        a, w = s @ balanced.a, balanced.w @ inverse
        return cls(s @ balanced.a0 @ inverse, a, w, tau, a / tau @ a.T, w.T * tau @ w)

    def sum(self) -> Array:
        """A0 + A0ᵀ + ½ A tau⁻¹ Aᵀ + ½ Wᵀ tau W."""
        return self.a0 + self.a0.T + (self.into + self.out_of) / 2

    def pull(self, by_a0: Array, by_into: Array, by_out_of: Array) -> tuple[Array, Array]:
        """The gradients of `Pencil.pull`, of 2 <by_a0, A0> + ½ <by_into, A tau⁻¹ Aᵀ> + ½ <by_out_of, Wᵀ tau W>."""
        by_s = 2 * (by_a0 @ self.a0.T - self.a0.T @ by_a0) + by_into @ self.into - self.out_of @ by_out_of
        gained = self.tau * (self.w @ by_out_of * self.w).sum(axis=1)
        lost = (self.a * (by_into @ self.a)).sum(axis=0) / self.tau
        return by_s, (gained - lost) / 2


def _no_zeros(norms: Array) -> Array:
    largest = norms.max(initial=0.0)
    return np.maximum(norms, 1e-6 * largest if largest > 0 else 1e-6)
