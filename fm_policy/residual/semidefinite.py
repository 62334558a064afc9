"""The search for a certificate by semidefinite programming; the one module that needs cvxpy.

Programs are posed for `Balanced` systems, over P and tau, T = scale tau. The block of the units is diagonal wherever
there are no integral terms, so that the solver splits the inequality into one cone of side n + 1 for each unit.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from fm_policy.residual.descent import Balanced, Form, largest_eigenvalue
from fm_policy.residual.inequalities import EPSILON
from fm_policy.residual.system import Array

LARGEST = 1e4  # I <= P <= 1e4 I, multipliers up to 1e4: keeps the programs bounded, and their duals worth something
SMALLEST_MULTIPLIER = 1e-6  # in the balanced system, where 1 is usual: strict, and far from mattering
STRICT = 1e-6  # what is left to a solver's inaccuracy, where the largest eigenvalue itself is not minimised
TOLERANCE = 2e-3  # of the bisection, relative to what is won over the target

Lmi = Callable[[Any, Any, float, Any], Any]
"""From P, tau, mu and s to the cvxpy matrix that must be <= 0: the inequality for the value mu, relaxed by s I."""


class SolverFailureError(Exception):
    """The solver gave no usable answer, which says nothing about the system."""


class NotFoundError(Exception):
    """The solver found no solution; `excess` is the smallest largest eigenvalue that it reached, with P >= I."""

    def __init__(self, excess: float) -> None:
        super().__init__(f"the smallest achievable largest eigenvalue is {excess:.3g}")
        self.excess = excess


class InfeasibleError(NotFoundError):
    """There is no solution, see `excess_bound`; `excess` is a bound from below of any largest eigenvalue."""


@dataclass(frozen=True)
class Solver:
    """A solver that cvxpy knows, and its options as cvxpy names them."""

    name: str = "CLARABEL"
    options: Mapping[str, Any] = field(default_factory=dict)


def cvxpy() -> ModuleType:
    """The module.

    Raises:
        ModuleNotFoundError: If it is not installed, naming the extra.
    """
    try:
        import cvxpy as module
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "certificates by semidefinite programming need cvxpy: pip install 'lerobot_policy_fm_ft[certify]'"
        ) from error
    return module


def solve(problem: Any, solver: Solver) -> None:
    """Solve a cvxpy problem that has a solution.

    Raises:
        SolverFailureError: If it says anything but that it has the optimum.
    """
    cp = cvxpy()
    with warnings.catch_warnings():
        # Of solutions that may be inaccurate: each is checked without the solver.
        warnings.simplefilter("ignore", UserWarning)
        try:
            problem.solve(solver=solver.name, **solver.options)
        except cp.SolverError as error:
            raise SolverFailureError(f"{solver.name}: {error}") from error
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise SolverFailureError(f"{solver.name} ended with the status {problem.status!r}")


def rate_lmi(balanced: Balanced) -> Lmi:
    """What `descent.rate_form` is in the coordinates z; the value mu is -2 rate."""
    cp = cvxpy()

    def lmi(p: Any, tau: Any, mu: float, s: Any) -> Any:
        first = _quadratic(cp, balanced, p, tau) - mu * p - s * np.eye(len(balanced.a0))
        return cp.bmat([[first, p @ balanced.a], [balanced.a.T @ p, -2 * cp.diag(tau)]])

    return lmi


def factor_lmi(balanced: Balanced) -> Lmi:
    """What `descent.factor_form` is in the coordinates z; the value mu is the factor."""
    cp = cvxpy()
    n, units = balanced.a.shape
    f = np.eye(n) + balanced.a0

    def lmi(p: Any, tau: Any, mu: float, s: Any) -> Any:
        corner = -mu * p - s * np.eye(n)
        first = corner + _weighted(cp, balanced, tau) / 2
        side, none = p @ balanced.a, np.zeros((n, units))
        return cp.bmat([[first, f.T @ p, none], [p @ f, corner, side], [none.T, side.T, -2 * cp.diag(tau)]])

    return lmi


def least_value(
    lmi: Lmi, form: Form, balanced: Balanced, target: float, lower: float, solver: Solver
) -> tuple[Array, Array, float]:
    """P, tau and the least value mu below `target` for which the inequality holds, by bisection from `lower`.

    Raises:
        NotFoundError: If it finds none; an `InfeasibleError` if there is none.
        SolverFailureError: If the solver breaks down before the first solution.
    """
    best, error = _attempt(lmi, form, balanced, target, solver)
    if best[2] >= target:
        raise error
    while best[2] - lower > TOLERANCE * (target - best[2]):
        middle = (best[2] + lower) / 2
        try:
            found, _ = _attempt(lmi, form, balanced, middle, solver)
        except SolverFailureError:
            break  # what is in hand stays a solution
        best = min(best, found, key=lambda solution: solution[2])
        if found[2] >= middle:
            lower = middle
    return best


def _attempt(
    lmi: Lmi, form: Form, balanced: Balanced, mu: float, solver: Solver
) -> tuple[tuple[Array, Array, float], NotFoundError]:
    """P, tau and their value, computed anew; and what to raise if that is not below mu."""
    cp = cvxpy()
    n, units = balanced.a.shape
    p, tau, s = cp.Variable((n, n), symmetric=True), cp.Variable(units), cp.Variable()
    error = _relax(lmi(p, tau, mu, s), balanced, p, [tau], s, solver)
    multipliers = np.maximum(tau.value, SMALLEST_MULTIPLIER)
    return (p.value, multipliers, largest_eigenvalue(form, p.value, multipliers)), error


def _relax(
    matrix: Any, balanced: Balanced, p: Any, multipliers: Sequence[Any], s: Any, solver: Solver
) -> NotFoundError:
    """Solve for the smallest s with matrix <= 0; what that means if it is not negative."""
    cp = cvxpy()
    identity, whole = np.eye(len(balanced.a0)), matrix << 0
    sizes = [p >> identity, p << LARGEST * identity]
    sizes += [bound for t in multipliers for bound in (t >= SMALLEST_MULTIPLIER, t <= LARGEST)]
    solve(cp.Problem(cp.Minimize(s), [*sizes, whole]), solver)
    bound = excess_bound(matrix, whole.dual_value, balanced, p, multipliers, s)
    return InfeasibleError(bound) if bound > 0 else NotFoundError(float(s.value))


def excess_bound(matrix: Any, dual: Array, balanced: Balanced, p: Any, multipliers: Sequence[Any], s: Any) -> float:
    """A bound from below of s wherever matrix <= 0: a proof, by weak duality, whatever the solver was up to.

    The matrix is linear in P, the multipliers t and s, so that <Z, matrix> = <G, P> + g t - c s for any Z. With Z >= 0
    this is at most 0: s >= (<G, P> + g t) / c, which is least at the ends of what P and t are allowed to be.

    Args:
        matrix: The relaxed inequality, an expression of cvxpy whose variables have values.
        dual: Z, of any quality; its part >= 0 is taken.
        balanced: The system that the matrix is made of.
        p: P, the variable, from I to `LARGEST` I.
        multipliers: The variables t, from `SMALLEST_MULTIPLIER` to `LARGEST`.
        s: The variable s.
    """
    values, vectors = np.linalg.eigh((dual + dual.T) / 2)
    z = (vectors * np.maximum(values, 0.0)) @ vectors.T
    gradient = cvxpy().sum(cvxpy().multiply(z, matrix)).grad
    by_p, weight = _dense(gradient[p]).reshape(p.shape), -_dense(gradient[s]).item()
    if not weight > 0:
        return -np.inf
    sizes = np.linalg.eigvalsh((by_p + by_p.T) / 2)
    bound = np.minimum(sizes, LARGEST * sizes).sum()
    for t in multipliers:
        by_t = _dense(gradient[t]).ravel()
        bound += np.minimum(SMALLEST_MULTIPLIER * by_t, LARGEST * by_t).sum()
    norms = [np.linalg.norm(part, 2) for part in (balanced.a0, balanced.a, balanced.w)]
    rounding = 8 * len(z) * EPSILON * LARGEST * np.abs(z).sum() * (1 + max(norms)) ** 2
    return float((bound - rounding) / weight)


def _dense(gradient: Any) -> Array:
    """A gradient of cvxpy, which is a sparse matrix, and of a variable with a single number a plain one."""
    return gradient.toarray() if hasattr(gradient, "toarray") else np.asarray(gradient)


def least_gain(a0: Array, balanced: Balanced, integrals: bool, solver: Solver) -> tuple[Array, Array, Array, float]:
    """P, Lambda, tau and the least phi of the inequality of input-to-state stability, slopes from 0 to 1 after scaling.

    Args:
        a0: A0 of the system.
        balanced: The system, balanced for slopes from 0.
        integrals: Whether V may have integral terms; they fill the units' block, which is slow for many units.
        solver: The solver.

    Raises:
        NotFoundError: If the solver finds none; an `InfeasibleError` if there is none.
        SolverFailureError: If the solver breaks down.
    """
    cp = cvxpy()
    n, units = balanced.a.shape
    a, w = balanced.a, balanced.w
    p, tau, s, phi = cp.Variable((n, n), symmetric=True), cp.Variable(units), cp.Variable(), cp.Variable()
    integral: Any = cp.Variable(units) if integrals else cp.Constant(np.zeros(units))
    driven = cp.diag(integral) @ w
    first = a0.T @ p + p @ a0
    side = p @ a + a0.T @ driven.T + w.T @ cp.diag(tau)
    block = driven @ a + (driven @ a).T - 2 * cp.diag(tau)
    identity = np.eye(n)
    signs = [tau >= SMALLEST_MULTIPLIER] + ([integral >= 0] if integrals else [])
    whole = [[first + identity, side, p], [side.T, block, driven], [p, driven.T, -phi * identity]]
    strictly = cp.bmat(whole) << -STRICT * np.eye(2 * n + units)
    program = cp.Problem(cp.Minimize(phi), [p >> 0, strictly, *signs])
    try:
        solve(program, solver)
    except SolverFailureError:
        if program.status not in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
            raise
        relaxed = cp.bmat([[first - s * identity, side], [side.T, block]])
        raise _relax(relaxed, balanced, p, [tau, integral] if integrals else [tau], s, solver) from None
    return p.value, np.maximum(integral.value, 0.0), np.maximum(tau.value, SMALLEST_MULTIPLIER), float(phi.value)


def _quadratic(cp: ModuleType, balanced: Balanced, p: Any, tau: Any) -> Any:
    return balanced.a0.T @ p + p @ balanced.a0 + _weighted(cp, balanced, tau) / 2


def _weighted(cp: ModuleType, balanced: Balanced, tau: Any) -> Any:
    return balanced.w.T @ cp.diag(tau) @ balanced.w
