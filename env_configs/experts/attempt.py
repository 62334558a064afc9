"""What a scripted expert gives back."""

from dataclasses import dataclass

from numpy.typing import NDArray


@dataclass(frozen=True)
class Attempt:
    """One try of a scripted expert; one seed is one attempt, bit for bit.

    Attributes:
        columns: name of each of the task's features -> (T, *shape): what was observed before each action, the
            action, and what it led to.
        task: what was done, in words.
        success: whether the environment itself called it a success.
        progress: the environment's own measures of the last step, 0.0 or 1.0 for each part of the task.
    """

    columns: dict[str, NDArray]
    task: str
    success: bool
    progress: dict[str, float]
