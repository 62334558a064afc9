"""Videos of chosen episodes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv
from lerobot.utils.io_utils import write_video
from numpy.typing import NDArray

from fm_policy.evaluation.episodes import EpisodeKey


def film_of(folder: Path, key: EpisodeKey) -> Path:
    """Where the film of an episode is, in the folder of films."""
    return folder / f"episode_{key.seed}_{key.repeat}.mp4"


class Camera:
    """Films some episodes; nothing is drawn while none of them runs.

    Writes `episode_<seed>_<repeat>.mp4` into its folder when such an episode ends.
    """

    def __init__(self, folder: Path, keys: Iterable[EpisodeKey]) -> None:
        """Film these episodes, into a folder that is made when needed."""
        self._folder = folder
        self._keys = frozenset(keys)
        self._films: dict[EpisodeKey, list[NDArray[np.uint8]]] = {}

    def film(self, env: VectorEnv, running: Mapping[EpisodeKey, int]) -> None:
        """Take a picture of every chosen episode that runs, given the rows of the running ones."""
        rows = {key: row for key, row in running.items() if key in self._keys}
        if rows:
            pictures = _render(env, rows.values())
            for key, row in rows.items():
                self._films.setdefault(key, []).append(pictures[row])

    def finish(self, key: EpisodeKey, fps: int) -> None:
        """Write the film of an ended episode, if there is one."""
        if frames := self._films.pop(key, None):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_video(film_of(self._folder, key), frames, fps)


def _render(env: VectorEnv, rows: Iterable[int]) -> dict[int, NDArray[np.uint8]]:
    if isinstance(env, SyncVectorEnv):
        return {row: env.envs[row].render() for row in rows}  # type: ignore[misc]
    pictures = env.call("render")  # type: ignore[attr-defined]
    return {row: pictures[row] for row in rows}
