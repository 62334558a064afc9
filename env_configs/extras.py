"""What a task needs of its machine, and how to get it."""

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


def not_installed(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """An error that names the absent package and the command that installs it."""
    return ModuleNotFoundError(f"{error.name} is not installed: {install_command(extra)}", name=error.name)
