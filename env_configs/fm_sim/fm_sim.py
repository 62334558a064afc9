"""The simulated robot: LeRobot's `Robot` around a task that runs on the wall clock."""

import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots import Robot
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

from env_configs.fm_sim.config_fm_sim import FmSimConfig
from env_configs.fm_sim.motors import make_env, motors_of
from env_configs.fm_sim.world import Episode, World

logger = logging.getLogger(__name__)

PICTURE = (96, 96, 3)


class EmergencyStopError(RuntimeError):
    """The robot holds still and refuses actions until `clear_estop` is called."""


class FmSim(Robot):
    """One of the tasks in real time: `--robot.type=fm_sim`; see `FmSimConfig` and `World`.

    Attributes:
        episodes: what became of every episode that has ended.
    """

    config_class = FmSimConfig
    name = "fm_sim"

    def __init__(self, config: FmSimConfig) -> None:
        super().__init__(config)
        self.config = config
        self.episodes: list[Episode] = []
        self._motors = motors_of(config.task)
        self._world: World | None = None
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._stopped = ""
        self._failure: Exception | None = None

    # ------------------------------------------------------------------ what it is made of

    @property
    def observation_features(self) -> dict[str, type | tuple[int, ...]]:
        """`<number>.pos` for every motor that is measured, and the camera's shape."""
        features: dict[str, type | tuple[int, ...]] = dict.fromkeys(self._measured, float)
        if self.config.camera is not None:
            features[self.config.camera] = PICTURE
        return features

    @property
    def action_features(self) -> dict[str, type]:
        """`<number>.pos` for every motor that is driven."""
        return dict.fromkeys(self._motors.driven, float)

    @property
    def _measured(self) -> tuple[str, ...]:
        return self._motors.measured if self.config.motors == "all" else self._motors.robot

    # ------------------------------------------------------------------ connection

    @property
    def is_connected(self) -> bool:
        """Whether the simulator runs."""
        return self._world is not None

    @property
    def is_calibrated(self) -> bool:
        """Always: there is nothing to calibrate."""
        return True

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def connect(self, calibrate: bool = True) -> None:
        """Builds the simulator, at the start of the first episode, and lets its clock run.

        Raises:
            DeviceAlreadyConnectedError: it is connected.
            FileExistsError: `log_dir` holds scores of an earlier run.
            ModuleNotFoundError: the simulator is not installed.
        """
        if self.is_connected:
            raise DeviceAlreadyConnectedError(f"{self.name} is already connected")
        if self._rows_file is not None and self._rows_file.exists():
            raise FileExistsError(f"{self._rows_file} exists already: name a new folder as log_dir")
        env = make_env(self.config.task, self.config.camera is not None)
        self._world = World(env, self._motors, self.config, self._on_end)
        self.episodes, self._stopped, self._failure = [], "", None
        self._closing.clear()
        self._thread = threading.Thread(target=self._run, name="fm_sim", daemon=True)
        self._thread.start()

    def disconnect(self) -> None:
        """Ends the episode under way, tells the scores and lets the simulator go.

        Raises:
            DeviceNotConnectedError: it is not connected.
        """
        world = self._connected()
        self._closing.set()
        self._thread.join()
        with self._lock:
            self._world = None
            world.close()
        logger.info(self.summary())

    def _connected(self) -> World:
        if self._world is None:
            raise DeviceNotConnectedError(f"{self.name} is not connected: call connect() first")
        return self._world

    # ------------------------------------------------------------------ observing and acting

    def get_observation(self) -> dict[str, Any]:
        """The newest reading of every motor, and the camera's picture (96, 96, 3) uint8.

        Raises:
            DeviceNotConnectedError: it is not connected.
            RuntimeError: the simulator has failed.
        """
        with self._lock:
            numbers, picture = self._running().observe(time.perf_counter())
        observation: dict[str, Any] = dict(zip(self._measured, numbers.tolist(), strict=True))
        if self.config.camera is not None and picture is not None:
            observation[self.config.camera] = picture.copy()
        return observation

    def send_action(self, action: dict[str, Any]) -> dict[str, float]:
        """Drives the motors to where `action` says; they hold it until the next one.

        Args:
            action: a number for each of `action_features`; motors that are only measured may be in it, without effect.

        Returns:
            What the motors were told: the action, cut to their limits.

        Raises:
            DeviceNotConnectedError: it is not connected.
            EmergencyStopError: the robot has been stopped, or this action is not finite or far outside the limits,
                which stops it.
            ValueError: a motor is missing.
            RuntimeError: the simulator has failed.
        """
        missing = [name for name in self._motors.driven if name not in action]
        if missing:
            raise ValueError(f"the action lacks {', '.join(missing)}; it has {', '.join(action)}")
        wanted = np.array([float(action[name]) for name in self._motors.driven])
        low, high = self._motors.limits.T
        with self._lock:
            world = self._running()
            margin = self.config.stop_margin * (high - low)
            inside = (wanted >= low - margin) & (wanted <= high + margin)  # False for NaN
            if not self._stopped and not inside.all():
                self.estop("; ".join(self._describe(wanted, ~inside)))
            if self._stopped:
                raise EmergencyStopError(f"{self.name} holds still until clear_estop(): {self._stopped}")
            sent = np.clip(wanted, low, high)
            world.act(time.perf_counter(), sent)
        return dict(zip(self._motors.driven, sent.tolist(), strict=True))

    def _describe(self, wanted: np.ndarray, bad: np.ndarray) -> list[str]:
        rows = zip(self._motors.driven, wanted, self._motors.limits, strict=True)
        told = [f"{name} = {value:g} is far outside of {low:g} to {high:g}" for name, value, (low, high) in rows]
        return [words for words, is_bad in zip(told, bad, strict=True) if is_bad]

    def estop(self, why: str = "estop() was called") -> None:
        """Emergency stop: the robot holds where it is and refuses actions, while time goes on.

        Args:
            why: the reason, told to whoever sends an action.
        """
        with self._lock:
            self._connected().stop(time.perf_counter())
            self._stopped = why
        logger.error("%s: emergency stop: %s", self.name, why)

    def clear_estop(self) -> None:
        """Lets the robot move again."""
        with self._lock:
            self._stopped = ""

    # ------------------------------------------------------------------ the clock and the scores

    def _running(self) -> World:
        world = self._connected()
        if self._failure is not None:
            raise RuntimeError(f"the simulator of {self.name} has failed: {self._failure}") from self._failure
        return world

    def _run(self) -> None:
        while not self._closing.wait(self._motors.step / 4):
            with self._lock:
                try:
                    self._connected().advance(time.perf_counter())
                except Exception as error:
                    self._failure = error
                    logger.exception("%s: the simulator has failed", self.name)
                    return

    @property
    def _rows_file(self) -> Path | None:
        return None if self.config.log_dir is None else self.config.log_dir / "episodes.jsonl"

    def _on_end(self, episode: Episode) -> None:
        self.episodes.append(episode)
        logger.info("%s: %s", self.name, episode.row())
        if self._rows_file is not None:
            _write_whole(self._rows_file, "".join(json.dumps(done.row()) + "\n" for done in self.episodes))

    def summary(self) -> str:
        """The scores so far in one line; an episode that was cut short is told, not counted."""
        whole = [episode for episode in self.episodes if episode.ended != "disconnected"]
        cut = f", {len(self.episodes) - len(whole)} cut short" if len(whole) < len(self.episodes) else ""
        if not whole:
            return f"{self.config.task}: no whole episode{cut}"
        score = np.mean([episode.score for episode in whole])
        held, steps = sum(episode.held for episode in whole), sum(len(episode.actions) for episode in whole)
        return (
            f"{self.config.task}: mean score {score:.3f} and {sum(episode.success for episode in whole)} successes in "
            f"{len(whole)} episodes{cut}; {held} of {steps} steps without a new action"
        )


def _write_whole(file: Path, text: str) -> None:
    """Writes a file that is either there as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as part:
        part.write(text)
    os.replace(part.name, file)
