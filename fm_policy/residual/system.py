"""What a stability certificate speaks of: the matrices of eq. (7) of arXiv 2510.02081 and the slopes of its units."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class System:
    """x' = A0 x + sum_j A_j f_j(W_j x + b_j) + g, with x in R^n and f_j acting on each of its k_j units.

    The biases b_j and the drive g may depend on the input and are left out: at any fixed input,
    f_j(y + b_j) - f_j(b_j) has the slopes of f_j, and A_j f_j(b_j) counts as a part of g.

    Anything that numpy reads as numbers may be passed; it is kept in double precision.

    Args:
        a0: `(n, n)`.
        a: A_j, `(n, k_j)` each; empty for a linear system.
        w: W_j, `(k_j, n)` each.
        alpha: Least slope of each unit of f_j, `(k_j,)` each, at least 0.
        beta: Largest slope of each unit of f_j, `(k_j,)` each, at least `alpha`.

    Raises:
        ValueError: If the shapes do not fit, a number is not finite, or not 0 <= alpha <= beta.
    """

    a0: Array
    a: tuple[Array, ...]
    w: tuple[Array, ...]
    alpha: tuple[Array, ...]
    beta: tuple[Array, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "a0", np.asarray(self.a0, dtype=np.float64))
        for name in ("a", "w", "alpha", "beta"):
            object.__setattr__(self, name, tuple(np.asarray(part, dtype=np.float64) for part in getattr(self, name)))
        self._check_shapes()
        self._check_numbers()

    @property
    def n(self) -> int:
        """Numbers in the state x."""
        return len(self.a0)

    @property
    def stacked_a(self) -> Array:
        """All A_j side by side, `(n, K)` with K = sum_j k_j."""
        return np.concatenate([np.zeros((self.n, 0)), *self.a], axis=1)

    @property
    def stacked_w(self) -> Array:
        """All W_j below each other, `(K, n)`."""
        return np.concatenate([np.zeros((0, self.n)), *self.w])

    @property
    def stacked_alpha(self) -> Array:
        """The least slope of every unit, `(K,)`."""
        return np.concatenate([np.zeros(0), *self.alpha])

    @property
    def stacked_beta(self) -> Array:
        """The largest slope of every unit, `(K,)`."""
        return np.concatenate([np.zeros(0), *self.beta])

    def _check_shapes(self) -> None:
        if self.a0.ndim != 2 or self.a0.shape[0] != self.a0.shape[1] or not self.a0.size:
            raise ValueError(f"A0 must be a square matrix, got the shape {self.a0.shape}")
        counts = {name: len(getattr(self, name)) for name in ("a", "w", "alpha", "beta")}
        if len(set(counts.values())) > 1:
            raise ValueError(f"a, w, alpha and beta need one entry for each nonlinearity f_j, got {counts}")
        for j, (a, w, alpha, beta) in enumerate(zip(self.a, self.w, self.alpha, self.beta, strict=True)):
            k = a.shape[-1] if a.ndim else 0
            expected = {"A": (self.n, k), "W": (k, self.n), "alpha": (k,), "beta": (k,)}
            got = {"A": a.shape, "W": w.shape, "alpha": alpha.shape, "beta": beta.shape}
            if got != expected:
                raise ValueError(f"nonlinearity {j} of a system with n={self.n} has the shapes {got}, not {expected}")

    def _check_numbers(self) -> None:
        named: dict[str, Sequence[Array]] = {"a0": (self.a0,), "a": self.a, "w": self.w}
        named |= {"alpha": self.alpha, "beta": self.beta}
        for name, parts in named.items():
            if not all(np.isfinite(part).all() for part in parts):
                raise ValueError(f"{name} holds numbers that are not finite")
        for j, (alpha, beta) in enumerate(zip(self.alpha, self.beta, strict=True)):
            if not ((alpha >= 0) & (alpha <= beta)).all():
                raise ValueError(
                    f"the slopes of nonlinearity {j} must satisfy 0 <= alpha <= beta, got alpha={alpha}, beta={beta}"
                )
