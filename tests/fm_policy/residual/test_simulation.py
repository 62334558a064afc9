"""Simulated pairs and trajectories where the answer is known, and against numbers that are too good."""

import dataclasses

import numpy as np
import pytest
import torch

from fm_policy.residual.certificate import Search, certify
from fm_policy.residual.control_synth import ControlSynth
from fm_policy.residual.record import EulerContraction, Record, Refusal
from fm_policy.residual.simulation import KINDS, Simulated, simulate

STEP = 0.0625


def certified(head: ControlSynth, method: str = "full") -> Record:
    record = certify(head.system(), STEP, "", Search(method))
    assert not isinstance(record.contraction, Refusal)
    return record


@pytest.fixture(scope="module")
def checked(make) -> tuple[Record, Simulated]:
    """A head whose units matter: without them its A0 contracts several times as fast."""
    head = make.head(mode="free", rate=1.0)
    torch.nn.init.normal_(head.parts.a[0], std=0.1)
    torch.nn.init.normal_(head.parts.a[1], std=0.1)
    record = certified(head)
    return record, simulate(head, STEP, record, pairs=600)


def linear(a0: list[list[float]]) -> ControlSynth:
    """x' = A0 x + g: a fresh head has A_j = 0."""
    head = ControlSynth(len(a0), 5, 4, mode="free", width=2, input_width=4).double()
    head.parts.a0.data = torch.tensor(a0, dtype=torch.float64)
    return head


def test_every_pair_of_a_linear_head_does_what_its_matrix_says():
    """A normal matrix, P = I: |F d| for the Euler step F, between its singular values, both known."""
    turning = [[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.0], [0.0, 0.0, -4.0]]
    head = linear(turning)
    answer = Refusal("undecided", "not asked", None, "none")
    asked = EulerContraction(np.eye(3), np.zeros(4), STEP, 0.99, "by hand")
    done = simulate(head, STEP, Record(head.system(), answer, asked, answer, ""), pairs=300)
    slow, fast = np.hypot(1 - 0.5 * STEP, 2 * STEP), 1 - 4 * STEP
    for kind in KINDS:
        assert done.factor[kind].shape[0] == 12
        assert fast - 1e-9 <= done.factor[kind].min() <= done.factor[kind].max() <= slow + 1e-9
        assert 0.5 - 1e-9 <= done.rate[kind].min() <= done.rate[kind].max() <= 4 + 1e-9
    assert done.factor["slowest"].min() == pytest.approx(slow, abs=1e-9)
    assert done.factor["close"][0].min() < 0.9 * slow
    assert done.reach is None


def test_nothing_exceeds_a_certificate_and_the_worst_pairs_come_near(checked):
    record, done = checked
    assert done.violations(record) == []
    assert all(part.shape[1] >= 200 for part in done.factor.values())
    factor, rate = record.euler.factor, record.contraction.rate
    assert done.factor["slowest"].max() > done.factor["far"].max()
    assert (1 - done.factor["slowest"].max()) / (1 - factor) < 1.3
    assert done.rate["slowest"].min() / rate < 1.3
    assert 0.05 < done.reach.max() <= 1


@pytest.mark.parametrize(
    ("name", "by", "message"),
    [
        ("euler", lambda euler: {"factor": 1 - 1.5 * (1 - euler.factor)}, "a pair grew by"),
        ("contraction", lambda contraction: {"rate": 1.5 * contraction.rate}, "a pair approached at the rate"),
    ],
)
def test_a_number_that_is_too_good_is_a_violation(checked, name, by, message):
    record, done = checked
    answer = getattr(record, name)
    forged = dataclasses.replace(record, **{name: dataclasses.replace(answer, **by(answer))})
    assert [message in violation for violation in done.violations(forged)] == [True]


def test_the_bound_of_input_to_state_stability_is_reached_by_a_scalar_and_a_smaller_one_broken():
    """x' = -2 x + g: |x| tends to 1/2 sup |g|, which is what phi says; so 0.9 phi is no bound."""
    head = linear([[-2.0]])
    record = certified(head)
    assert record.iss.phi == pytest.approx(0.25, rel=1e-3)
    done = simulate(head, STEP, record, pairs=30)
    assert 0.95 < done.reach.max() <= 1
    assert done.violations(record) == []
    forged = dataclasses.replace(record, iss=dataclasses.replace(record.iss, phi=0.9 * record.iss.phi))
    assert ["of its bound" in text for text in simulate(head, STEP, forged, pairs=30).violations(forged)] == [True]


def test_the_seed_decides_and_the_head_stays_as_it_is(make):
    head = make.head(std=0.1).float()
    record = certified(head, "identity")
    one, again, other = (simulate(head, STEP, record, pairs=30, seed=seed) for seed in (0, 0, 1))
    assert all((one.factor[kind] == again.factor[kind]).all() for kind in KINDS)
    assert (one.reach == again.reach).all()
    assert not (one.factor["close"] == other.factor["close"]).all()
    assert next(head.parameters()).dtype == torch.float32


def test_the_states_of_a_flattened_chunk_are_one_state(make):
    head = make.head(std=0.05, layout="chunk")
    record = certified(head, "identity")
    done = simulate(head, STEP, record, pairs=30)
    assert done.factor["far"].shape == (12, 10)
    assert done.violations(record) == []
