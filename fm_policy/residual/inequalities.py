"""The matrix inequalities of a certificate, and when a number of theirs is a proof. Numpy alone.

They speak of a `System`, x' = A0 x + sum_j A_j f_j(W_j x + b_j) + g, whose units have slopes between alpha and beta.
Side by side the A_j are A, below each other the W_j are W, and so all units are one vector: T and Lambda are diagonal
matrices with one number for each unit. Each inequality asks that a symmetric matrix have no positive eigenvalue.

Floating-point numbers prove something only with a margin. The rule: scale rows and columns until the diagonal is -1,
which keeps definiteness, take the largest eigenvalue, and add a bound of all rounding errors, those of forming the
matrix from its terms included. The sum must be negative: `upper_bound`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fm_policy.residual.system import Array, System

EPSILON = float(np.finfo(np.float64).eps)


def contraction(system: System, p: Array, t: Array, rate: float, minus: float = -1.0) -> Array:
    """The contraction inequality: two solutions under one input approach as |x - y|_P e^(-rate time).

        [ A0ᵀ P + P A0 + 2 rate P - 2 Wᵀ alpha beta T W     P A + Wᵀ (alpha + beta) T ]
        [ (P A + Wᵀ (alpha + beta) T)ᵀ                                    -2 T        ]  <=  0

    With V = Dᵀ P D of the difference D and p = f(W (x + D)) - f(W x), it adds 2 (p - alpha W D)ᵀ T (beta W D - p) >= 0
    to dV/dt <= -2 rate V. It takes the place of (10) of arXiv 2510.02081, whose integral terms do not belong to the
    error system: there p depends on x(t) too.

    Args:
        system: Of n states and K units.
        p: P, symmetric, `(n, n)`.
        t: The diagonal of T, `(K,)`.
        rate: Per unit of time.
        minus: What stands for every minus sign; +1 with absolute values of the rest makes the sum of all magnitudes.

    Returns:
        The matrix, `(n + K, n + K)`.
    """
    a, w = system.stacked_a, system.stacked_w
    alpha, beta = system.stacked_alpha, system.stacked_beta
    first = system.a0.T @ p + p @ system.a0 + 2 * rate * p + minus * 2 * (w.T * (alpha * beta * t)) @ w
    side = p @ a + w.T * ((alpha + beta) * t)
    return np.block([[first, side], [side.T, minus * 2 * np.diag(t)]])


def euler(system: System, p: Array, t: Array, step: float, factor: float, minus: float = -1.0) -> Array:
    """The same for Euler's rule: one step shrinks |x - y|_P by `factor`, with F = I + step A0.

        [ Fᵀ P F - factor² P - 2 Wᵀ alpha beta T W     step Fᵀ P A + Wᵀ (alpha + beta) T ]
        [ (step Fᵀ P A + Wᵀ (alpha + beta) T)ᵀ               step² Aᵀ P A - 2 T          ]  <=  0

    Arguments are those of `contraction`; `step` is the solver's, in units of time.
    """
    a, w = system.stacked_a, system.stacked_w
    alpha, beta = system.stacked_alpha, system.stacked_beta
    f = np.eye(system.n) + step * system.a0
    first = f.T @ p @ f + minus * factor**2 * p + minus * 2 * (w.T * (alpha * beta * t)) @ w
    side = step * f.T @ p @ a + w.T * ((alpha + beta) * t)
    return np.block([[first, side], [side.T, step**2 * a.T @ p @ a + minus * 2 * np.diag(t)]])


def iss(system: System, p: Array, integral: Array, t: Array, phi: float, minus: float = -1.0) -> Array:
    """The inequality of input-to-state stability: dV/dt <= -|x|² + phi |g|², for slopes between 0 and beta.

        [ A0ᵀ P + P A0 + I     P A + A0ᵀ Wᵀ Lambda + Wᵀ beta T        P      ]
        [       ...            Aᵀ Wᵀ Lambda + Lambda W A - 2 T     Lambda W  ]  <=  0
        [       ...                        ...                      -phi I   ]

    with V = xᵀ P x + 2 sum_i Lambda_i ∫ f_i over [0, W_i x]. Theorem 3 and (8) of arXiv 2510.02081 with what they lack,
    a bound of the slopes (`theorem3`). Here f(0) = 0 and biases are constant: f(y + b) - f(b) is the unit, A f(b) is
    counted as a part of g.

    Arguments are those of `contraction`; `integral` is the diagonal of Lambda, `(K,)`; the slopes alpha are not used.

    Returns:
        The matrix, `(2 n + K, 2 n + K)`.
    """
    a, w, beta, n = system.stacked_a, system.stacked_w, system.stacked_beta, system.n
    driven = integral[:, None] * w
    first = system.a0.T @ p + p @ system.a0 + np.eye(n)
    side = p @ a + system.a0.T @ driven.T + w.T * (beta * t)
    units = driven @ a + (driven @ a).T + minus * 2 * np.diag(t)
    return np.block([[first, side, p], [side.T, units, driven], [p, driven.T, minus * phi * np.eye(n)]])


def upper_bound(form: Callable[..., Array], system: System, *numbers: Array | float) -> float:
    """A bound from above of the largest eigenvalue of `form(system, *numbers)`, scaled to the diagonal -1.

    Negative: the inequality holds, strictly, for these very numbers. A diagonal entry that is not negative is left
    unscaled, and is itself a lower bound of the largest eigenvalue: then the answer is positive.
    """
    matrix = form(system, *numbers)
    sizes = form(_absolute(system), *map(np.abs, numbers), minus=1.0)
    diagonal = matrix.diagonal()
    scale = 1 / np.sqrt(np.where(diagonal < 0, -diagonal, 1.0))
    scaled, sizes = (part * scale * scale[:, None] for part in (matrix, sizes))
    # Each entry is a sum of products over at most len(matrix) terms, and at most three of them are nested.
    rounding = 8 * len(matrix) * EPSILON * np.abs(sizes).sum(axis=1).max()
    return float(np.linalg.eigvalsh(scaled)[-1] + rounding)


def is_positive_definite(p: Array) -> bool:
    """P = Pᵀ > 0, beyond rounding."""
    return bool(np.isfinite(p).all() and np.array_equal(p, p.T) and extremes(p)[0] > 0)


def extremes(p: Array) -> tuple[float, float]:
    """A bound from below of the least, and one from above of the largest eigenvalue of a symmetric matrix."""
    eigenvalues = np.linalg.eigvalsh(p)
    rounding = 8 * len(p) * EPSILON * np.abs(p).sum(axis=1).max()
    return float(eigenvalues[0] - rounding), float(eigenvalues[-1] + rounding)


def is_nonnegative(multipliers: Array) -> bool:
    """Whether all numbers are finite and at least 0."""
    return bool((np.isfinite(multipliers) & (multipliers >= 0)).all())


def jacobian(system: System, slopes: Array) -> Array:
    """A0 + A diag(slopes) W: of the system where its units have these slopes, `(K,)`."""
    return system.a0 + system.stacked_a * slopes @ system.stacked_w


def eigenvalue_error(system: System, slopes: Array) -> float:
    """How far the computed eigenvalues of `jacobian` may lie from true ones, after Bauer and Fike.

    The rounding of forming and decomposing it, times |V| |V⁻¹| of its eigenvectors: large where it is far from normal.
    """
    size = np.linalg.norm(jacobian(_absolute(system), slopes), 2)
    vectors = np.linalg.eig(jacobian(system, slopes))[1]
    return float(8 * (system.n + len(slopes)) * EPSILON * size * np.linalg.cond(vectors))


def _absolute(system: System) -> System:
    def sizes(parts: tuple[NDArray[np.float64], ...]) -> tuple[NDArray[np.float64], ...]:
        return tuple(map(np.abs, parts))

    return System(np.abs(system.a0), sizes(system.a), sizes(system.w), system.alpha, system.beta)
