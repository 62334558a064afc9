"""Penalties and cheap tests: what they bound, what they drive to zero, and what they do not see."""

import numpy as np
import pytest
import torch

from fm_policy.residual import stability
from fm_policy.residual.matrices import Matrices

N, WIDTHS, SLOPES = 4, (6, 5), ((0.0, 1.0), (0.1, 1.0))


def random_matrices(seed: int = 0, size: float = 0.3, decay: float = 1.5) -> Matrices:
    """A0 near -decay I, the others of the given size; the slopes of tanh and of the leaky ReLU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator, dtype=torch.float64)

    a0 = normal(N, N) - decay * torch.eye(N)
    a, w = tuple(normal(N, k) for k in WIDTHS), tuple(normal(k, N) for k in WIDTHS)
    alpha, beta = (
        tuple(torch.full((k,), slopes[end], dtype=torch.float64) for k, slopes in zip(WIDTHS, SLOPES, strict=True))
        for end in (0, 1)
    )
    return Matrices(a0, a, w, alpha, beta)


def linear(a0: list[list[float]]) -> Matrices:
    """A system whose nonlinear part does nothing."""
    n = len(a0)
    one = torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(n, 1, dtype=torch.float64)
    return Matrices(torch.tensor(a0, dtype=torch.float64), (zero,), (zero.T,), (0 * one,), (one,))


def random_jacobians(matrices: Matrices, count: int = 300) -> np.ndarray:
    """Jacobians at random slopes within the sector, half of them at its corners."""
    rng = np.random.default_rng(0)
    a0, a, w, alpha, beta = (
        part.numpy() if isinstance(part, torch.Tensor) else np.concatenate(part, axis=axis)
        for part, axis in zip(matrices, (0, 1, 0, 0, 0), strict=True)
    )
    share = rng.uniform(size=(count, len(alpha)))
    share[::2] = share[::2].round()
    return a0 + np.einsum("ik,ck,kj->cij", a, alpha + share * (beta - alpha), w)


def mu_2(jacobian: np.ndarray) -> np.ndarray:
    return np.linalg.eigvalsh((jacobian + np.swapaxes(jacobian, -1, -2)) / 2)[..., -1]


def mu_inf(jacobian: np.ndarray) -> np.ndarray:
    diagonal = np.diagonal(jacobian, axis1=-2, axis2=-1)
    return (diagonal + np.abs(jacobian).sum(-1) - np.abs(diagonal)).max(-1)


def lmi(matrices: Matrices, multipliers: np.ndarray, rate: float, p: np.ndarray) -> np.ndarray:
    """The contraction LMI as it is written, unreduced."""
    a0 = matrices.a0.detach().numpy()
    a = np.concatenate([part.detach().numpy() for part in matrices.a], axis=1)
    w, alpha, beta = (np.concatenate([part.detach().numpy() for part in parts]) for parts in matrices[2:])
    top = a0.T @ p + p @ a0 + 2 * rate * p - 2 * w.T @ np.diag(alpha * beta * multipliers) @ w
    corner = p @ a + w.T @ np.diag((alpha + beta) * multipliers)
    return np.block([[top, corner], [corner.T, -2 * np.diag(multipliers)]])


# --------------------------------------------------------------------- cheap tests


@pytest.mark.parametrize("seed", range(5))
def test_the_bounds_hold_for_every_jacobian(seed):
    matrices = random_matrices(seed)
    jacobians = random_jacobians(matrices)
    assert mu_2(jacobians).max() <= stability.mu_2_bound(matrices).item()
    assert mu_inf(jacobians).max() <= stability.mu_inf_bound(matrices).item()


def test_the_bounds_by_hand():
    """n = 2 and one unit of slopes up to 2: numbers that fit on paper."""
    one = torch.ones(1, dtype=torch.float64)
    a, w = torch.tensor([[3.0], [-4.0]]).double(), torch.tensor([[0.6, -0.8]]).double()
    matrices = Matrices(torch.tensor([[-5.0, 1.0], [-1.0, -7.0]]).double(), (a,), (w,), (0 * one,), (2 * one,))
    assert stability.row_bounds(matrices).tolist() == pytest.approx([-5 + 1 + 3 * 2 * 1.4, -7 + 1 + 4 * 2 * 1.4])
    assert stability.mu_inf_bound(matrices).item() == pytest.approx(-7 + 1 + 4 * 2 * 1.4)
    assert stability.mu_2_bound(matrices).item() == pytest.approx(-5 + 5 * 2 * 1)  # |a| = 5, |w| = 1
    assert stability.linear_penalty(matrices, 4.5).item() == pytest.approx(0.5)
    assert stability.row_penalty(matrices, 0.0).item() == pytest.approx(4.4 + 5.2)


def test_for_a_linear_system_the_bounds_are_exact():
    matrices = linear([[-2.0, 1.9], [0.0, -0.05]])
    jacobian = matrices.a0.numpy()
    assert stability.mu_2_bound(matrices).item() == pytest.approx(mu_2(jacobian))
    assert stability.mu_inf_bound(matrices).item() == pytest.approx(mu_inf(jacobian))
    rate = stability.contraction_rate(matrices, torch.ones(1, dtype=torch.float64))
    assert rate.item() == pytest.approx(-mu_2(jacobian))


# --------------------------------------------------------------------- penalties


def descend(penalty, parameters, steps: int, lr: float) -> None:
    optimiser = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        penalty().backward()
        optimiser.step()


def test_the_linear_penalty_makes_all_rows_of_a0_dominant():
    n, margin = 8, 0.1
    a0 = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    others = linear(np.eye(n).tolist())
    assert (stability.dominance(a0) + margin > 0).sum() == n
    descend(lambda: stability.linear_penalty(others._replace(a0=a0), margin), [a0], steps=400, lr=0.02)
    assert (stability.dominance(a0) + margin > 0).sum() == 0
    assert torch.linalg.eigvals(a0.detach()).real.max() < -margin


def test_dominant_rows_do_not_make_the_euclidean_norm_shrink():
    """The limit of the linear penalty: it is at zero, and yet a distance grows before it shrinks."""
    matrices = linear([[-2.0, 1.9], [0.0, -0.05]])
    assert stability.linear_penalty(matrices, 0.05).item() == 0
    assert mu_2(matrices.a0.numpy()) == pytest.approx(0.34, abs=0.005)
    _, vectors = np.linalg.eigh(matrices.a0.numpy() + matrices.a0.numpy().T)
    start = torch.tensor(vectors[:, -1])
    soon = torch.linalg.matrix_exp(0.25 * matrices.a0) @ start
    assert soon.norm() > 1.05
    assert soon.abs().max() <= start.abs().max() * np.exp(-0.05 * 0.25) * (1 + 1e-12)  # its promise: the max norm
    assert stability.certificate_penalty(matrices, 0.05).item() > 0.3


def test_the_linear_penalty_does_not_see_the_nonlinear_part():
    """x' = -x + 2 tanh(x): the origin repels, though every row of A0 is dominant."""
    eye, ones = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    matrices = Matrices(-eye, (2 * eye,), (eye,), (0 * ones,), (ones,))
    assert stability.linear_penalty(matrices, 0.5).item() == 0
    assert stability.row_penalty(matrices, 0.5).item() == pytest.approx(3 * 1.5)
    assert stability.certificate_penalty(matrices, 0.5).item() == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["row", "certificate"])
def test_descending_a_full_penalty_makes_every_jacobian_contract(name):
    margin, norm = 0.2, {"row": mu_inf, "certificate": mu_2}[name]
    matrices = random_matrices(size=0.8, decay=0.0)
    assert norm(random_jacobians(matrices)).max() > 0.5
    parameters = [tensor.requires_grad_() for tensor in (matrices.a0, *matrices.a, *matrices.w)]
    descend(lambda: stability.PENALTIES[name](matrices, margin), parameters, steps=400, lr=0.05)
    assert stability.PENALTIES[name](matrices, 0.99 * margin).item() == 0
    with torch.no_grad():
        found = Matrices(matrices.a0.detach(), *(tuple(t.detach() for t in part) for part in matrices[1:]))
    assert norm(random_jacobians(found)).max() <= -0.99 * margin


# --------------------------------------------------------------------- the certificate


def metric_and_multipliers(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(N, N)) * 0.3 + np.eye(N)
    return torch.tensor(root @ root.T), torch.tensor(rng.uniform(0.1, 2.0, size=sum(WIDTHS)))


@pytest.mark.parametrize("seed", range(4))
def test_the_rate_is_where_the_written_out_lmi_turns(seed):
    """Its largest eigenvalue is 0 at the rate, negative before and positive beyond."""
    matrices = random_matrices(seed)
    p, multipliers = metric_and_multipliers(seed)
    rate = stability.contraction_rate(matrices, multipliers, p).item()
    tops = [np.linalg.eigvalsh(lmi(matrices, multipliers.numpy(), rate + d, p.numpy()))[-1] for d in (-0.01, 0, 0.01)]
    assert tops[0] < -1e-5 and tops[1] == pytest.approx(0, abs=1e-10) and tops[2] > 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_the_rate_holds_for_every_jacobian_in_the_norm_of_the_metric(seed):
    matrices = random_matrices(seed)
    p, multipliers = metric_and_multipliers(seed)
    root = np.linalg.cholesky(p.numpy())
    jacobians = root.T @ random_jacobians(matrices) @ np.linalg.inv(root.T)
    assert mu_2(jacobians).max() <= -stability.contraction_rate(matrices, multipliers, p).item()


def test_the_gradient_of_the_certificate_penalty_is_that_of_finite_differences():
    matrices = random_matrices()
    p, multipliers = metric_and_multipliers()
    assert stability.certificate_penalty(matrices, 1.0, multipliers, p).item() > 0

    def penalty(a0: torch.Tensor, a: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        a, w, alpha = a.split(WIDTHS, dim=1), w.split(WIDTHS), alpha.split(WIDTHS)
        return stability.certificate_penalty(Matrices(a0, a, w, alpha, matrices.beta), 1.0, multipliers, p)

    stacked = (matrices.a0, torch.cat(matrices.a, dim=1), torch.cat(matrices.w), torch.cat(matrices.alpha) + 0.1)
    torch.autograd.gradcheck(penalty, tuple(tensor.clone().requires_grad_() for tensor in stacked))


def test_descending_the_certificate_penalty_certifies_at_those_multipliers():
    rate = 0.3
    matrices = random_matrices(size=0.6, decay=0.5)
    p, multipliers = metric_and_multipliers()

    def top() -> float:
        return np.linalg.eigvalsh(lmi(matrices, multipliers.numpy(), 0.99 * rate, p.numpy()))[-1]

    assert top() > 0.5
    parameters = [tensor.requires_grad_() for tensor in (matrices.a0, *matrices.a, *matrices.w)]
    descend(lambda: stability.certificate_penalty(matrices, rate, multipliers, p), parameters, steps=250, lr=0.05)
    assert stability.certificate_penalty(matrices, 0.99 * rate, multipliers, p).item() == 0
    assert top() <= 0


def test_for_one_number_balanced_multipliers_are_the_best():
    """They make R's trace least, which at n = 1 is R itself, under any metric."""
    a0, a, w, alpha, beta = random_matrices()
    scalar = Matrices(a0[:1, :1], tuple(part[:1] for part in a), tuple(part[:, :1] for part in w), alpha, beta)
    for p in (None, torch.full((1, 1), 2.5, dtype=torch.float64)):
        balanced = stability.balanced_multipliers(scalar, p)
        best = stability.contraction_rate(scalar, balanced, p).item()
        for unit in range(len(balanced)):
            for factor in (0.9, 1.1):
                moved = balanced.clone()
                moved[unit] *= factor
                assert stability.contraction_rate(scalar, moved, p).item() < best


def test_the_constructions_proof_is_found_where_the_cheap_tests_fail(make):
    """Huge weights, A_j = -W_jᵀ D_j: the balanced multipliers prove the rate to the digit, norms prove nothing."""
    head = make.head(std=20.0, rate=0.4, activations=("tanh",))
    matrices = head.matrices()
    assert stability.mu_2_bound(matrices).item() > 1000 and stability.mu_inf_bound(matrices).item() > 1000
    a0 = torch.zeros_like(matrices.a0) - 0.4 * torch.eye(len(matrices.a0))  # without B, so that the rate is exact
    exact = stability.contraction_rate(matrices._replace(a0=a0), stability.balanced_multipliers(matrices))
    assert exact.item() == pytest.approx(0.4, abs=1e-8)
    assert stability.certificate_penalty(matrices, 0.4 - 1e-8).item() == 0


@pytest.mark.parametrize("activations", [("tanh", "leaky_relu"), ("prelu",)])
def test_an_untrained_head_is_certified_in_single_precision(make, activations):
    """Where A_j = 0 the multipliers have no finite optimum; the penalty must be sane there, and its gradient finite."""
    head = make.head(mode="penalty", rate=0.1, activations=activations).float()
    penalty = stability.certificate_penalty(head.matrices(), 0.2)
    assert penalty.item() == pytest.approx(0.1, abs=1e-4)
    penalty.backward()
    assert all(p.grad.isfinite().all() for p in head.parts.parameters() if p.grad is not None)
