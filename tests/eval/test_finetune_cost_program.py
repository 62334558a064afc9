"""`eval/finetune_cost.py`: that a step costs what its number of solver steps says, in calls; and what it writes."""

import json
import multiprocessing
import runpy
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm_policy.assets import default_demos
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "finetune_cost.py")


def test_a_step_calls_the_velocity_once_per_solver_step_and_noise(monkeypatch):
    """What is timed is what is said: counted at the net, since seconds are noisy."""
    made = []
    start = FlowMatchingPolicy.__init__

    def noted(policy, *arguments, **named) -> None:
        start(policy, *arguments, **named)
        made.append(policy)

    monkeypatch.setattr(FlowMatchingPolicy, "__init__", noted)
    make_step = runpy.run_path(PROGRAM)["make_step"]
    calls = {}
    for name, changes in {
        "plain": {},
        "S=1": {"stage": "finetune", "num_solver_steps": 1},
        "S=2": {"stage": "finetune", "num_solver_steps": 2},
        "S=2, checkpointed": {"stage": "finetune", "num_solver_steps": 2, "checkpoint_solver": True},
        "S=2, nearest of 3": {"stage": "finetune", "num_solver_steps": 2, "coupling": "nearest", "nearest_k": 3},
    }.items():
        step = make_step(2, **changes)
        counted = []
        made[-1].net.velocity.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        assert step() > 0
        calls[name] = len(counted)
    # Checkpointing calls it again on the way back; `nearest` carries all noises of a batch at once, to choose.
    assert calls == {"plain": 1, "S=1": 1, "S=2": 2, "S=2, checkpointed": 4, "S=2, nearest of 3": 4}


def test_a_quarter_of_the_steps_chooses_nearly_the_nearest_of_five_noises():
    choice = runpy.run_path(PROGRAM)["choice"](default_demos(), (16, 4), samples=64)
    assert choice[16] == {"same": 1, "chosen": 1, "random": choice[4]["random"]}
    assert choice[4]["random"] > 1.5  # it matters which noise is taken
    assert choice[4]["chosen"] - 1 < 0.1 * (choice[4]["random"] - 1)


def test_a_root_that_is_no_data_set_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--root", str(tmp_path)])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: pytest.fail("it began to measure"))
    with pytest.raises(SystemExit, match="finetune_cost: no LeRobotDataset: .* holds no meta/info.json"):
        runpy.run_path(PROGRAM, run_name="__main__")


def test_memory_is_that_of_the_step_alone():
    """In a process of its own, where nothing freed earlier can be used again: at least a gradient of 4.15 M weights."""
    measure = f"import runpy; print(runpy.run_path({PROGRAM!r})['peak_memory'](4, {{}}))"
    said = subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, check=True)
    weights = 4.15e6 * 4 / 2**20
    assert weights < float(said.stdout) < 20 * weights


def test_measures_every_case_and_writes_it_down(monkeypatch, tmp_path, capsys):
    # Six processes that each import torch would take a minute: here they are one thread, which says nothing of MiB,
    # since a process takes what it has freed before it grows.
    threads = SimpleNamespace(Pool=lambda processes, maxtasksperchild: ThreadPool(processes))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: threads)
    file = tmp_path / "cost.json"
    arguments = ["--steps", 1, 2, "--batch-size", 4, "--pairs", 1, "--json", file]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
    runpy.run_path(PROGRAM, run_name="__main__")
    read = json.loads(file.read_text())
    unit = read.pop("flow_matching_mib")
    assert list(read) == ["S=1", "S=1, checkpointed", "S=2", "S=2, checkpointed", "S=2, nearest of 5"]
    for row in read.values():
        assert row["time"] > 0
        assert set(row) == {"time", "memory_mib"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"one step of flow matching: {unit:.0f} MiB"
    assert [line[:22].strip() for line in lines[2:]] == list(read)
