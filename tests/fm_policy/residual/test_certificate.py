"""Certificates against what they speak of: eigenvalues, simulated trajectories, and systems that have none."""

import dataclasses
import functools
import itertools
import json
import sys

import numpy as np
import pytest
import torch

from fm_policy.residual import inequalities, record
from fm_policy.residual.certificate import Search, certify, contraction, euler, iss
from fm_policy.residual.descent import STRUCTURES, balance
from fm_policy.residual.matrices import Matrices
from fm_policy.residual.record import Contraction, EulerContraction, InputToState, Refusal, region_radius
from fm_policy.residual.semidefinite import Solver, excess_bound, rate_lmi
from fm_policy.residual.stability import contraction_rate, mu_2_bound, mu_inf_bound
from fm_policy.residual.system import System
from fm_policy.residual.theorem3 import paper_condition

pytest.importorskip("cvxpy", reason="certificates by semidefinite programming need the extra `certify`")

N, K = 6, 8
LEAK = 0.1


def system_of(a0, a, w) -> System:
    """tanh units, then leaky ReLUs."""
    zeros, ones = np.zeros(K), np.ones(K)
    return System(a0, a, w, (zeros, LEAK * ones), (ones, ones))


def draw(seed: int = 0, gain: float = 0.12) -> tuple[np.ndarray, tuple, tuple]:
    """A negatively row-dominant A0, A_j and W_j."""
    rng = np.random.default_rng(seed)
    a0 = 0.25 * rng.normal(size=(N, N))
    np.fill_diagonal(a0, 0)
    a0 -= np.diag(np.abs(a0).sum(axis=1) + 0.6)
    a, w = rng.normal(size=(2, N, K)) * gain, rng.normal(size=(2, K, N)) / np.sqrt(N)
    return a0, tuple(a), tuple(w)


@pytest.fixture(scope="module")
def dominant() -> System:
    return system_of(*draw())


@pytest.fixture(scope="module")
def sheared() -> System:
    """Hurwitz, but far from dominant: a change of coordinates hides the decay."""
    a0, a, w = draw(seed=1, gain=0.1)
    shear = np.eye(N) + np.triu(np.full((N, N), 0.6), 1)
    back = np.linalg.inv(shear)
    return system_of(shear @ a0 @ back, tuple(shear @ x for x in a), tuple(x @ back for x in w))


@pytest.fixture(scope="module")
def answers(dominant):
    """Contraction, Euler steps of 1/16 and input-to-state stability of the dominant system, by method."""

    @functools.cache
    def by(method: str) -> tuple[Contraction, EulerContraction, InputToState]:
        made = certify(dominant, 0.0625, "", Search(method))
        return made.contraction, made.euler, made.iss

    return by


@pytest.fixture(scope="module")
def found(answers) -> Contraction:
    return answers("semidefinite")[0]


def units(y: np.ndarray) -> np.ndarray:
    return np.concatenate([np.tanh(y[:K]), np.where(y[K:] > 0, y[K:], LEAK * y[K:])])


def velocity(system: System, x: np.ndarray, bias: np.ndarray | float, g: np.ndarray) -> np.ndarray:
    """For states side by side, `(n, many)`."""
    return system.a0 @ x + system.stacked_a @ units(system.stacked_w @ x + bias) + g


def flow(system: System, x: np.ndarray, inputs, span: float, steps: int) -> np.ndarray:
    """Runge-Kutta's rule of order 4; the states at every step, `(steps + 1, n, many)`."""
    h, states = span / steps, [x]
    for i in range(steps):
        t = i * h

        def v(time, y):
            return velocity(system, y, *inputs(time))

        k1 = v(t, x)
        k2 = v(t + h / 2, x + h / 2 * k1)
        k3 = v(t + h / 2, x + h / 2 * k2)
        k4 = v(t + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return np.stack(states)


def p_norm(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Over the axis before the last."""
    return np.sqrt(np.einsum("...im,ij,...jm->...m", x, p, x))


def test_rate_is_proven_below_the_eigenvalues(dominant, found):
    """D.3's inequality, formed anew; no certified rate can beat a Jacobian of the system."""
    assert isinstance(found, Contraction)
    assert found.method == "semidefinite"
    assert 0.5 < found.rate < -np.linalg.eigvals(dominant.a0).real.max()
    a, w = np.hstack(dominant.a), np.vstack(dominant.w)
    alpha, beta, t = np.concatenate(dominant.alpha), np.concatenate(dominant.beta), np.diag(found.t)
    corner = dominant.a0.T @ found.p + found.p @ dominant.a0 + 2 * found.rate * found.p
    corner -= 2 * w.T @ np.diag(alpha * beta) @ t @ w
    side = found.p @ a + w.T @ np.diag(alpha + beta) @ t
    assert np.linalg.eigvalsh(np.block([[corner, side], [side.T, -2 * t]]))[-1] < 0
    assert np.linalg.eigvalsh(found.p)[0] > 0
    assert (found.t >= 0).all()
    assert found.upper_bound(dominant) < 0


def test_rate_is_the_largest_of_its_multipliers(dominant, found):
    """The same number from the training penalty, which knows Schur's complement instead of the inequality."""
    parts = (tuple(map(torch.tensor, part)) for part in (dominant.a, dominant.w, dominant.alpha, dominant.beta))
    matrices = Matrices(torch.tensor(dominant.a0), *parts)
    rate = contraction_rate(matrices, torch.tensor(found.t), torch.tensor(found.p)).item()
    assert found.rate == pytest.approx(rate, rel=1e-6)
    assert found.rate < rate


def test_trajectory_pairs_approach_at_the_rate(dominant, found):
    """20 pairs under one input, which moves the biases too; tight: some pair approaches hardly faster."""
    rng = np.random.default_rng(2)
    p, frequency = rng.normal(size=(2, 2 * K, 20)), rng.uniform(1, 9, size=20)

    def inputs(t):
        return p[0] * np.sin(frequency * t), 3 * p[1, :N] * np.cos(frequency * t)

    starts = 2 * rng.normal(size=(2, N, 20))
    slowest = np.linalg.eigh(found.p @ dominant.a0 + dominant.a0.T @ found.p)[1][:, -1:]
    starts[1, :, :10] = starts[0, :, :10] + 1e-3 * slowest
    x, y = (flow(dominant, start, inputs, span=3.0, steps=600) for start in starts)
    distance = p_norm(found.p, x - y)
    ratio = distance / (distance[0] * np.exp(-found.rate * np.linspace(0, 3, 601))[:, None])
    assert ratio.max() <= 1 + 1e-6
    assert ratio[60:].max() > 0.4


@pytest.mark.parametrize(("step", "tightness"), [(0.0625, 0.98), (0.3, 0.9), (0.6, 0.8)])
def test_euler_factor_against_the_worst_simulated_step(dominant, step, tightness):
    """Pairs under one input; each apart by the direction that the linearisation shrinks least."""
    proven = euler(dominant, step)
    assert isinstance(proven, EulerContraction)
    assert proven.upper_bound(dominant) < 0
    root = np.linalg.cholesky(proven.p).T
    rng, worst = np.random.default_rng(3), 0.0
    a, w = dominant.stacked_a, dominant.stacked_w
    for _ in range(400):
        x, bias = rng.normal(size=(N, 1)), 10 ** rng.uniform(-1, 1.5) * rng.normal(size=(2 * K, 1))
        y = (w @ x + bias)[:, 0]
        slopes = np.concatenate([1 / np.cosh(y[:K]) ** 2, np.where(y[K:] > 0, 1.0, LEAK)])
        matrix = root @ (np.eye(N) + step * (dominant.a0 + a * slopes @ w)) @ np.linalg.inv(root)
        apart = 1e-4 * np.linalg.solve(root, np.linalg.svd(matrix)[2][0])[:, None]
        after = [z + step * velocity(dominant, z, bias, np.ones((N, 1))) for z in (x, x + apart)]
        worst = max(worst, (p_norm(proven.p, after[1] - after[0]) / p_norm(proven.p, apart)).item())
    assert worst <= proven.factor * (1 + 1e-6)
    assert worst >= tightness * proven.factor


def test_too_long_a_step_is_infeasible(dominant):
    answer = euler(dominant, 1.2)
    assert isinstance(answer, Refusal)
    assert answer.reason == "infeasible"
    j = inequalities.jacobian(dominant, dominant.stacked_beta)
    assert answer.amount >= np.abs(np.linalg.eigvals(np.eye(N) + 1.2 * j)).max() - 1 > 0


@pytest.mark.parametrize("method", ["semidefinite", *STRUCTURES])
def test_unstable_a0_is_infeasible(dominant, method):
    a0 = dominant.a0 + 3 * np.eye(N)
    unstable = dataclasses.replace(dominant, a0=a0)
    largest = np.linalg.eigvals(a0).real.max()
    for ask in (contraction, iss):
        answer = ask(unstable, Search(method))
        assert isinstance(answer, Refusal)
        assert answer.reason == "infeasible"
        assert "not Hurwitz" in answer.condition
        assert answer.amount >= largest > 0


def test_infeasible_though_every_jacobian_is_stable():
    """The program itself says no, and by how much; descent may only say that it found nothing."""
    # With the slopes s the Jacobian is [[-1, -6 s2], [6 s1, -1]]: stable for all of them, not for switches among them.
    system = switched(6.0)
    for ask in (contraction, lambda s, search: euler(s, 0.01, search)):
        no = ask(system, Search("semidefinite"))
        assert (no.reason, no.method) == ("infeasible", "semidefinite")
        assert no.amount > 1e-3
        unknown = ask(system, Search("full"))
        assert (unknown.reason, unknown.method) == ("undecided", "full")
        assert unknown.amount >= 0


def switched(gain: float) -> System:
    """Of the Jacobian [[-1, -gain s2], [gain s1, -1]]; with P = I optimal, it contracts if and only if gain < 2."""
    a, w = np.array([[0.0, gain], [gain, 0.0]]), np.array([[1.0, 0.0], [0.0, -1.0]])
    return System(-np.eye(2), (a,), (w,), (np.zeros(2),), (np.ones(2),))


def test_infeasible_is_said_where_it_is_proven_only():
    """On both sides of the border, and so near to it that a solver's tolerance decides: then it was not found."""
    assert isinstance(contraction(switched(1.999)), Contraction)
    no = contraction(switched(2.001))
    assert no.reason == "infeasible"
    assert 0.0009 < no.amount <= 0.001 * (1 + 1e-6)
    for gain in (2 - 1e-11, 2 + 1e-11):
        near = contraction(switched(gain))
        assert near.reason == "undecided"
        assert "no proof that there is none" in near.condition


def test_no_multiplier_of_any_quality_proves_a_falsehood():
    """Weak duality: -1 is reached with P = I, so that no Z may say more; for the optimal Z, see the amount above."""
    cp, balanced = pytest.importorskip("cvxpy"), balance(switched(1.0), np.zeros(2))
    p, tau, s = cp.Variable((2, 2), symmetric=True), cp.Variable(2), cp.Variable()
    p.value, tau.value, s.value = np.eye(2), np.ones(2), 0.0
    matrix = rate_lmi(balanced)(p, tau, 0.0, s)
    rng = np.random.default_rng(9)
    for _ in range(50):
        z = rng.normal(size=(4, 4))
        assert excess_bound(matrix, z @ z.T * 10 ** rng.uniform(-6, 6), balanced, p, [tau], s) <= -1 + 1e-9
    assert excess_bound(matrix, -np.eye(4), balanced, p, [tau], s) == -np.inf


def test_eigenvalues_that_rounding_moved_prove_nothing():
    """A turned Jordan block of -0.01 is Hurwitz; what is computed of it has eigenvalues far to the right of 0."""
    n = 20
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    system = System(turn @ (np.eye(n, k=1) - 0.01 * np.eye(n)) @ turn.T, (), (), (), ())
    assert np.linalg.eigvals(system.a0).real.max() > 0.05
    for answer in (contraction(system), iss(system)):
        assert answer.reason == "undecided"
        assert "which rounding may have moved by" in answer.condition


def test_constants_of_an_ill_conditioned_p_are_rounded_to_the_safe_side():
    p = np.diag([1.0, 1e12])
    proven = InputToState(p, np.zeros(0), np.zeros(0), 1.0, "by hand")
    numbers = proven.derived(System(-np.eye(2), (), (), (), ()))
    assert 0.99 < numbers["c1"] < 1
    assert 1e12 < numbers["c2"] < 1.01e12
    assert numbers["gain"] > 1e6
    assert region_radius(p, 1.0, 0.0) < 1e-6


def test_certifies_where_the_cheap_tests_fail(sheared):
    parts = (tuple(map(torch.tensor, part)) for part in (sheared.a, sheared.w, sheared.alpha, sheared.beta))
    matrices = Matrices(torch.tensor(sheared.a0), *parts)
    assert mu_inf_bound(matrices) > 1
    assert mu_2_bound(matrices) > 0
    by_program = contraction(sheared, Search("semidefinite"))
    assert by_program.rate > 0.3
    assert contraction(sheared, Search("full")).rate == pytest.approx(by_program.rate, rel=5e-3)


@pytest.mark.parametrize("size", [0.3, 30.0])
def test_construction_has_its_exact_certificate(size):
    """A_j = -W_jᵀ D_j: P = I and T = D / (alpha + beta) leave -2 (epsilon - rate) I and nothing beside it."""
    rng, epsilon = np.random.default_rng(4), 0.05
    w = size * rng.normal(size=(2, K, N))
    d = rng.uniform(0.1, 2, size=(2, K))
    s = rng.normal(size=(N, N))
    system = system_of(s - s.T - epsilon * np.eye(N), tuple(-x.T * y for x, y in zip(w, d, strict=True)), tuple(w))
    t = d.ravel() / (system.stacked_alpha + system.stacked_beta)
    exact = Contraction(np.eye(N), t, 0.999 * epsilon, "by construction")
    assert exact.upper_bound(system) < 0
    for method in (None, "identity"):
        proven = contraction(system, Search(method))
        assert proven.rate >= 0.999 * epsilon
        assert proven.upper_bound(system) < 0


@pytest.mark.parametrize("method", ["semidefinite", "identity"])
def test_input_to_state_bound_holds_on_trajectories(dominant, answers, method):
    """Random bounded inputs, constant over short spells."""
    proven = answers(method)[2]
    assert isinstance(proven, InputToState)
    assert proven.upper_bound(dominant) < 0
    rng = np.random.default_rng(5)
    g = rng.normal(size=(41, N, 30))
    g *= 4 / np.linalg.norm(g, axis=1, keepdims=True)
    start = rng.normal(size=(N, 30)) * np.array([0.0, 1.0, 10.0]).repeat(10)
    x = flow(dominant, start, lambda t: (0.0, g[int(t / 0.25 + 1e-9)]), span=10.0, steps=1000)
    numbers, time = proven.derived(dominant), np.linspace(0, 10, 1001)[:, None]
    first, c2 = np.linalg.norm(start, axis=0), numbers["c2"]
    bound = c2 / numbers["c1"] * (np.exp(-time / c2) * first**2 + proven.phi * 16)
    ratio = (x**2).sum(axis=1) / bound
    assert 0.05 < ratio.max() <= 1
    split = numbers["overshoot"] * np.exp(-numbers["decay"] * time) * first + numbers["gain"] * 4
    assert (np.linalg.norm(x, axis=1) <= split).all()


def test_integral_terms_and_full_p_lower_phi(dominant, answers):
    """More freedom, less phi; of P = I times a number it is known: |x|² / rate², rate that of the sector from 0."""
    phis = [answers(method)[2].phi for method in ("semidefinite", "full", "identity")]
    assert all(less <= more * 1.001 for less, more in itertools.pairwise(phis))
    from_zero = dataclasses.replace(dominant, alpha=(np.zeros(K), np.zeros(K)))
    assert phis[-1] == pytest.approx(contraction(from_zero, Search("identity")).rate ** -2, rel=5e-3)


def test_any_slopes_and_any_unit_of_time():
    """Program and descent agree for units of many slopes and sizes; another unit of time changes numbers only."""
    rng = np.random.default_rng(8)
    a0 = -np.eye(3) + 0.2 * rng.normal(size=(3, 3))
    a, w = 0.1 * rng.normal(size=(3, 5)), rng.normal(size=(5, 3)) * np.array([0, 0.01, 1, 1, 30])[:, None]
    beta = np.array([1, 1, 0.1, 1.7, 0.04])
    slow = System(a0, (a,), (w,), (beta * np.array([0, 1, 0, 0.5, 0.9]),), (beta,))
    fast = dataclasses.replace(slow, a0=1000 * a0, a=(1000 * a,))
    by_program, by_descent = (
        (contraction(slow, search).rate, euler(slow, 0.4, search).factor, iss(slow, search).phi)
        for search in (Search("semidefinite"), Search("full"))
    )
    assert by_descent[:2] == pytest.approx(by_program[:2], rel=5e-3)
    assert by_program[2] <= 1.001 * by_descent[2] <= 1.2 * by_program[2]
    assert contraction(fast).rate == pytest.approx(1000 * by_program[0], rel=2e-3)
    assert euler(fast, 0.0004).factor == pytest.approx(by_program[1], rel=2e-3)
    assert iss(fast).phi == pytest.approx(1e-6 * by_program[2], rel=2e-3)


@pytest.mark.parametrize("method", ["semidefinite", "full", "identity"])
def test_a_better_number_than_certified_is_refused(dominant, answers, method):
    rate, step, gain = answers(method)
    assert dataclasses.replace(rate, rate=1.01 * rate.rate).upper_bound(dominant) > 0
    assert dataclasses.replace(step, factor=1 - 1.01 * (1 - step.factor)).upper_bound(dominant) > 0
    assert dataclasses.replace(gain, phi=0.99 * gain.phi).upper_bound(dominant) > 0


def test_what_is_no_proof_of_anything(dominant, found):
    other = dataclasses.replace(dominant, a0=dominant.a0 + 0.1 * np.eye(N))
    negative = np.where(np.arange(2 * K) == 3, -1e-9, found.t)
    crooked = found.p + np.eye(N, k=1)
    assert found.upper_bound(other) > 0
    for changes in ({"t": negative}, {"p": crooked}, {"p": -found.p}, {"rate": -1.0}, {"rate": float("nan")}):
        assert dataclasses.replace(found, **changes).upper_bound(dominant) == float("inf")


def test_rounding_is_counted():
    """What holds with equality only is not proven: -x² / 1e8 + x² / 1e8 is 0 up to rounding."""
    system = System(np.array([[-0.1]]), (), (), (), ())
    exact = Contraction(np.eye(1), np.zeros(0), 0.1, "by hand")
    assert 0 < exact.upper_bound(system) < 1e-12
    assert dataclasses.replace(exact, rate=0.1 * (1 - 1e-12)).upper_bound(system) < 0


def test_linear_system_contracts_at_its_slowest_eigenvalue():
    system = System(np.array([[-1.0, 5.0], [0.0, -2.0]]), (), (), (), ())
    assert contraction(system).rate == pytest.approx(1.0, rel=0.01)
    assert euler(system, 0.1).factor == pytest.approx(0.9, rel=0.01)
    phi = iss(system).phi
    assert phi >= 1.0 and phi < 40


def test_condition_8_of_the_paper_has_no_solution_for_generic_matrices():
    """However small A_j is; with A_j = -W_jᵀ D_j it has one. The certificates here exist for both."""
    a0, a, w = draw(seed=6)
    small = system_of(a0, tuple(1e-3 * x for x in a), w)
    for generic in (system_of(a0, a, w), small):
        condition = paper_condition(generic, unbounded=[False, True])
        assert not condition.feasible
        assert condition.margin == pytest.approx(0, abs=1e-5)
    constructed = system_of(a0, tuple(-1e-3 * x.T * np.linspace(0.5, 2, K) for x in w), w)
    assert paper_condition(constructed, unbounded=[False, True]).margin == pytest.approx(1, abs=1e-4)
    assert isinstance(contraction(small), Contraction)
    assert isinstance(iss(small), InputToState)
    with pytest.raises(ValueError, match="each of 2 nonlinearities, got 1"):
        paper_condition(small, unbounded=[True])


def test_a_solver_that_gives_up_is_an_answer_of_its_own(dominant):
    search = Search("semidefinite", Solver(options={"max_iter": 1}))
    for answer in (contraction(dominant, search), euler(dominant, 0.0625, search), iss(dominant, search)):
        assert isinstance(answer, Refusal)
        assert answer.reason == "numerical failure"
        assert "CLARABEL" in answer.condition
        assert answer.amount is None


@pytest.mark.parametrize(("n", "k"), [(1, 4), (3, 1), (1, 1)])
def test_one_action_or_one_unit_is_certified_like_any_other(n, k):
    rng = np.random.default_rng(n + k)
    w = 0.3 * rng.normal(size=(k, n))
    one = System(-np.eye(n), (-w.T,), (w,), (np.zeros(k),), (np.ones(k),))
    for ask, kind in ((contraction, Contraction), (functools.partial(euler, step=0.1), EulerContraction)):
        by_program, by_descent = ask(one, search=Search("semidefinite")), ask(one, search=Search("full"))
        assert isinstance(by_program, kind) and isinstance(by_descent, kind)
    assert isinstance(iss(one, Search("semidefinite")), InputToState)
    assert 0.99 < contraction(one, Search("semidefinite")).rate <= 1.0  # flat units: A0 alone
    growing = System(np.eye(n), (-w.T,), (w,), (np.zeros(k),), (np.ones(k),))
    assert contraction(growing, Search("semidefinite")).reason == "infeasible"


def test_method_by_size():
    def sized(n: int, k: int) -> System:
        return System(-np.eye(n), (np.zeros((n, k)),), (np.zeros((k, n)),), (np.zeros(k),), (np.ones(k),))

    sizes = {(6, 16): ("semidefinite",), (2, 128): ("full",), (20, 128): ("full",), (320, 128): ("diagonal",)}
    assert {size: Search().methods_for(sized(*size)) for size in sizes} == sizes
    assert Search("identity").methods_for(sized(6, 16)) == ("identity",)
    with pytest.raises(ValueError, match="method must be one of .*'semidefinite'.* got 'sdp'"):
        Search("sdp")
    with pytest.raises(ValueError, match="method='semidefinite' is for systems with units, and this one is linear"):
        contraction(System(-np.eye(2), (), (), (), ()), Search("semidefinite"))


def test_flattened_chunks_of_a_large_head_are_certified():
    """n = 144, K = 128: by descent with a diagonal P; also units without input, and with a single slope."""
    rng, n, k = np.random.default_rng(7), 144, 128
    w = rng.normal(size=(k, n)) / np.sqrt(n)
    w[0], gains, alpha = 0, rng.uniform(0, 0.1, size=k), np.zeros(k)
    gains[1], alpha[2] = 0, 1
    system = System(-0.02 * np.eye(n), (-w.T * gains,), (w,), (alpha,), (np.ones(k),))
    proven = contraction(system)
    assert proven.method == "diagonal"
    assert proven.rate >= 0.0199
    assert proven.upper_bound(system) < 0


def test_a_full_p_is_tried_where_a_diagonal_one_decides_nothing():
    """Turned, x' = [[-1, 8], [0, -1]] x needs an ellipse that no diagonal P has; the rest of n = 42 decays at once."""
    a0 = -np.eye(42)
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    a0[:2, :2] = turn @ np.array([[-1.0, 8.0], [0.0, -1.0]]) @ turn.T
    system = System(a0, (), (), (), ())
    assert Search().methods_for(system) == ("diagonal", "full")
    assert contraction(system, Search("diagonal")).reason == "undecided"
    proven = contraction(system)
    assert proven.method == "full"
    assert 0.9 < proven.rate < 1  # 1 is what an ellipse of infinite length would reach
    assert np.linalg.cond(proven.p) <= 1e8 * (1 + 1e-6)


def test_step_is_checked(dominant):
    for step in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"step must be positive and finite, got {step}"):
            euler(dominant, step)


def test_region_where_slopes_hold_in_a_ball(found):
    eigenvalues = np.linalg.eigvalsh(found.p)
    assert region_radius(found.p, 3.0, 1.0) == pytest.approx(2 * np.sqrt(eigenvalues[0] / eigenvalues[-1]))
    assert region_radius(found.p, float("inf"), 1.0) == float("inf")
    with pytest.raises(ValueError, match=r"state_radius=3.0, slope_radius=2.0"):
        region_radius(found.p, 2.0, 3.0)


def test_record_survives_json_to_the_last_bit_and_no_change(dominant):
    made = certify(dominant, 1.2, weights_sha256="ab" * 32)
    text = record.to_json(made)
    read = record.from_json(text)
    assert read.weights_sha256 == "ab" * 32
    assert (read.contraction.p == made.contraction.p).all()
    assert read.contraction.upper_bound(read.system) == made.contraction.upper_bound(dominant)
    assert read.iss.derived(read.system) == made.iss.derived(dominant)
    assert read.euler == made.euler  # a refusal
    content = json.loads(text)
    assert content["contraction"]["margin"] == -made.contraction.upper_bound(dominant) > 0
    assert content["euler"]["answer"] == "infeasible"
    content["contraction"]["p"][0][0] *= 1 + 1e-15
    with pytest.raises(ValueError, match="was changed"):
        record.from_json(json.dumps(content))
    with pytest.raises(ValueError, match="not a certificate"):
        record.from_json("[]")


def test_names_the_extra_where_cvxpy_is_absent_and_descends_without_it(dominant, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"lerobot_policy_fm_ft\[certify\]"):
        contraction(dominant, Search("semidefinite"))
    assert isinstance(contraction(dominant, Search("identity")), Contraction)
