"""Configuration of the simulated robot: `--robot.type=fm_sim`."""

import math
from dataclasses import dataclass
from pathlib import Path

from lerobot.robots import RobotConfig

TASKS = ("pusht", "kitchen", "lift", "handover", "transport")
MOTORS = ("all", "robot")


@RobotConfig.register_subclass("fm_sim")
@dataclass
class FmSimConfig(RobotConfig):
    """One of the tasks, in real time, behind motors and perhaps a camera.

    An episode's clock starts with its first action. The robot ends it itself, sets the next start up, which takes
    `pause_s`, and stands still there until somebody acts again.

    Args:
        task: `pusht`, `kitchen`, `lift`, `handover` or `transport`.
        motors: What is measured: `all` numbers that the task observes, the `robot`'s first, or the robot's alone.
        camera: Name of a camera above the board, 96 x 96 pixels, of Push-T alone; None: no camera.
        seed: Seed of the first episode's start; the next episodes take the next ones.
        episode_s: Seconds after which an episode ends, however far it has come.
        end_on_success: A success ends an episode; False: it goes on until `episode_s`, as a recording wants it.
        pause_s: Seconds between two episodes in which actions have no effect.
        observation_delay_s: Age of an observation when it is handed out.
        action_delay_s: Seconds until an action takes effect.
        drop_rate: Share of the observations that get lost, so that the one before is handed out again.
        noise: Standard deviation of the Gaussian noise on every motor's reading, in the motor's own unit.
        stop_margin: An action that lies farther outside a motor's limits than this share of their range is an
            emergency; nearer ones are cut to the limits.
        log_dir: Folder for the score of every episode, `episodes.jsonl`; None: the scores are only told in the log.
    """

    task: str = "pusht"
    motors: str = "all"
    camera: str | None = None
    seed: int = 0
    episode_s: float = 30.0
    end_on_success: bool = True
    pause_s: float = 2.0
    observation_delay_s: float = 0.0
    action_delay_s: float = 0.0
    drop_rate: float = 0.0
    noise: float = 0.0
    stop_margin: float = 0.5
    log_dir: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("task", TASKS), ("motors", MOTORS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.camera is not None and self.task != "pusht":
            raise ValueError(f"only task 'pusht' has a camera, not {self.task!r}: leave camera={self.camera!r} out")
        for name in ("pause_s", "observation_delay_s", "action_delay_s", "noise", "stop_margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and 0 or more, not {getattr(self, name)}")
        if not 0 < self.episode_s < math.inf:
            raise ValueError(f"episode_s must be positive, not {self.episode_s}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), not {self.drop_rate}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")
