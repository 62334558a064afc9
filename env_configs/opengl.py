"""Pictures of the MuJoCo tasks, which need OpenGL; simulating needs none."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER_AGAIN = "platform library has not been loaded"
"""MuJoCo says so where OpenGL is absent altogether. Its loader is not made for a second try, which ends the process."""

_in_vain: list[str] = []
"""What MuJoCo said in this process where it cannot be asked again."""


class NoOpenGLError(RuntimeError):
    """MuJoCo cannot draw pictures on this machine as it is set up."""

    def __init__(self, why: object, task: str) -> None:
        super().__init__(
            f"MuJoCo cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} ({why}): only pictures need this "
            f"environment variable; set it to egl or osmesa, and see `python -m env_configs doctor {task}` for what "
            "these need; or unset it"
        )


@contextmanager
def drawing(task: str) -> Iterator[None]:
    """Draw with MuJoCo here; what it warns of on its way to OpenGL is left out.

    Args:
        task: the short name of one whose pictures these are.

    Raises:
        NoOpenGLError: this machine offers no OpenGL to MuJoCo; or it offered none before in this process.
    """
    from mujoco import FatalError

    if _in_vain:
        raise NoOpenGLError(f"tried in vain before, and MuJoCo tries once in a process: {_in_vain[0]}", task)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (FatalError, RuntimeError, ImportError, AttributeError, OSError) as error:
        if _NEVER_AGAIN in str(error):
            _in_vain.append(str(error))
        raise NoOpenGLError(error, task) from error
