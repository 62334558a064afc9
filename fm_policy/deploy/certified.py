"""What the certificate of a head, by `eval/certify.py`, says of the chunks that leave it."""

import hashlib
import math
from typing import Any

from fm_policy.deploy.graph import Policy
from fm_policy.residual.record import EulerContraction, InputToState, Record, Refusal, from_json

FILE = "certificate.json"


def certified(checkpoint: Policy) -> dict[str, Any] | None:
    """Bounds of the chunk, and the same as sentences; None if no certificate lies beside the checkpoint.

    Both bound the normalised state x behind the head (one action of a chunk, or the chunk as a whole) by the state
    before it and by g, the head's velocity at x = 0, which the observation decides: |x| <= `before` |x(1)| + `gain`
    |g|. `iss` is of the head as an ODE, and `euler` of the steps that the graph takes.

    Raises:
        ValueError: If the certificate was changed, does not hold, or is of other weights.
    """
    file = checkpoint.path / FILE
    if not file.exists():
        return None
    try:
        record = from_json(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be relied on: {error!r}") from error
    weights = hashlib.sha256((checkpoint.path / "model.safetensors").read_bytes()).hexdigest()
    if record.weights_sha256 != weights:
        raise ValueError(f"{file} certifies other weights than those beside it: certify again")
    config = checkpoint.policy.config
    bounds = {"iss": _iss(record, config.head_span), "euler": _euler(record, config.head_span, config.head_steps)}
    x = "an action, normalised" if config.head_layout == "shared" else "a chunk, normalised"
    return {"weights_sha256": weights, **bounds, "claims": [_claim(name, bound, x) for name, bound in bounds.items()]}


def _iss(record: Record, span: float) -> dict[str, Any]:
    """|x(1 + T)| <= overshoot e^(-decay T) |x(1)| + gain sup |g|."""
    answer = record.iss
    if isinstance(answer, Refusal):
        return {"answer": answer.reason}
    _check(answer, record)
    derived = answer.derived(record.system)
    # The root of a sum is at most the sum of the roots: the bound of |x|² is one of |x|.
    before = derived["overshoot"] * math.exp(-derived["decay"] * span)
    return {"answer": "certified", "before": before, "gain": derived["gain"]}


def _euler(record: Record, span: float, steps: int) -> dict[str, Any]:
    """A step maps 0 to h g and contracts by r in P: |x_N|_P <= r^N |x_0|_P + h (1 + r + ... + r^(N-1)) |g|_P."""
    answer, h = record.euler, span / steps
    if isinstance(answer, Refusal):
        return {"answer": answer.reason}
    _check(answer, record)
    if not math.isclose(answer.step, h):
        return {"answer": f"certified for steps of {answer.step}, while the head takes steps of {h}"}
    norm = 1 / answer.derived(record.system)["region_factor"]
    powers = [answer.factor**n for n in range(steps + 1)]
    return {"answer": "certified", "before": norm * powers[-1], "gain": norm * h * sum(powers[:-1])}


def _check(answer: EulerContraction | InputToState, record: Record) -> None:
    if not answer.upper_bound(record.system) < 0:
        raise ValueError(f"{FILE} claims what its own matrices do not prove: {type(answer).__name__}")


def _claim(name: str, bound: dict[str, Any], x: str) -> str:
    subject = {"iss": "the head as an ODE (ISS)", "euler": "the head's steps in the graph"}[name]
    if "gain" not in bound:
        return f"{subject}: {bound['answer']}"
    return (
        f"{subject}: |x| <= {bound['before']:.6g} |x before the head| + {bound['gain']:.6g} |g|, "
        f"x {x}, g the head's velocity at x = 0"
    )
