"""Pictures where MuJoCo finds no OpenGL: in processes of their own, which MuJoCo can end."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

DRAW_AGAIN = """
import os, sys
from lerobot.envs.configs import EnvConfig
import env_configs
from env_configs.opengl import NoOpenGLError

env = EnvConfig.get_choice_class(sys.argv[1])().make()
env.reset(seed=0)
for opengl in ("glfw", "glfw", "egl"):
    os.environ["MUJOCO_GL"] = opengl
    try:
        env.render()
    except NoOpenGLError as error:
        print(error)
"""


@pytest.mark.parametrize(("task", "package"), [("fm_kitchen", "gymnasium_robotics"), ("fm_lift", "robosuite")])
def test_a_second_picture_without_opengl_is_refused_and_does_not_end_the_process(task, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    screens = {"DISPLAY", "WAYLAND_DISPLAY"}
    environment = {name: value for name, value in os.environ.items() if name not in screens} | {"MUJOCO_GL": "glfw"}
    command = [sys.executable, "-c", DRAW_AGAIN, task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    why = "platform library has not been loaded"
    assert all("only pictures need" in told and why in told for told in (first, second, third))
    assert "once in a process" not in first and all("once in a process" in told for told in (second, third))
    assert "MUJOCO_GL=egl" in third
