"""The gradients that descent follows, against differences; what balancing promises."""

import numpy as np
import pytest
from scipy.linalg import eigh, eigvalsh

from fm_policy.residual.descent import balance, descend, factor_form, gain_form, largest_eigenvalue, rate_form
from fm_policy.residual.system import System


@pytest.fixture
def system() -> System:
    rng, n, k = np.random.default_rng(0), 4, 6
    a0 = -np.eye(n) + 0.2 * rng.normal(size=(n, n))
    alpha, beta = np.linspace(0, 0.5, k), np.linspace(0.5, 1.5, k)
    return System(a0, (0.2 * rng.normal(size=(n, k)),), (rng.normal(size=(k, n)),), (alpha,), (beta,))


@pytest.mark.parametrize("make", [rate_form, factor_form, gain_form])
def test_gradient_of_the_smoothed_eigenvalue(system, make):
    form, smoothing, step = make(balance(system, system.stacked_alpha)), 0.3, 1e-6
    rng = np.random.default_rng(1)
    s, log_tau = np.eye(4) + 0.3 * rng.normal(size=(4, 4)), 0.5 * rng.normal(size=6)
    along_s, along_tau = rng.normal(size=(4, 4)), rng.normal(size=6)

    def value(t: float) -> float:
        pencil = form((np.eye(4) + t * along_s) @ s, np.exp(log_tau + t * along_tau))
        return smoothing * np.log(np.exp(eigvalsh(pencil.matrix, pencil.weight) / smoothing).sum())

    pencil = form(s, np.exp(log_tau))
    values, vectors = eigh(pencil.matrix, pencil.weight)
    shares = np.exp(values / smoothing) / np.exp(values / smoothing).sum()
    by_s, by_tau = pencil.pull(vectors * shares @ vectors.T, vectors * (shares * values) @ vectors.T)
    slope = (by_s * along_s).sum() + by_tau @ along_tau
    assert slope == pytest.approx((value(step) - value(-step)) / (2 * step), rel=1e-5)


def test_balance_keeps_the_middle_and_the_width_of_every_unit(system):
    alpha, beta = system.stacked_alpha, system.stacked_beta
    balanced = balance(system, alpha)
    assert np.linalg.norm(balanced.a, axis=0) == pytest.approx(np.linalg.norm(balanced.w, axis=1))
    for slopes, strayed in ((beta, 0.5), (alpha, -0.5)):
        jacobian = system.a0 + system.stacked_a * slopes @ system.stacked_w
        assert balanced.a0 + strayed * balanced.a @ balanced.w == pytest.approx(jacobian)


def test_more_freedom_finds_no_less(system):
    balanced = balance(system, system.stacked_alpha)
    form = rate_form(balanced)
    values = []
    for structure in ("full", "diagonal", "identity"):
        p, tau, value = descend(form, balanced, structure)
        assert largest_eigenvalue(form, p, tau) == pytest.approx(value, abs=1e-9)
        values.append(value)
    assert values == sorted(values)
