"""What a search for a certificate answered, and the file that keeps it."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fm_policy.residual import inequalities
from fm_policy.residual.inequalities import extremes, is_nonnegative, is_positive_definite
from fm_policy.residual.system import Array, System

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Contraction:
    """Proof that |x - y|_P <= e^(-rate time) |x(0) - y(0)|_P for two solutions under one input."""

    p: Array
    """P, `(n, n)`."""
    t: Array
    """The diagonal of T, `(K,)`."""
    rate: float
    """Per unit of time, positive."""
    method: str
    """How it was found."""

    def upper_bound(self, system: System) -> float:
        """`inequalities.upper_bound` for this system: negative if, and only if, this proves the claim for it."""
        if not (self.rate > 0 and is_positive_definite(self.p) and is_nonnegative(self.t)):
            return math.inf
        return inequalities.upper_bound(inequalities.contraction, system, self.p, self.t, self.rate)

    def derived(self, system: System) -> dict[str, float]:
        """`region_factor`, see `region_factor`."""
        return {"region_factor": region_factor(self.p)}


@dataclass(frozen=True, eq=False)
class EulerContraction:
    """Proof that one Euler step shrinks |x - y|_P to `factor` times that, at most."""

    p: Array
    """P, `(n, n)`."""
    t: Array
    """The diagonal of T, `(K,)`."""
    step: float
    """In units of time."""
    factor: float
    """Per step, below 1."""
    method: str
    """How it was found."""

    def upper_bound(self, system: System) -> float:
        """`inequalities.upper_bound` for this system: negative if, and only if, this proves the claim for it."""
        claims = self.step > 0 and 0 <= self.factor < 1
        if not (claims and is_positive_definite(self.p) and is_nonnegative(self.t)):
            return math.inf
        return inequalities.upper_bound(inequalities.euler, system, self.p, self.t, self.step, self.factor)

    def derived(self, system: System) -> dict[str, float]:
        """`region_factor`, see `region_factor`."""
        return {"region_factor": region_factor(self.p)}


@dataclass(frozen=True, eq=False)
class InputToState:
    """Proof that |x(time)|² <= c2 / c1 e^(-time / c2) |x(0)|² + c2 phi / c1 sup |g|², and the constants."""

    p: Array
    """P, `(n, n)`."""
    integral: Array
    """The diagonal of Lambda, `(K,)`: zero where V has no integral of that unit."""
    t: Array
    """The diagonal of T, `(K,)`."""
    phi: float
    method: str
    """How it was found."""

    def upper_bound(self, system: System) -> float:
        """`inequalities.upper_bound` for this system: negative if, and only if, this proves the claim for it."""
        multipliers = np.concatenate([self.integral, self.t])
        if not (self.phi > 0 and is_positive_definite(self.p) and is_nonnegative(multipliers)):
            return math.inf
        return inequalities.upper_bound(inequalities.iss, system, self.p, self.integral, self.t, self.phi)

    def derived(self, system: System) -> dict[str, float]:
        """The constants of the bound: c1, c2; and of |x| <= overshoot e^(-decay time) |x(0)| + gain sup |g|."""
        c1, c2 = extremes(self.p)
        first = 0
        for w, beta in zip(system.w, system.beta, strict=True):
            part = self.integral[first : first + len(w)] * beta
            c2 += extremes((w.T * part) @ w)[1]
            first += len(w)
        ratio = c2 / c1
        return {
            "c1": c1,
            "c2": c2,
            "overshoot": math.sqrt(ratio),
            "decay": 1 / (2 * c2),
            "gain": math.sqrt(ratio * self.phi),
        }


@dataclass(frozen=True)
class Refusal:
    """No certificate, and why.

    `infeasible`: there is none under the conditions that are named. `undecided`: this search found none, and did not
    show that there is none. `numerical failure`: the solver broke down, which says nothing about the system.
    """

    reason: Literal["infeasible", "undecided", "numerical failure"]
    condition: str
    """What fails."""
    amount: float | None
    """By how much: the number that should have been negative; None if there is none."""
    method: str
    """What was tried."""


Answer = Contraction | EulerContraction | InputToState | Refusal


@dataclass(frozen=True, eq=False)
class Record:
    """All answers for the system of one file of weights."""

    system: System
    contraction: Contraction | Refusal
    euler: EulerContraction | Refusal
    iss: InputToState | Refusal
    weights_sha256: str
    """Of the file that holds the head's weights."""


def region_factor(p: Array) -> float:
    """sqrt(lambda_min(P) / lambda_max(P)): the largest ball inside a level set of V, over the smallest around it.

    From below, rounding counted; P > 0 by `inequalities.is_positive_definite`.
    """
    least, largest = extremes(p)
    return math.sqrt(least / largest)


def region_radius(p: Array, slope_radius: float, state_radius: float) -> float:
    """How far from x(0) another start may lie so that contraction is proven, where slopes hold in a ball only.

    If the slopes hold wherever |x| <= slope_radius, and |x(t)| <= state_radius by the bound of input-to-state
    stability, then all starts within this radius contract to x(t) (Khalil, Nonlinear Systems, Theorem 4.9). Slopes of
    tanh and of leaky ReLUs hold everywhere, and so does the contraction then: `slope_radius` may be infinite.

    Args:
        p: P, `(n, n)`.
        slope_radius: Where the slopes hold.
        state_radius: Where the solution stays.

    Returns:
        The radius, in the unit of x.

    Raises:
        ValueError: If not 0 <= state_radius < slope_radius.
    """
    if not 0 <= state_radius < slope_radius:
        raise ValueError(
            f"needs 0 <= state_radius < slope_radius, got state_radius={state_radius}, slope_radius={slope_radius}"
        )
    return (slope_radius - state_radius) * region_factor(p)


def to_json(record: Record) -> str:
    """The record as a JSON document: every number in full, each answer's margin, and a checksum over all of it."""
    content = {
        "format": FORMAT,
        "weights_sha256": record.weights_sha256,
        "system": _plain(dataclasses.asdict(record.system)),
        "contraction": _answer(record.contraction, record.system),
        "euler": _answer(record.euler, record.system),
        "iss": _answer(record.iss, record.system),
    }
    return json.dumps(content | {"checksum": checksum(content)}, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> Record:
    """The record of a document that `to_json` wrote.

    Raises:
        ValueError: If it is no such document, or was changed since.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a certificate of format {FORMAT}")
    if content.pop("checksum", None) != checksum(content):
        raise ValueError("the certificate was changed after it was written: its checksum does not fit")
    return Record(
        system=System(**content["system"]),
        contraction=_read(Contraction, content["contraction"]),
        euler=_read(EulerContraction, content["euler"]),
        iss=_read(InputToState, content["iss"]),
        weights_sha256=content["weights_sha256"],
    )


def checksum(content: dict[str, Any]) -> str:
    """sha256 of the content as compact JSON with sorted keys, floats as Python prints them."""
    compact = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(compact.encode()).hexdigest()


def _answer(answer: Answer, system: System) -> dict[str, Any]:
    fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    if isinstance(answer, Refusal):
        return {"answer": fields.pop("reason"), **fields}
    margin = -answer.upper_bound(system)
    return {"answer": "certified", **_plain(fields), "margin": margin, "derived": answer.derived(system)}


def _read[A: (Contraction, EulerContraction, InputToState)](kind: type[A], entry: dict[str, Any]) -> A | Refusal:
    if entry["answer"] != "certified":
        return Refusal(entry["answer"], entry["condition"], entry["amount"], entry["method"])
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = entry[field.name]
        values[field.name] = np.asarray(value, dtype=np.float64) if isinstance(value, list) else value
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
