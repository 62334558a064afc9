"""Why a configuration is refused, told where draccus, which reads the flags of LeRobot's programs, keeps it back."""

import functools
import logging
from typing import Any


def tell_refusals(config: type[Any]) -> None:
    """Let a dataclass log what its `__post_init__` refuses, before the error goes up.

    draccus says of it only that it "couldn't instantiate" the class: neither the setting nor what was expected.
    """
    check = config.__post_init__

    @functools.wraps(check)
    def tell(self: Any) -> None:
        try:
            check(self)
        except ValueError as error:
            logging.getLogger(__name__).error("%s: %s", config.__name__, error)
            raise

    config.__post_init__ = tell
