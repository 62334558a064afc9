"""What the parts of the command line share: how they refuse, and how they read a flag of LeRobot's."""

from collections.abc import Sequence
from itertools import pairwise


class UsageError(ValueError):
    """The words on the command line do not say what to do; the message says what would."""


def value_of(flags: Sequence[str], name: str) -> str | None:
    """Return what `--name=value` or `--name value` gives, the last of several; None where it is absent."""
    found = None
    for flag, following in pairwise([*flags, ""]):
        key, equals, value = flag.partition("=")
        if key == f"--{name}":
            found = value if equals else following
    return found
