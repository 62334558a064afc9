"""The system of a certificate: double precision, stacked views, and refusals that name what is wrong."""

import numpy as np
import pytest

from fm_policy.residual.system import System


def parts(n: int = 2, widths: tuple[int, ...] = (3, 1)) -> dict:
    rng = np.random.default_rng(0)
    return {
        "a0": rng.normal(size=(n, n)),
        "a": tuple(rng.normal(size=(n, k)) for k in widths),
        "w": tuple(rng.normal(size=(k, n)) for k in widths),
        "alpha": tuple(np.zeros(k) for k in widths),
        "beta": tuple(np.ones(k) for k in widths),
    }


def test_stacked_matrices_make_the_same_field():
    system = System(**parts())
    x = np.array([0.3, -2.0])
    expected = system.a0 @ x + sum(a @ np.tanh(w @ x) for a, w in zip(system.a, system.w, strict=True))
    np.testing.assert_allclose(system.a0 @ x + system.stacked_a @ np.tanh(system.stacked_w @ x), expected, rtol=1e-14)
    assert system.n == 2
    np.testing.assert_array_equal(system.stacked_alpha, np.zeros(4))
    np.testing.assert_array_equal(system.stacked_beta, np.ones(4))


def test_numbers_are_kept_in_double_precision():
    values = parts()
    system = System(**(values | {"a0": values["a0"].astype(np.float32), "alpha": ([0, 0, 0], [0])}))
    assert system.a0.dtype == system.alpha[0].dtype == np.float64


def test_a_linear_system_has_no_units():
    system = System(np.eye(3), (), (), (), ())
    assert system.stacked_a.shape == (3, 0) and system.stacked_w.shape == (0, 3)
    assert system.stacked_alpha.shape == system.stacked_beta.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a0": np.ones((2, 3))}, r"A0 must be a square matrix, got the shape \(2, 3\)"),
        ({"w": (np.ones((3, 2)),)}, "one entry for each nonlinearity.*'w': 1"),
        ({"w": (np.ones((3, 2)), np.ones((2, 2)))}, r"nonlinearity 1 .* 'W': \(2, 2\).*not.*'W': \(1, 2\)"),
        ({"beta": (np.ones(3), np.ones(2))}, r"nonlinearity 1 .*'beta': \(2,\)"),
        ({"a0": np.full((2, 2), np.nan)}, "a0 holds numbers that are not finite"),
        ({"beta": (np.full(3, np.inf), np.ones(1))}, "beta holds numbers that are not finite"),
        ({"alpha": (np.zeros(3), np.full(1, 2.0))}, r"slopes of nonlinearity 1 .*alpha=\[2.\], beta=\[1.\]"),
        ({"alpha": (np.full(3, -0.1), np.zeros(1))}, "slopes of nonlinearity 0 must satisfy 0 <= alpha <= beta"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        System(**(parts() | change))
