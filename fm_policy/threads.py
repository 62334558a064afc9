"""How torch's threads wait for one another, which is decided before torch is loaded."""

import os


def give_way() -> None:
    """Let threads that wait for one another give way to other work soon, unless the environment says how they wait.

    GNU's OpenMP, whose threads torch's are on Linux, spins 300 000 times before it sleeps. On a machine that does other
    work the thread that is waited for may have no core, and a training step takes ten times as long: docs/speed.md has
    the numbers. Nothing that is computed depends on it. Without effect once torch is loaded, and elsewhere.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
