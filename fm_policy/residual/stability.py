"""What makes a head with free matrices stable in training, and what tells cheaply that it is.

With J the Jacobian of eq. (7) in x and mu the logarithmic norm of a vector norm, mu(J) <= -m for all slopes between
alpha and beta means that any two solutions under the same input approach each other by e^(-m t) in that norm. Every
test here is sufficient only: `certificate` searches for a better one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fm_policy.residual.matrices import Matrices


def mu_inf_bound(matrices: Matrices) -> Tensor:
    """An upper bound of mu_inf(J): the largest of `row_bounds`."""
    return row_bounds(matrices).max()


def mu_2_bound(matrices: Matrices) -> Tensor:
    """An upper bound of mu_2(J): lambda_max of A0's symmetric part + sum_j |A_j diag(beta_j)| |W_j|, spectral norms."""
    a0, a, w, _, beta = matrices
    bound = torch.linalg.eigvalsh((a0 + a0.T) / 2)[-1]
    for a_j, w_j, beta_j in zip(a, w, beta, strict=True):
        bound = bound + torch.linalg.matrix_norm(a_j * beta_j, 2) * torch.linalg.matrix_norm(w_j, 2)
    return bound


def row_bounds(matrices: Matrices) -> Tensor:
    """Row by row, what bounds mu_inf(J) from above, `(n,)`.

    a_ii + sum_{k != i} |a_ik| + sum_j sum_l |A_j|_il beta_l sum_k |W_j|_lk, with A0 = (a_ik).
    """
    a0, a, w, _, beta = matrices
    bounds = dominance(a0)
    for a_j, w_j, beta_j in zip(a, w, beta, strict=True):
        bounds = bounds + a_j.abs() @ (beta_j * w_j.abs().sum(dim=1))
    return bounds


def dominance(a0: Tensor) -> Tensor:
    """a_ii + sum_{k != i} |a_ik| of every row of A0, `(n,)`: negative where the row is negatively dominant."""
    diagonal = a0.diagonal()
    return diagonal + a0.abs().sum(dim=1) - diagonal.abs()


def linear_penalty(matrices: Matrices, margin: float) -> Tensor:
    """The physics-informed loss, sum_i max(0, a_ii + sum_{k != i} |a_ik| + margin) over the rows of A0.

    At zero it means mu_inf(A0) <= -margin and no more: not mu_2, and nothing about the A_j.
    """
    return (dominance(matrices.a0) + margin).relu().sum()


def row_penalty(matrices: Matrices, margin: float) -> Tensor:
    """The same over `row_bounds`, which count A_j and W_j: at zero, the head contracts at `margin` in the max norm."""
    return (row_bounds(matrices) + margin).relu().sum()


def certificate_penalty(
    matrices: Matrices, margin: float, multipliers: Tensor | None = None, metric: Tensor | None = None
) -> Tensor:
    """max(0, margin - `contraction_rate`): at zero, the head contracts at `margin` in the norm of the metric.

    Args:
        matrices: The head's.
        margin: Rate of contraction to reach, per unit of time.
        multipliers: As in `contraction_rate`; None: `balanced_multipliers`, as constants.
        metric: As in `contraction_rate`.
    """
    if multipliers is None:
        multipliers = balanced_multipliers(matrices, metric)
    return (margin - contraction_rate(matrices, multipliers, metric)).relu()


PENALTIES: dict[str, Callable[[Matrices, float], Tensor]] = {
    "linear": linear_penalty,
    "row": row_penalty,
    "certificate": certificate_penalty,
}


def contraction_rate(matrices: Matrices, multipliers: Tensor, metric: Tensor | None = None) -> Tensor:
    """The largest rate of contraction that the contraction LMI proves at these multipliers and this metric.

    The LMI, which replaces (10), asks for P > 0, T = diag(t) > 0 and a rate lambda with

        [ A0ᵀ P + P A0 + 2 lambda P - 2 Wᵀ alpha beta T W     P A + Wᵀ (alpha + beta) T ]
        [ (P A + Wᵀ (alpha + beta) T)ᵀ                                     -2 T         ]  <=  0,

    the A_j side by side and the W_j below each other. With T > 0, by Schur's complement, this is the same as
    2 lambda P + R <= 0 with

        R = P J + Jᵀ P + P A (2 T)^-1 Aᵀ P + Wᵀ (beta - alpha)² T / 2 W,    J = A0 + A (alpha + beta) / 2 W:

    the Jacobian at the middle slopes, and what the slopes can stray from there. So lambda = -lambda_max(P^-1 R) / 2.
    Any multipliers and any metric give a proof; they decide how good it is. Differentiable.

    Args:
        matrices: The head's.
        multipliers: t, all positive, `(K,)` over the units of all nonlinearities.
        metric: P, symmetric and positive definite, `(n, n)`; None: the identity.

    Returns:
        The rate, per unit of time; negative where nothing is proven.
    """
    a0, a, w, alpha, beta = _stacked(matrices)
    p = torch.eye(len(a0)).to(a0) if metric is None else metric
    pj = p @ (a0 + a * (alpha + beta) / 2 @ w)
    pa = p @ a
    r = pj + pj.T + pa / (2 * multipliers) @ pa.T + w.T * ((beta - alpha).square() * multipliers / 2) @ w
    root = torch.linalg.cholesky(p)
    r = torch.linalg.solve_triangular(root, r, upper=False)
    r = torch.linalg.solve_triangular(root, r.T, upper=False)
    return -torch.linalg.eigvalsh(r)[-1] / 2


@torch.no_grad()
def balanced_multipliers(matrices: Matrices, metric: Tensor | None = None) -> Tensor:
    """Good multipliers in closed form: t = |P a| / ((beta - alpha) |w|), with a unit's column a of A and row w of W.

    They make the trace of R in `contraction_rate` least; for A_j = -W_jᵀ D_j with slopes from 0 to beta and P = I they
    are D / beta, the proof of the construction.

    Returns:
        t, `(K,)`, without gradient.
    """
    a0, a, w, alpha, beta = _stacked(matrices)
    pa = a if metric is None else metric @ a
    tiny = torch.finfo(a0.dtype).eps  # a unit without input or output, or with one slope alone, has no finite optimum
    return (pa.norm(dim=0) + tiny) / ((beta - alpha) * w.norm(dim=1) + tiny)


def _stacked(matrices: Matrices) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a0, a, w, alpha, beta = matrices
    return a0, torch.cat(a, dim=1), torch.cat(w), torch.cat(alpha), torch.cat(beta)
