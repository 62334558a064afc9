"""What the tests of trainings and samples share."""

from collections.abc import Callable

import pytest

from fm_policy.images.data import Images, digits
from fm_policy.slices import Clock


class _After(Clock):
    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_up(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture(scope="session")
def after() -> Callable[[int], Clock]:
    """Makes clocks that are up after so many looks at them."""
    return _After


@pytest.fixture(scope="session")
def images() -> Images:
    """The digits."""
    return digits()
