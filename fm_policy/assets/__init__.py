"""What ships: a small trained policy for each task that has one, ones of one and two network calls; demonstrations."""

from pathlib import Path

FOLDER = Path(__file__).parent

BEST = {"pusht": "pusht_tuned", "kitchen": "kitchen_state", "lift": "lift_state", "transport": "transport_state"}


def default_policy(task: str = "pusht") -> Path:
    """Folder of the best shipped checkpoint for a task from states, averaged weights only.

    Args:
        task: As evaluations name it; `pusht_a` and `pusht_b` are both Push-T.

    Raises:
        ValueError: If none ships for it.
    """
    name = task.partition("_")[0]
    if name not in BEST:
        raise ValueError(f"no policy ships for the task {task!r}, only for {', '.join(BEST)}: name a checkpoint")
    return FOLDER / BEST[name]


def pretrained_policy() -> Path:
    """Folder of the Push-T flow that the shipped ones of one, two and sixteen calls were made from."""
    return FOLDER / "pusht_state"


def one_call_policy() -> Path:
    """Folder of a policy for Push-T that was distilled into one network call per chunk."""
    return FOLDER / "pusht_one_call"


def default_demos() -> Path:
    """Folder of the shipped LeRobotDataset: successful Push-T episodes of `pusht_unmirrored`."""
    return FOLDER / "pusht_demos"
