"""Certificates of stability for the head, eq. (7) of arXiv 2510.02081, after its Theorems 3 and 4.

Three questions: does the flow contract, and at which rate; does one Euler step contract, and by which factor; is the
flow input-to-state stable, and with which gain. Every answer that claims something was confirmed by `inequalities`, in
double precision and without the solver. "infeasible" names what fails and by how much, and is a proof too: of an
eigenvalue beyond its rounding, or by weak duality. To find nothing, and a solver that breaks down, are other answers.

Proven is what exact arithmetic makes of the matrices in double precision; a deployed head rounds to its own.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fm_policy.residual import inequalities
from fm_policy.residual.descent import (
    STRUCTURES,
    Balanced,
    Form,
    balance,
    descend,
    factor_form,
    gain_form,
    rate_form,
)
from fm_policy.residual.inequalities import EPSILON, eigenvalue_error, jacobian
from fm_policy.residual.record import Contraction, EulerContraction, InputToState, Record, Refusal
from fm_policy.residual.semidefinite import (
    LARGEST,
    SMALLEST_MULTIPLIER,
    STRICT,
    InfeasibleError,
    Lmi,
    NotFoundError,
    Solver,
    SolverFailureError,
    factor_lmi,
    least_gain,
    least_value,
    rate_lmi,
)
from fm_policy.residual.system import Array, System

SEMIDEFINITE = "semidefinite"
EIGENVALUES = "eigenvalues"  # no search: a necessary condition fails
METHODS = (SEMIDEFINITE, *STRUCTURES)

# Up to these sizes a question takes seconds, and up to the last one a quarter of a minute.
LARGEST_PROGRAM = 40  # n + K
LARGEST_FULL = 40  # n
LARGEST_RETRY = 160  # n

# How much of a rate, of 1 - factor or of 1 / sqrt(phi) is given up until the inequality holds strictly.
SLACKS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


@dataclass(frozen=True)
class Search:
    """How to search.

    Args:
        method: `semidefinite` (P full, and the one method that can show that there is no certificate), or descent with
            P `full`, `diagonal` or a multiple of the `identity`; None: by the size of the system, see `methods_for`.
        solver: Of semidefinite programs.

    Raises:
        ValueError: If the method is unknown.
    """

    method: str | None = None
    solver: Solver = field(default_factory=Solver)

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}")

    def methods_for(self, system: System) -> tuple[str, ...]:
        """The methods for a system of this size, each tried where those before it decide nothing.

        Raises:
            ValueError: If a linear system, whose programs have no multipliers, is asked for by `semidefinite`.
        """
        units = len(system.stacked_beta)
        if self.method == SEMIDEFINITE and not units:
            raise ValueError(f"method={self.method!r} is for systems with units, and this one is linear: ask by 'full'")
        if self.method is not None:
            return (self.method,)
        if 0 < units <= LARGEST_PROGRAM - system.n:
            return (SEMIDEFINITE,)
        if system.n <= LARGEST_FULL:
            return ("full",)
        return ("diagonal", "full") if system.n <= LARGEST_RETRY else ("diagonal",)


def certify(system: System, step: float, weights_sha256: str, search: Search | None = None) -> Record:
    """All three answers for one head.

    Args:
        system: The head's.
        step: The head's Euler step, in units of time.
        weights_sha256: Of the file that holds the head's weights.
        search: How to search.
    """
    return Record(system, contraction(system, search), euler(system, step, search), iss(system, search), weights_sha256)


def contraction(system: System, search: Search | None = None) -> Contraction | Refusal:
    """The largest rate at which the flow provably contracts, by `inequalities.contraction`."""
    worst, refusal = _slowest_jacobian(system, system.stacked_alpha)
    if refusal:
        return refusal
    balanced = balance(_in_units_of(-worst, system), system.stacked_alpha)
    solver = (search or Search()).solver

    def ask(method: str) -> Contraction | Refusal:
        found = _least(rate_form(balanced), lambda: rate_lmi(balanced), balanced, 0.0, -2.0, method, solver)
        if isinstance(found, Refusal):
            return found
        p, t, value = found
        rate = worst * value / 2
        return _confirmed(system, lambda slack: Contraction(p, -worst * t, rate * (1 - slack), method))

    return _first(ask, system, search)


def euler(system: System, step: float, search: Search | None = None) -> EulerContraction | Refusal:
    """The smallest factor by which one Euler step provably contracts, by `inequalities.euler`.

    Raises:
        ValueError: If the step is not positive.
    """
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"step must be positive and finite, got {step}")
    slopes, worst, error = _worst(system, system.stacked_alpha, lambda values: float(np.abs(1 + step * values).max()))
    if worst >= 1:
        condition = f"I + step J, J the Jacobian at the {slopes} slopes, does not shrink: its spectral radius - 1"
        return _refused_by_eigenvalues(condition, worst - 1, step * error + 4 * EPSILON * worst)
    balanced = balance(_in_units_of(1 / step, system), system.stacked_alpha)
    solver = (search or Search()).solver

    def ask(method: str) -> EulerContraction | Refusal:
        found = _least(factor_form(balanced), lambda: factor_lmi(balanced), balanced, 1.0, worst, method, solver)
        if isinstance(found, Refusal):
            return found
        p, t, value = found

        def candidate(slack: float) -> EulerContraction:
            factor = value + slack * (1 - value)
            return EulerContraction(p, factor * t, step, factor, method)

        return _confirmed(system, candidate)

    return _first(ask, system, search)


def iss(system: System, search: Search | None = None) -> InputToState | Refusal:
    """Input-to-state stability with the smallest phi, by `inequalities.iss`."""
    none = np.zeros(len(system.stacked_beta))
    worst, refusal = _slowest_jacobian(system, none)
    if refusal:
        return refusal
    balanced = balance(_in_units_of(-worst, system), none)

    def ask(method: str) -> InputToState | Refusal:
        if method == SEMIDEFINITE:
            return _iss_by_program(system, -worst, search or Search())
        p, tau, value = descend(gain_form(balanced), balanced, method)
        if value >= 0:
            return _undecided(method, value)

        def candidate(slack: float) -> InputToState:
            gain = 1 / (-value * (1 - slack))
            return InputToState(gain / -worst * p, none, gain * tau * balanced.scale, (gain / worst) ** 2, method)

        return _confirmed(system, candidate)

    return _first(ask, system, search)


def _first[A: (Contraction, EulerContraction, InputToState)](
    ask: Callable[[str], A | Refusal], system: System, search: Search | None
) -> A | Refusal:
    """The first answer that decides; the last one if none does."""
    for method in (search or Search()).methods_for(system):
        answer = ask(method)
        if not (isinstance(answer, Refusal) and answer.reason == "undecided"):
            break
    return answer


def _iss_by_program(system: System, rate: float, search: Search) -> InputToState | Refusal:
    """Solved for the system in units of `rate`."""
    scaled, beta = _in_units_of(rate, system), system.stacked_beta
    balanced = balance(scaled, np.zeros(len(beta)))
    n, units = balanced.a.shape
    integrals = n + units <= LARGEST_PROGRAM
    method = SEMIDEFINITE if integrals else f"{SEMIDEFINITE}, without integral terms"
    try:
        p, integral, tau, phi = least_gain(scaled.a0, balanced, integrals, search.solver)
    except NotFoundError as error:
        return _not_found(error)
    except SolverFailureError as error:
        return _failed(error)
    p, integral = (p + p.T) / (2 * rate), integral * balanced.scale * beta / rate
    t, phi = tau * balanced.scale, phi / rate**2
    # Without its I the inequality is linear in all four: the right multiple makes up for what the solver left open.
    matrix = inequalities.iss(system, p, integral, t, phi)
    corner, side, rest = matrix[:n, :n] - np.eye(n), matrix[:n, n:], matrix[n:, n:]
    decay = -float(np.linalg.eigvalsh(corner - side @ np.linalg.solve(rest, side.T))[-1])
    if decay <= 0 or np.linalg.eigvalsh(rest)[-1] >= 0:
        return _failed(SolverFailureError(f"{search.solver.name} returned what a check finds to be no solution"))

    def candidate(slack: float) -> InputToState:
        multiple = (1 + slack) / decay
        return InputToState(multiple * p, multiple * integral, multiple * t, multiple * phi, method)

    return _confirmed(system, candidate)


def _least(
    form: Form, lmi: Callable[[], Lmi], balanced: Balanced, target: float, lower: float, method: str, solver: Solver
) -> tuple[Array, Array, float] | Refusal:
    """P >= I, T for the value 1 of what scales with it, and the least value below the target."""
    if method == SEMIDEFINITE:
        try:
            p, tau, value = least_value(lmi(), form, balanced, target, lower, solver)
        except NotFoundError as error:
            return _not_found(error)
        except SolverFailureError as error:
            return _failed(error)
    else:
        p, tau, value = descend(form, balanced, method)
        if value >= target:
            return _undecided(method, value - target)
    p = (p + p.T) / 2
    smallest = np.linalg.eigvalsh(p)[0]
    return p / smallest, tau * balanced.scale / smallest, value


def _confirmed[A: (Contraction, EulerContraction, InputToState)](
    system: System, candidate: Callable[[float], A]
) -> A | Refusal:
    """The first candidate that holds with a margin, giving up as little as possible."""
    for slack in SLACKS:
        found = candidate(slack)
        bound = found.upper_bound(system)
        if bound < 0:
            return found
    condition = f"the inequality holds within rounding only, even with {SLACKS[-1]:.0e} of the value given up"
    return Refusal("numerical failure", condition, bound if math.isfinite(bound) else None, found.method)


def _in_units_of(rate: float, system: System) -> System:
    """The same system, with time counted in 1 / rate."""
    return dataclasses.replace(system, a0=system.a0 / rate, a=tuple(a / rate for a in system.a))


def _worst(
    system: System, alpha: Array, measure: Callable[[NDArray[np.complex128]], float]
) -> tuple[str, float, float]:
    """Necessary: the same claim for the Jacobian at constant slopes.

    Returns:
        Which slopes are worst, the measure of the eigenvalues there, and how wrong these may be.
    """
    beta = system.stacked_beta
    named = {"least": alpha, "largest": beta, "middle": (alpha + beta) / 2}
    spectra = {name: np.linalg.eigvals(jacobian(system, slopes)).astype(complex) for name, slopes in named.items()}
    values = {name: measure(spectrum) for name, spectrum in spectra.items()}
    worst = max(values, key=values.__getitem__)
    return worst, values[worst], eigenvalue_error(system, named[worst])


def _slowest_jacobian(system: System, alpha: Array) -> tuple[float, Refusal | None]:
    """The largest real part of an eigenvalue, and what to say if it is not negative."""
    slopes, worst, error = _worst(system, alpha, lambda values: float(values.real.max()))
    condition = f"the Jacobian at the {slopes} slopes is not Hurwitz: the largest real part of its eigenvalues"
    return worst, _refused_by_eigenvalues(condition, worst, error) if worst >= 0 else None


def _refused_by_eigenvalues(condition: str, excess: float, error: float) -> Refusal:
    if excess > error:
        return Refusal("infeasible", condition, excess, EIGENVALUES)
    return Refusal("undecided", f"{condition}, which rounding may have moved by {error:.3g},", excess, EIGENVALUES)


def _not_found(error: NotFoundError) -> Refusal:
    sizes = f"I <= P <= {LARGEST:g} I and balanced multipliers from {SMALLEST_MULTIPLIER:g} to {LARGEST:g}"
    if isinstance(error, InfeasibleError):
        condition = f"no solution with {sizes}: every largest eigenvalue is at least"
        return Refusal("infeasible", condition, error.excess, SEMIDEFINITE)
    if error.excess < -STRICT:
        return _failed(SolverFailureError(f"the solver reports {error.excess:.3g} < 0 for what a check finds to fail"))
    condition = f"found no solution with {sizes}, and no proof that there is none: the least largest eigenvalue found"
    return Refusal("undecided", condition, error.excess, SEMIDEFINITE)


def _undecided(structure: str, value: float) -> Refusal:
    condition = f"descent found no solution with P of the structure {structure!r}: what its value lacks, without unit"
    return Refusal("undecided", condition, value, structure)


def _failed(error: SolverFailureError) -> Refusal:
    return Refusal("numerical failure", str(error), None, SEMIDEFINITE)
