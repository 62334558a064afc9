"""What ships, all of our own making: a small trained policy, one of a single network call, and demonstrations."""

from pathlib import Path

FOLDER = Path(__file__).parent


def default_policy() -> Path:
    """Folder of the shipped checkpoint: Push-T from states, averaged weights only."""
    return FOLDER / "pusht_state"


def one_call_policy() -> Path:
    """Folder of a policy for the same task that was distilled into one network call per chunk."""
    return FOLDER / "pusht_one_call"


def default_demos() -> Path:
    """Folder of the shipped LeRobotDataset: successful Push-T episodes of the shipped policy."""
    return FOLDER / "pusht_demos"
