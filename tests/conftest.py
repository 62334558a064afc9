"""Fixtures shared by all rooms."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Before LeRobot is imported: tests must not fill the user's own home with data sets and window stores.
HOME = tempfile.mkdtemp(prefix="lerobot-home-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ["HF_LEROBOT_HOME"] = HOME
os.environ["HF_HUB_OFFLINE"] = "1"
# The nets of the tests are small: threads would wait for one another longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fm_data() -> Path:
    """The folder of real demonstrations: `FM_DATA`, by default `../shared/data` beside the repository."""
    folder = Path(os.environ.get("FM_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real demonstrations not found in {folder}: set FM_DATA to their folder")
    return folder
