"""What a task needs of its machine, and how to get it."""

import os

DISTRIBUTION = "lerobot_policy_fm_ft"

_ROBOSUITE = ("robosuite", "mujoco")
SIMULATORS = {
    "fm_pusht": ("gym-pusht", "pymunk", "shapely"),
    "fm_kitchen": ("gymnasium-robotics", "mujoco"),
    **dict.fromkeys(("fm_lift", "fm_handover", "fm_transport"), _ROBOSUITE),
}
"""Type of environment -> the distributions whose versions decide how its episodes go."""


def install_command(extra: str) -> str:
    """The command that installs an extra of this project, in a checkout or beside other packages."""
    return f'uv sync --extra {extra}    (or: pip install "{DISTRIBUTION}[{extra}]")'


class NoOpenGLError(RuntimeError):
    """MuJoCo cannot draw pictures on this machine as it is set up; simulating needs none."""

    def __init__(self, error: Exception, task: str) -> None:
        super().__init__(
            f"MuJoCo cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({error}): only pictures need this "
            f"environment variable; set it to egl or osmesa, and see `python -m env_configs doctor {task}` for what "
            "these need; or unset it"
        )


def not_installed(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """An error that names the absent package and the command that installs it."""
    return ModuleNotFoundError(f"{error.name} is not installed: {install_command(extra)}", name=error.name)
