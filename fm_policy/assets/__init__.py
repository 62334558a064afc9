"""What the package ships: a small trained policy and a small set of demonstrations, both of our own making."""

from pathlib import Path

FOLDER = Path(__file__).parent


def default_policy() -> Path:
    """Folder of the shipped checkpoint: Push-T from states, averaged weights only."""
    return FOLDER / "pusht_state"


def default_demos() -> Path:
    """Folder of the shipped LeRobotDataset: successful Push-T episodes of the shipped policy."""
    return FOLDER / "pusht_demos"
