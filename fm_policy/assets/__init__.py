"""What ships: a small trained policy for each task that has one, ones of one and two network calls; demonstrations."""

from pathlib import Path

FOLDER = Path(__file__).parent


def default_policy(task: str = "pusht") -> Path:
    """Folder of the shipped checkpoint for a task from states, averaged weights only.

    Args:
        task: As evaluations name it; `pusht_a` and `pusht_b` are both Push-T.

    Raises:
        ValueError: If none ships for it.
    """
    shipped = {path.name.removesuffix("_state"): path for path in sorted(FOLDER.glob("*_state"))}
    name = task.partition("_")[0]
    if name not in shipped:
        raise ValueError(f"no policy ships for the task {task!r}, only for {', '.join(shipped)}: name a checkpoint")
    return shipped[name]


def one_call_policy() -> Path:
    """Folder of a policy for Push-T that was distilled into one network call per chunk."""
    return FOLDER / "pusht_one_call"


def default_demos() -> Path:
    """Folder of the shipped LeRobotDataset: successful Push-T episodes of `pusht_unmirrored`."""
    return FOLDER / "pusht_demos"
