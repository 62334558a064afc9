"""What every store of demonstrations is held to, whatever its format."""

import numpy as np
from numpy.typing import DTypeLike, NDArray

Shape = tuple[int | None, ...]
"""A wanted shape; None stands for any length."""


class StoreError(ValueError):
    """A store of demonstrations that cannot be used; the message names it and what was expected."""


def check_kind(name: str, dtype: DTypeLike, shape: tuple[int, ...], wanted: Shape, kinds: str = "fiu") -> None:
    """Refuses what is no numbers of the wanted shape.

    Args:
        name: says where.
        dtype: the type found.
        shape: the shape found.
        wanted: the shape expected.
        kinds: numpy's letters of the types that are numbers here; "b" for truth values.

    Raises:
        StoreError: the type or the shape is another.
    """
    fits = len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted, strict=True))
    if not fits or np.dtype(dtype).kind not in kinds:
        raise StoreError(f"{name} is {np.dtype(dtype)}{shape}, expected numbers of shape {show_shape(wanted)}")


def check_finite(name: str, values: NDArray) -> None:
    """Refuses NaN and Inf.

    Raises:
        StoreError: one is there; `name` says where.
    """
    if not np.isfinite(values).all():
        raise StoreError(f"{name} holds NaN or Inf")


def show_shape(shape: Shape) -> str:
    """A wanted shape in words."""
    return "(" + ", ".join("N" if size is None else str(size) for size in shape) + ")"
