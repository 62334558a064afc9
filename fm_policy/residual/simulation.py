"""Simulated pairs and trajectories of a head, held against what its certificates claim of all of them.

A certificate speaks for every pair of states under every common input. Far pairs alone would hardly try it: a head
contracts least between states that are close, and in one direction. So two thirds of the pairs are infinitely close,
by the derivative of the velocity, and half of these lie along what the next step shrinks least. Inputs and states are
drawn over decades of sizes, since biases that saturate all units, or none, are what changes the Jacobian.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fm_policy.residual.control_synth import ControlSynth
from fm_policy.residual.record import InputToState, Record, Refusal
from fm_policy.residual.system import Array

KINDS = ("far", "close", "slowest")  # a finite difference apart; infinitely close; and that in the worst direction
TOLERANCE = 1e-9  # relative: double precision, in differences of states a hundred times as large
LARGEST_BATCH = 4_000_000  # numbers in the Jacobians of a batch
LONGEST = 1000  # Runge-Kutta steps

Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Simulated:
    """What pairs and trajectories did, as far as there is a claim to hold it against, and beyond."""

    factor: dict[str, Array]
    """By kind of pair: |x - y|_P after an Euler step over that before, `(steps, pairs)`; P of the record's `euler`."""
    rate: dict[str, Array]
    """By kind of pair: -d/dt log |x - y|_P along the flow, `(steps, pairs)`; P of the record's `contraction`."""
    reach: Array | None
    """|x(time)|² over its bound, `(times, trajectories)`; None where input-to-state stability is not certified."""

    def violations(self, record: Record) -> list[str]:
        """What exceeds a certified number by more than `TOLERANCE`, in words; it should be nothing."""
        found = []
        if not isinstance(record.euler, Refusal):
            worst, certified = max(part.max() for part in self.factor.values()), record.euler.factor
            if not worst <= certified * (1 + TOLERANCE):
                found.append(f"a pair grew by {worst:.9g} in an Euler step, certified is {certified:.9g}")
        if not isinstance(record.contraction, Refusal):
            worst, certified = min(part.min() for part in self.rate.values()), record.contraction.rate
            if not worst >= certified * (1 - TOLERANCE) - TOLERANCE:
                found.append(f"a pair approached at the rate {worst:.9g}, certified is {certified:.9g}")
        if self.reach is not None and not self.reach.max() <= 1 + 1e-6:  # Runge-Kutta's own error
            found.append(f"|x|² reached {self.reach.max():.9g} of its bound under a bounded input")
        return found


def simulate(head: ControlSynth, step: float, record: Record, pairs: int = 10_000, seed: int = 0) -> Simulated:
    """Pairs over 12 Euler steps, and 100 trajectories under bounded inputs, of the head in double precision.

    Args:
        head: The head; it is copied.
        step: Its Euler step, in units of time.
        record: The answers whose norms and constants are used; the identity stands in for the P of a refusal.
        pairs: About how many pairs, of all kinds together.
        seed: Of states, inputs and differences.
    """
    head = copy.deepcopy(head).double()
    # Each claim in its own norm.
    factor, _ = _pair_growth(head, step, getattr(record.euler, "p", np.eye(head.n)), pairs, seed)
    _, rate = _pair_growth(head, step, getattr(record.contraction, "p", np.eye(head.n)), pairs, seed)
    reach = None if isinstance(record.iss, Refusal) else _reach(head, record, record.iss, seed)
    return Simulated(factor, rate, reach)


@torch.no_grad()
def _pair_growth(
    head: ControlSynth, step: float, p: Array, pairs: int, seed: int, steps: int = 12
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Factors of Euler steps and rates of the flow, by kind, under inputs that change at every step."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.from_numpy(p)
    many = math.ceil(pairs / (len(KINDS) * head.states))
    factors: dict[str, Array] = {}
    rates: dict[str, Array] = {}
    for kind in KINDS:
        grown, approached = [], []
        few = math.ceil(LARGEST_BATCH / (head.states * head.n**2))
        chunks = min(many, few) if kind == "slowest" else many
        x = _sized(generator, -1, 1, chunks, *head.chunk_shape)
        apart = _sized(generator, -1, 1, chunks, *head.chunk_shape)
        length = _norm(metric, apart)
        for _ in range(steps):
            v = _field(head, _sized(generator, -1, 1.5, chunks, head.obs_dim))
            if kind == "far":
                pull = v(x + apart) - v(x)
            else:
                push = _linearised(v, x)
                apart = _slowest(push, x.shape, step, metric) if kind == "slowest" else apart
                pull = push(apart)
            after, before = apart + step * pull, _norm(metric, apart)
            inner = (_states(metric, apart) @ metric * _states(metric, pull)).sum(dim=-1)
            grown.append((_norm(metric, after) / before).numpy())
            approached.append((-inner / before.square()).numpy())
            # Back to the length of the start: what is far stays far, and nothing is lost to cancellation.
            apart = _states(metric, after) * (length / _norm(metric, after))[:, None]
            x, apart = x + step * v(x), apart.view(x.shape)
        factors[kind], rates[kind] = np.stack(grown), np.stack(approached)
    return factors, rates


def _linearised(v: Field, x: Tensor) -> Field:
    """The map d -> J d at x: reverse differentiation of u -> Jᵀ u, which is linear in u."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = v(x)
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, u, create_graph=True)
    return lambda d: torch.autograd.grad(pulled, u, d, retain_graph=True)[0]


def _slowest(push: Field, shape: torch.Size, step: float, metric: Tensor) -> Tensor:
    """The directions that an Euler step shrinks least in |.|_P, one for each state: P = L Lᵀ makes it |Lᵀ .|."""
    identity = torch.eye(len(metric), dtype=metric.dtype)
    columns = [_states(metric, push(unit.repeat(shape.numel() // len(unit)).view(shape))) for unit in identity]
    f = identity + step * torch.stack(columns, dim=-1)
    root = torch.linalg.cholesky(metric)
    back = torch.linalg.inv(root)
    moved = root.T @ f @ back.T
    return (torch.linalg.eigh(moved.mT @ moved).eigenvectors[..., -1] @ back).view(shape)


@torch.no_grad()
def _reach(head: ControlSynth, record: Record, proven: InputToState, seed: int, count: int = 100) -> Array:
    """|x|² over its bound along the flow: x' = v(x) - v(0) + g with |g| <= 1, over 4 c2 or as long as steps last.

    Biases are constant, as the certificate has it. Half of the inputs are random and change 20 times, the others push
    along P x, as hard as they may. Starts are 0, or larger by decades.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers, metric, system = proven.derived(record.system), torch.from_numpy(proven.p), record.system
    units = np.linalg.norm(system.stacked_a * system.stacked_beta) * np.linalg.norm(system.stacked_w)
    h = 0.5 / float(np.linalg.norm(system.a0, 2) + units)  # |J| h <= 1/2
    steps = min(math.ceil(4 * numbers["c2"] / h), LONGEST)
    chunks = math.ceil(count / head.states)
    v = _field(head, _sized(generator, -1, 1.5, chunks, head.obs_dim))
    x = _sized(generator, -2, 1, chunks, *head.chunk_shape) * (torch.arange(chunks) % 3 > 0).view(-1, 1, 1)
    rest = v(torch.zeros_like(x))
    spells = _states(metric, _sized(generator, 0, 0, chunks * 20, *head.chunk_shape)).view(20, -1, head.n)
    spells /= spells.norm(dim=-1, keepdim=True)
    pushed = (torch.arange(spells.shape[1]) % 2 > 0)[:, None]

    def slope(state: Tensor, spell: Tensor) -> Tensor:
        along = _states(metric, state) @ metric
        length = along.norm(dim=-1, keepdim=True)
        return v(state) - rest + torch.where(pushed & (length > 0), along / length, spell).view(state.shape)

    first = _states(metric, x).square().sum(dim=-1)
    ratios = []
    for i in range(steps + 1):
        faded = math.exp(-i * h / numbers["c2"]) * first
        bound = numbers["c2"] / numbers["c1"] * (faded + proven.phi)
        ratios.append((_states(metric, x).square().sum(dim=-1) / bound).numpy())
        spell = spells[20 * i // (steps + 1)]
        k1 = slope(x, spell)
        k2 = slope(x + h / 2 * k1, spell)
        k3 = slope(x + h / 2 * k2, spell)
        k4 = slope(x + h * k3, spell)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return np.stack(ratios)


def _field(head: ControlSynth, o: Tensor) -> Field:
    v = head.bind(o)
    return lambda x: v(1.0, x)


def _sized(generator: torch.Generator, low: float, high: float, count: int, *shape: int) -> Tensor:
    """Normal numbers times 10^u, u uniform between `low` and `high`, one for each of `count`."""
    decades = low + (high - low) * torch.rand(count, *(1 for _ in shape), generator=generator, dtype=torch.float64)
    return 10**decades * torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def _states(metric: Tensor, chunks: Tensor) -> Tensor:
    return chunks.reshape(-1, len(metric))


def _norm(metric: Tensor, chunks: Tensor) -> Tensor:
    """|x|_P of every state."""
    states = _states(metric, chunks)
    return (states @ metric * states).sum(dim=-1).sqrt()
