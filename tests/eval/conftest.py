import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROLLOUT = Path(__file__).resolve().parents[2] / "eval" / "rollout.py"


@pytest.fixture
def program() -> Path:
    """Path of `eval/rollout.py`."""
    return ROLLOUT


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `eval/rollout.py` in this process with the given arguments."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(ROLLOUT), *map(str, arguments)])
        runpy.run_path(str(ROLLOUT), run_name="__main__")

    return run
