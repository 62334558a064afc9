"""The package as others meet it: its name, what LeRobot finds, what it needs, who knows whom, and the CI."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
NAME = "lerobot_policy_fm_ft"
PACKAGES = (NAME, "fm_policy", "env_configs")
SIMULATORS = ("gym_pusht", "pymunk", "pygame", "zarr", "mujoco", "gymnasium_robotics", "robosuite", "h5py")
TOOLS = ("cvxpy", "grpc", "onnx", "onnxruntime", "onnxscript")

# Everything that is asked of a fresh interpreter, in one, because LeRobot takes ten seconds to import.
PROBE = """
import importlib, json, pkgutil, sys

for name in BLOCKED:
    sys.modules[name] = None  # as if it were not installed

import fm_policy.flow, fm_policy.velocity
for package in (fm_policy.flow, fm_policy.velocity):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
lerobot_by_flow = "lerobot" in sys.modules

import lerobot.envs.configs, lerobot.optim, lerobot.policies, lerobot.robots
from lerobot.utils.import_utils import register_third_party_plugins
before = set(sys.modules)
register_third_party_plugins()
by_door = sorted(set(sys.modules) - before)
registered = {
    "policies": sorted(lerobot.configs.PreTrainedConfig.get_known_choices()),
    "tasks": sorted(lerobot.envs.configs.EnvConfig.get_known_choices()),
    "robots": sorted(lerobot.robots.RobotConfig.get_known_choices()),
}

import fm_policy
modules = [module.name for module in pkgutil.walk_packages(fm_policy.__path__, "fm_policy.")]
for module in modules:
    importlib.import_module(module)
print(json.dumps({
    "lerobot_by_flow": lerobot_by_flow, "by_door": by_door, "registered": registered, "modules": modules,
}))
"""


@pytest.fixture(scope="module")
def probe() -> dict:
    """What a fresh interpreter without simulators and tools reports."""
    code = f"BLOCKED = {set(SIMULATORS + TOOLS)!r}\n{PROBE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def requirements() -> list[Requirement]:
    return [Requirement(line) for line in distribution(NAME).requires or ()]


def imports(file: Path) -> set[str]:
    """The modules that a file names in any import statement."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module)
    return found


# Name and metadata


def test_the_name_is_the_module_that_lerobot_imports():
    assert distribution(NAME).metadata["Name"] == NAME
    assert find_spec(NAME) is not None


def test_the_programs_are_ours():
    scripts = {script.name: script.value for script in distribution(NAME).entry_points}
    assert scripts == {"lerobot": "fm_policy.cli:main", "fm-policy-server": "fm_policy.deploy.server:main"}


def test_licence():
    assert distribution(NAME).metadata["License-Expression"] == "Apache-2.0"
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_published(package):
    assert (REPOSITORY / package / "py.typed").is_file()


def test_every_requirement_is_bounded_above():
    unbounded = [
        str(needed)
        for needed in requirements()
        if not any(bound.operator in ("<", "<=", "==", "~=") for bound in needed.specifier)
    ]
    assert unbounded == []


def test_lerobot_is_bounded_to_the_version_that_the_plugin_is_written_for():
    for needed in requirements():
        if needed.name == "lerobot":
            assert needed.specifier.contains(version("lerobot"))
            allowed = needed.specifier.filter(["0.6.0", "0.6.1", "0.6.9", "0.7.0"])
            assert list(allowed) == ["0.6.1", "0.6.9"]


def test_the_core_needs_no_simulator_and_each_task_has_its_extra():
    core = {needed.name for needed in requirements() if needed.marker is None}
    assert core == {"filelock", "gymnasium", "lerobot", "packaging", "scipy", "torchdiffeq", "tqdm"}
    extras = set(distribution(NAME).metadata.get_all("Provides-Extra"))
    assert extras == {"pusht", "kitchen", "robosuite", "pictures", "certify", "export", "robot", "images"}


# What LeRobot finds, and what an installation without simulators can do


def test_lerobot_discovers_the_policy_the_task_and_the_robot(probe):
    assert {"fm_ft", "dp_ema"} <= set(probe["registered"]["policies"])
    assert "fm_pusht" in probe["registered"]["tasks"]
    assert "fm_sim" in probe["registered"]["robots"]


def test_the_door_is_light(probe):
    """LeRobot imports it in every program: on top of LeRobot itself it may load our configurations only."""
    assert NAME in probe["by_door"]
    assert {module.partition(".")[0] for module in probe["by_door"]} <= set(PACKAGES)
    heavy = {
        "fm_policy.modeling_fm_ft",
        "fm_policy.baselines.modeling_dp_ema",
        "fm_policy.encoders",
        "fm_policy.window_store",
        "env_configs.demos",
        "env_configs.fm_sim.fm_sim",
    }
    assert heavy.isdisjoint(probe["by_door"])


def test_the_policy_imports_without_simulators(probe):
    assert {"fm_policy.modeling_fm_ft", "fm_policy.processor_fm_ft", "fm_policy.cli"} <= set(probe["modules"])


def test_flow_and_velocity_need_no_lerobot(probe):
    assert probe["lerobot_by_flow"] is False


# Who may know whom


@pytest.mark.parametrize(
    ("room", "strangers"),
    [
        ("env_configs", ("fm_policy", "eval", NAME)),
        ("fm_policy", ("eval", *SIMULATORS)),
        ("fm_policy/flow", ("lerobot", "env_configs")),
        ("fm_policy/velocity", ("lerobot", "env_configs")),
        ("lerobot_policy_fm_ft", ("eval", "torch", *SIMULATORS)),
    ],
)
def test_rooms_know_only_whom_they_may(room, strangers):
    files = sorted((REPOSITORY / room).rglob("*.py"))
    assert files
    known = {(file.name, module) for file in files for module in imports(file)}
    assert {(file, module) for file, module in known if module.partition(".")[0] in strangers} == set()


# The repository


def test_no_lock_file_is_tracked():
    assert "uv.lock" in (REPOSITORY / ".gitignore").read_text().split()
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a checkout: nothing is tracked")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    tracked = {Path(line).name for line in listed.stdout.splitlines()}
    assert tracked.isdisjoint({"uv.lock", "poetry.lock", "Pipfile.lock", "requirements.txt"})


def run_ci(tmp_path: Path, fails_on: str) -> tuple[int, list[str]]:
    """Run `.ci/run` with a `python3` that only notes its arguments, and fails on one of them."""
    notes = tmp_path / "notes"
    notes.touch()
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\ncase "$*" in *"{fails_on}"*) exit 1;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CI": "true"}
    script = REPOSITORY / ".ci" / "run"
    done = subprocess.run([script], env=environment, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, notes.read_text().splitlines()


def test_ci_checks_style_and_types_and_runs_the_readmes_own_test_command(tmp_path):
    checks = ["-m pip install uv", "-m uv run ruff check", "-m uv run ruff format --check", "-m uv run mypy"]
    status, calls = run_ci(tmp_path, fails_on="nothing")
    assert status == 0
    assert calls == [*checks, "-m pip install uv", "-m uv run pytest -n 2 --dist loadfile"]
    readme = (REPOSITORY / "README.md").read_text().splitlines()
    assert "python3 -m pip install uv && python3 -m uv run pytest -n 2 --dist loadfile" in readme


@pytest.mark.parametrize("step", ["ruff check", "mypy", "pytest"])
def test_ci_fails_with_its_first_failing_step(step, tmp_path):
    status, calls = run_ci(tmp_path, fails_on=step)
    assert status != 0
    assert step in calls[-1]
