"""Condition (8) of arXiv 2510.02081, as its Theorem 3 states it: why certificates here ask another question.

(8) knows no bound of the slopes, so it speaks for cubic units too. It does not change when A_j is multiplied by any
positive number (take Lambda, Upsilon and Xi with it), and for generic A_j it has no solution: however small A_j is.
With A_j = -W_jᵀ D_j, D_j >= 0 diagonal, it has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fm_policy.residual.descent import balance
from fm_policy.residual.semidefinite import Solver, cvxpy, solve
from fm_policy.residual.system import System

SMALLEST_MARGIN = 1e-3


@dataclass(frozen=True)
class PaperCondition:
    """Whether (8) has a solution."""

    margin: float
    """The largest m <= 1 such that both positive definite parts of (8) can be at least m I, for multipliers up to 1."""

    @property
    def feasible(self) -> bool:
        """Whether the margin is positive beyond what a solver can tell from zero."""
        return self.margin > SMALLEST_MARGIN


def paper_condition(system: System, unbounded: Sequence[bool], solver: Solver | None = None) -> PaperCondition:
    """Ask whether (8) has a solution, with the reading of its blocks that the proof in B.3 forces.

        Q = [ A0ᵀ P + P A0 + Xi0     P A + A0ᵀ Wᵀ Lambda + Wᵀ Upsilon        P      ]
            [       ...                Aᵀ Wᵀ Lambda + Lambda W A + Xi     Lambda W  ]  <=  0
            [       ...                           ...                      -Phi     ]

        P + Wᵀ Lambda W > 0,    Xi0 + sum over unbounded f_j of W_jᵀ Xi_j W_j + Wᵀ Upsilon W > 0,

    for V = xᵀ P x + 2 sum_i Lambda_i ∫ f_i; P, Xi0 >= 0 and diagonal Lambda, Xi, Upsilon >= 0. The products of two
    nonlinearities, Upsilon_{s,z}, are left out: without W_s = W_z they have no sign. The units are scaled first, which
    changes nothing in theory and keeps a solver's tolerance from passing for a solution.

    Args:
        system: Its A0, A_j and W_j; the slopes are not used.
        unbounded: For each f_j, whether it tends to plus and minus infinity.
        solver: The solver.

    Raises:
        ValueError: If `unbounded` does not have one entry for each nonlinearity.
        SolverFailureError: If the solver breaks down.
    """
    if len(unbounded) != len(system.w):
        raise ValueError(f"unbounded needs one entry for each of {len(system.w)} nonlinearities, got {len(unbounded)}")
    cp = cvxpy()
    ones = tuple(np.ones(len(w)) for w in system.w)
    scaled = balance(System(system.a0, system.a, system.w, ones, ones), np.zeros(sum(map(len, ones))))
    a0, a, w = system.a0, scaled.a, scaled.w
    n, units = a.shape
    p, xi0 = cp.Variable((n, n), PSD=True), cp.Variable((n, n), PSD=True)
    integral, xi, upsilon = (cp.Variable(units, nonneg=True) for _ in range(3))
    phi, margin = cp.Variable(), cp.Variable()
    driven = cp.diag(integral) @ w
    side = p @ a + a0.T @ driven.T + w.T @ cp.diag(upsilon)
    block = driven @ a + (driven @ a).T + cp.diag(xi)
    q = cp.bmat(
        [[a0.T @ p + p @ a0 + xi0, side, p], [side.T, block, driven], [p, driven.T, -phi * np.eye(n)]],
    )
    counted = np.concatenate([np.full(len(part), float(far)) for part, far in zip(ones, unbounded, strict=True)])
    rest = xi0 + w.T @ cp.diag(cp.multiply(counted, xi) + upsilon) @ w
    identity = np.eye(n)
    constraints = [q << 0, p + w.T @ driven >> margin * identity, rest >> margin * identity, margin <= 1]
    constraints += [p << identity, xi0 << identity, integral <= 1, xi <= 1, upsilon <= 1]
    solve(cp.Problem(cp.Maximize(margin), constraints), solver or Solver())
    return PaperCondition(float(margin.value))
