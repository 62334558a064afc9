"""A data set of ours as a robot would have recorded it: every observed number is a motor, `observation.state`.

LeRobot's robots give motors and cameras, and nothing else: a policy for one, `fm_sim` among them, cannot be trained on
`observation.environment_state`. The motors are named `<number>.pos`, the robot's own first, and driven by `action`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from numpy.typing import NDArray

from env_configs.demos.dataset import Episode, Features, write_dataset

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

KEPT = ("next.reward", "next.done", "next.success")


def motor_names(features: Features) -> tuple[list[str], list[str], list[str]]:
    """Names of the motors that a data set's features become: the robot's own, the objects', the driven ones."""
    robot, objects, driven = (features.get(name) for name in (OBS_STATE, OBS_ENV_STATE, ACTION))
    return _names(robot, "robot"), _names(objects, "object"), _names(driven, "robot")


def _names(feature: dict | None, thing: str) -> list[str]:
    if feature is None:
        return []
    names = feature["names"] or [f"{thing}{number}" for number in range(feature["shape"][0])]
    return [f"{name}.pos" for name in names]


def convert(source: Path, root: Path) -> tuple[int, int]:
    """Writes the motors of a LeRobotDataset as another one.

    Args:
        source: the data set's folder, as the other readers or a scripted expert write it.
        root: folder to create; must not exist.

    Returns:
        Number of episodes and of frames.

    Raises:
        ValueError: `source` is no whole LeRobotDataset, has no observed numbers or no action, or pictures, which motors
            are not.
        FileExistsError: `root` exists.
    """
    from datasets.exceptions import DatasetsError
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if not (source / "meta" / "info.json").is_file():
        raise ValueError(f"{source} is no LeRobotDataset: it lacks meta/info.json")
    if not any((source / "data").rglob("*.parquet")):  # LeRobot would look for them on the Hub
        raise ValueError(f"{source} is no whole LeRobotDataset: it lacks the frames, data/**/*.parquet")
    try:
        dataset = LeRobotDataset(f"local/{source.name}", root=source, video_backend="pyav")
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{source} is damaged, its frames cannot be read ({error})") from error
    held = dataset.meta.features
    if dataset.meta.camera_keys:
        raise ValueError(f"{source} has pictures, {', '.join(dataset.meta.camera_keys)}: motors cannot tell them")
    missing = [name for name in (OBS_STATE, ACTION) if name not in held]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; it has {', '.join(held)}")
    robot, objects, driven = motor_names(held)
    features: Features = {
        OBS_STATE: {"dtype": "float32", "shape": (len(robot + objects),), "names": robot + objects},
        ACTION: {"dtype": "float32", "shape": (len(driven),), "names": driven},
        **{name: held[name] for name in KEPT if name in held},
    }
    return write_dataset(root, dataset.fps, features, _episodes(dataset, features), dataset.meta.total_episodes)


def _episodes(dataset: "LeRobotDataset", features: Features) -> Iterator[Episode]:
    table = dataset.hf_dataset.with_format("numpy")
    seen = [name for name in (OBS_STATE, OBS_ENV_STATE) if name in dataset.meta.features]
    columns: dict[str, NDArray] = {name: np.stack(table[name][:]) for name in {*seen, *features}}
    columns[OBS_STATE] = np.concatenate([columns[name] for name in seen], axis=1)
    episode, task = np.asarray(table["episode_index"][:]), np.asarray(table["task_index"][:])
    for number in range(dataset.meta.total_episodes):
        rows = episode == number
        words = str(dataset.meta.tasks.index[task[rows][0]])
        yield Episode({name: columns[name][rows].reshape(-1, *features[name]["shape"]) for name in features}, words)
