"""Check a head's certificate with numpy alone: `python eval/verify_certificate.py FILE --policy FOLDER`.

Reads the head's weights from the policy's checkpoint, rebuilds its matrices and recomputes every inequality that the
certificate claims. Knows nothing of the code that made it. Ends with status 1 if anything does not hold.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]
FORMAT = 1
EPSILON = float(np.finfo(np.float64).eps)
SAME = 1e-9  # of what was computed twice, relative
SAME_MARGIN = 1e-2  # a margin is a small difference of such numbers


class Head(NamedTuple):
    """x' = A0 x + A f(W x + b) + g: all nonlinearities side by side, and the slopes of their units."""

    a0: Array
    a: Array
    w: Array
    alpha: Array
    beta: Array
    widths: list[int]

    def sizes(self) -> "Head":
        """With absolute values."""
        return Head(np.abs(self.a0), np.abs(self.a), np.abs(self.w), self.alpha, self.beta, self.widths)


def read_head(folder: Path) -> Head:
    """The averaged head of a checkpoint, or the only one.

    Raises:
        ValueError: If the checkpoint holds no such head.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    prefix = "ema_net.head." if any(name.startswith("ema_net.head.") for name in tensors) else "net.head."
    own = {
        name.removeprefix(prefix): tensor.astype(np.float64)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if not any(name.startswith("parts.") for name in own):
        raise ValueError(f"{folder} holds no head of the kind that is certified: no weights {prefix}parts.*")
    activations = config["head_activations"]
    w = [own[f"parts.w.{j}"] for j in range(len(activations))]
    widths = [len(part) for part in w]
    if "parts.a0" in own:
        a0, a = own["parts.a0"], [own[f"parts.a.{j}"] for j in range(len(w))]
    else:  # contracting by construction
        b, s = own["parts.damping"], own["parts.rotation"]
        a0 = s - s.T - (config["head_rate"] * np.eye(len(b)) + b @ b.T)
        scale = len(b) / sum(widths)
        a = [-part.T * (scale * softplus(own[f"parts.gains.{j}"])) for j, part in enumerate(w)]
    alpha = [least_slopes(name, own, j, width) for j, (name, width) in enumerate(zip(activations, widths, strict=True))]
    return Head(a0, np.hstack(a), np.vstack(w), np.concatenate(alpha), np.ones(sum(widths)), widths)


def softplus(y: Array) -> Array:
    return np.where(y > 20, y, np.log1p(np.exp(np.minimum(y, 20))))  # as torch does


def least_slopes(name: str, own: dict[str, Array], j: int, width: int) -> Array:
    """Of the units of nonlinearity j; the largest slope is 1 for all that are known."""
    if name == "prelu":
        return 1 / (1 + np.exp(-own[f"nonlinearities.{j}.leak_logit"]))
    return np.full(width, {"tanh": 0.0, "leaky_relu": 0.1}[name])


def contraction(head: Head, p: Array, t: Array, rate: float, minus: float) -> Array:
    a0, a, w, alpha, beta, _ = head
    first = a0.T @ p + p @ a0 + 2 * rate * p + minus * 2 * w.T @ np.diag(alpha * beta * t) @ w
    side = p @ a + w.T @ np.diag((alpha + beta) * t)
    return np.block([[first, side], [side.T, minus * 2 * np.diag(t)]])


def euler(head: Head, p: Array, t: Array, step: float, factor: float, minus: float) -> Array:
    a0, a, w, alpha, beta, _ = head
    f = np.eye(len(a0)) + step * a0
    first = f.T @ p @ f + minus * factor**2 * p + minus * 2 * w.T @ np.diag(alpha * beta * t) @ w
    side = step * f.T @ p @ a + w.T @ np.diag((alpha + beta) * t)
    return np.block([[first, side], [side.T, step**2 * a.T @ p @ a + minus * 2 * np.diag(t)]])


def iss(head: Head, p: Array, integral: Array, t: Array, phi: float, minus: float) -> Array:
    a0, a, w, _, beta, _ = head
    identity, lw = np.eye(len(a0)), np.diag(integral) @ w
    side = p @ a + a0.T @ lw.T + w.T @ np.diag(beta * t)
    units = lw @ a + a.T @ lw.T + minus * 2 * np.diag(t)
    first = a0.T @ p + p @ a0 + identity
    return np.block([[first, side, p], [side.T, units, lw], [p, lw.T, minus * phi * identity]])


def upper_bound(form: Callable[..., Array], head: Head, *numbers: Any) -> float:
    """At least the largest eigenvalue, scaled to the diagonal -1: negative means that it is, whatever was rounded."""
    matrix, sizes = form(head, *numbers, -1.0), form(head.sizes(), *map(np.abs, numbers), 1.0)
    scale = np.abs(np.minimum(matrix.diagonal(), 0.0))
    scale = 1 / np.sqrt(np.where(scale > 0, scale, 1.0))
    rounding = 8 * len(matrix) * EPSILON * (np.outer(scale, scale) * sizes).sum(axis=1).max()
    return float(np.linalg.eigvalsh(np.outer(scale, scale) * matrix)[-1] + rounding)


def extremes(p: Array) -> tuple[float, float]:
    """A bound from below of the least, and one from above of the largest eigenvalue of a symmetric matrix."""
    eigenvalues = np.linalg.eigvalsh(p)
    rounding = 8 * len(p) * EPSILON * np.abs(p).sum(axis=1).max()
    return float(eigenvalues[0] - rounding), float(eigenvalues[-1] + rounding)


def derived(head: Head, name: str, p: Array, integral: Array, phi: float) -> dict[str, float]:
    """The constants that follow from a proof."""
    least, largest = extremes(p)
    if name != "iss":
        return {"region_factor": math.sqrt(least / largest)}
    ends = np.cumsum(head.widths)[:-1]
    parts = zip(np.split(head.w, ends), np.split(integral * head.beta, ends), strict=True)
    c2 = largest + sum(extremes(w.T @ np.diag(weight) @ w)[1] for w, weight in parts)
    ratio = c2 / least
    gain = math.sqrt(ratio * phi)
    return {"c1": least, "c2": c2, "overshoot": math.sqrt(ratio), "decay": 1 / (2 * c2), "gain": gain}


INEQUALITIES: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "contraction": (contraction, ("p", "t", "rate")),
    "euler": (euler, ("p", "t", "step", "factor")),
    "iss": (iss, ("p", "integral", "t", "phi")),
}


def verify(head: Head, name: str, entry: dict[str, Any]) -> float:
    """Recompute one claim.

    Returns:
        The margin: how far the inequality stays below zero.

    Raises:
        ValueError: If anything does not hold.
    """
    form, names = INEQUALITIES[name]
    shapes = {"p": head.a0.shape, "t": head.beta.shape, "integral": head.beta.shape}
    numbers = {key: np.asarray(entry[key], dtype=np.float64) for key in names}
    for key, value in numbers.items():
        if value.shape != shapes.get(key, ()) or not np.isfinite(value).all():
            raise ValueError(f"{name}: {key} must be finite numbers of the shape {shapes.get(key, ())}")
        if key != "p" and (value < 0).any():
            raise ValueError(f"{name}: {key} must not be negative")
    p = numbers["p"]
    if (p != p.T).any() or not extremes(p)[0] > 0:
        raise ValueError(f"{name}: P is not symmetric and positive definite")
    if not (numbers.get("rate", 1) > 0 and numbers.get("factor", 0) < 1 and numbers.get("step", 1) > 0):
        raise ValueError(f"{name}: claims nothing, see its rate, factor or step")
    bound = upper_bound(form, head, *numbers.values())
    if not bound < 0:
        raise ValueError(f"{name}: the inequality does not hold, its largest scaled eigenvalue may be {bound:.3g}")
    constants = derived(head, name, p, numbers.get("integral", np.zeros(0)), float(numbers.get("phi", 0.0)))
    for key, constant in constants.items():
        if not math.isclose(entry["derived"][key], constant, rel_tol=SAME):
            raise ValueError(f"{name}: {key} is {constant:.9g}, the certificate says {entry['derived'][key]}")
    if not math.isclose(entry["margin"], -bound, rel_tol=SAME_MARGIN, abs_tol=SAME * SAME_MARGIN):
        raise ValueError(f"{name}: the margin is {-bound:.3g}, the certificate says {entry['margin']}")
    return -bound


def check_binding(content: dict[str, Any], folder: Path, head: Head) -> None:
    """That the certificate is whole, and speaks of this checkpoint and of the step that it is deployed with.

    Raises:
        ValueError: If not.
    """
    checksum = content.pop("checksum", None)
    compact = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if hashlib.sha256(compact.encode()).hexdigest() != checksum:
        raise ValueError("the certificate was changed after it was written: its checksum does not fit")
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if content["weights_sha256"] != weights:
        raise ValueError(f"the certificate is for weights {content['weights_sha256']}, the checkpoint's are {weights}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    step = config["head_span"] / config["head_steps"]
    if content["euler"]["answer"] == "certified" and not math.isclose(content["euler"]["step"], step, rel_tol=SAME):
        raise ValueError(f"the certificate is for Euler steps of {content['euler']['step']}, the head takes {step}")
    system = content["system"]
    stacked = {"a0": system["a0"], "a": np.hstack(system["a"]), "w": np.vstack(system["w"])}
    stacked |= {key: np.concatenate(system[key]) for key in ("alpha", "beta")}
    for key, said in stacked.items():
        own = getattr(head, key)
        if np.shape(said) != own.shape or not np.allclose(said, own, rtol=0, atol=SAME * np.abs(own).max(initial=1e-9)):
            raise ValueError(f"the certificate's {key} is not the checkpoint's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("certificate", type=Path, metavar="FILE", help="JSON document of the certificate")
    parser.add_argument("--policy", type=Path, required=True, help="folder with config.json and model.safetensors")
    args = parser.parse_args()
    try:
        content = json.loads(args.certificate.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{args.certificate} is no certificate of format {FORMAT}")
        head = read_head(args.policy)
        check_binding(content, args.policy, head)
        claims = {name: content[name] for name in INEQUALITIES}
        proven = {name: verify(head, name, entry) for name, entry in claims.items() if entry["answer"] == "certified"}
    except KeyError as error:
        raise SystemExit(f"verify_certificate.py: lacks {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"verify_certificate.py: {error}") from error
    for name, entry in claims.items():
        if name in proven:
            numbers = {key: entry[key] for key in ("rate", "step", "factor", "phi") if key in entry} | entry["derived"]
            text = "  ".join(f"{key} {value:.6g}" for key, value in numbers.items())
            print(f"{name}: holds, with a margin of {proven[name]:.2g}\n  {text}")
        else:
            print(f"{name}: not claimed, {entry['answer']}: {entry['condition']} {entry['amount']} (not checked)")
    if not proven:
        raise SystemExit("verify_certificate.py: the certificate claims nothing")


if __name__ == "__main__":
    main()
