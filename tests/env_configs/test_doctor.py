"""The doctor's report, and that the tasks are known without their simulators."""

import subprocess
import sys
from importlib import metadata

import pytest

from env_configs import doctor
from env_configs.__main__ import main


def test_what_is_installed_is_told(capsys):
    pytest.importorskip("gym_pusht", reason="needs the extra pusht")
    assert main(["doctor", "pusht"]) == 0
    told = capsys.readouterr().out.splitlines()
    for package in ("torch", "lerobot", "gymnasium", "gym-pusht"):
        assert [package, metadata.version(package)] in [line.split() for line in told]
    assert "pusht  ready" in told[-1]
    assert sum("MUJOCO_GL" in line for line in told) == 1
    assert not any("kitchen" in line for line in told)


@pytest.fixture
def absent(monkeypatch):
    """Hides one package, or shows it with another version."""
    real = metadata.version

    def hide(package: str, shown: str | None = None) -> None:
        def fake(name: str) -> str:
            if name == package and shown is None:
                raise metadata.PackageNotFoundError(name)
            return str(shown) if name == package else real(name)

        monkeypatch.setattr(doctor, "version", fake)

    return hide


@pytest.mark.parametrize(
    ("package", "task", "cure"),
    [
        ("gym-pusht", "pusht", "uv sync --extra pusht"),
        ("gymnasium-robotics", "kitchen", "uv sync --extra kitchen"),
        ("robosuite", "lift", "uv sync --extra robosuite"),
        ("robosuite", "handover", "uv sync --extra robosuite"),
        ("robosuite", "transport", "uv sync --extra robosuite"),
        ("lerobot", "pusht", "uv sync --extra pusht"),
        ("lerobot_policy_fm_ft", "pusht", "uv sync --extra pusht"),
    ],
)
def test_what_is_missing_is_named_with_its_cure(package, task, cure, absent, capsys):
    absent(package)
    assert main(["doctor", task]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.split()[0] == task
    assert f"{package} is missing" in verdict
    assert cure in verdict


def test_another_version_is_named_with_the_wanted_one(absent, capsys):
    absent("pymunk", "7.1.0")
    assert main(["doctor", "pusht"]) == 1
    assert "pymunk 7.1.0 is not <7,>=6.6" in capsys.readouterr().out


def test_one_task_that_is_not_ready_is_enough(absent, capsys):
    absent("robosuite")
    assert main(["doctor"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-5:]] == list(doctor.EXTRAS)


def test_unknown_tasks_are_refused(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["doctor", "pusht", "chess"])
    assert leaving.value.code == 2
    assert "unknown task chess; known are pusht, kitchen" in capsys.readouterr().err


WITHOUT_SIMULATORS = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

hidden = {"gym_pusht", "pymunk", "pygame", "shapely", "zarr", "mujoco", "gymnasium_robotics", "robosuite"}

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
import env_configs
for module in pkgutil.iter_modules(env_configs.__path__, "env_configs."):
    importlib.import_module(module.name)
from lerobot.envs.factory import make_env_config
make_env_config("fm_pusht")
print(f"loaded: {sorted(hidden & set(sys.modules))}; fm_policy: {'fm_policy' in sys.modules}")
"""


def test_every_module_is_imported_without_a_simulator():
    """LeRobot imports a plugin's package and all of its direct modules."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_SIMULATORS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []; fm_policy: False"
