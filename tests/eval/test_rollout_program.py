"""`eval/rollout.py` with the shipped policy, at one network call per chunk: quick, and still the real thing."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest

from fm_policy.assets import default_policy
from fm_policy.evaluation.episodes import read_episodes


def rows(folder):
    return sorted(read_episodes(folder / "episodes.jsonl"), key=lambda episode: episode.key)


def test_evaluates_the_shipped_policy_and_writes_it_down(rollout, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    rollout("--episodes", 3, "--repeats", 2, "--nfe", 1, "--out", out, "--videos", 1)
    printed = capsys.readouterr()
    noise = "from noise of 0.75"
    assert (
        f"with euler at NFE 1 {noise}; the checkpoint was fine-tuned through euler at NFE 16 {noise}\n" in printed.out
    )
    assert "3 seeds x 2 repeats, NFE 1 per chunk" in printed.out
    assert "6/6" in printed.err and "score=" in printed.err and "success=" in printed.err
    assert {path.name for path in out.iterdir()} == {"run.json", "episodes.jsonl", "summary.json", "videos"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["policy"]["path"] == str(default_policy())
    assert summary["task"]["config"]["block_range"] == [100, 400]
    assert set(summary["task"]["versions"]) == {"gym-pusht", "pymunk", "shapely"}
    assert set(summary["seconds"]) == {"imports", "evaluation"}
    assert summary["command"].endswith(f"rollout.py --episodes 3 --repeats 2 --nfe 1 --out {out} --videos 1")
    assert [episode.seed for episode in rows(out)] == [1000, 1000, 1001, 1001, 1002, 1002]
    draw = np.random.RandomState(1000)
    assert rows(out)[0].initial_state[:4] == [*draw.randint(50, 450, 2), *draw.randint(100, 400, 2)]


def test_a_killed_evaluation_ends_with_the_rows_of_an_unbroken_one(rollout, program, tmp_path):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    arguments = [str(x) for x in ("--episodes", 10, "--env", "pusht_a", "--nfe", 1, "--seed", 50, "--batch-size", 2)]
    command = [sys.executable, str(program), *arguments, "--out", str(broken)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        wait_for_rows(broken / "episodes.jsonl", 3, process)
        os.kill(process.pid, signal.SIGKILL)
    assert 3 <= len((broken / "episodes.jsonl").read_bytes().splitlines()) < 10
    assert not (broken / "summary.json").exists()
    rollout(*arguments, "--out", broken, "--resume")
    rollout(*arguments, "--out", unbroken, "--batch-size", 64)
    assert rows(broken) == rows(unbroken)
    scores = [json.loads((out / "summary.json").read_text())["score"] for out in (broken, unbroken)]
    assert scores[0] == scores[1]


def test_two_processes_write_what_one_writes(rollout, tmp_path, capfd):
    arguments = ("--episodes", 5, "--nfe", 1, "--batch-size", 2)
    rollout(*arguments, "--out", tmp_path / "two", "--processes", 2)
    assert capfd.readouterr().out.count("episodes   5 seeds x 1 repeats") == 1
    rollout(*arguments, "--out", tmp_path / "one")
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (summary["processes"], summary["episodes_run_now"]) == (2, 5)


def wait_for_rows(path, count: int, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the evaluation ended before it could be killed"
        assert time.monotonic() < end, f"no {count} rows within {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "pushh"], "unknown task 'pushh'; known are pusht, pusht_a, pusht_b"),
        (["--option", "starts=somewhere"], "starts must be one of gymnasium, random_state, not 'somewhere'"),
        (["--option", "starts"], "an option of a task is NAME=VALUE, as in starts=gymnasium, not 'starts'"),
        (["--option", "episode_length=long"], "task 'pusht_b' has an option of the wrong kind in .*'long'"),
        (["--env", "kitchen", "--option", "starts=gymnasium"], "task 'kitchen' has no option starts; known are"),
        (
            ["--env", "kitchen", "--policy", str(default_policy())],
            r"the policy is of another task: its 'observation.state' has the shape \(2,\)",
        ),
        (
            ["--env", "kitchen", "--option", "actions=velocity"],
            r"the policy's actions are \['joint1', .*, those of this fm_kitchen \['joint1_velocity', ",
        ),
        (["--env", "handover"], "no policy ships for the task 'handover', only for pusht, kitchen, lift, transport"),
        (["--episodes", "0"], "episodes must be at least 1, got 0"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--n-action-steps", "99"], "n_action_steps must be from 1 to .* got 99"),
        (["--solver", "heun", "--nfe", "5"], "heun calls the network 2 times per step.* got 5"),
        (["--noise-scale", "-1"], "noise_scale must be finite and 0 or more, got -1"),
        (["--policy", "nowhere"], "no checkpoint: nowhere is no folder"),
        (["--out", "."], r"\. is not empty"),
        (["--out", "something"], "something is a file, expected a folder"),
        (["--device", "gpu"], "device 'gpu' cannot be had"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(rollout, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit, match=message) as refusal:
        rollout(*arguments)
    assert str(refusal.value).startswith("rollout.py: ")
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--resume"], "--resume needs --out"), (["--processes", 2], "several processes need --out")],
)
def test_what_is_shared_or_continued_needs_a_folder(rollout, capsys, arguments, message):
    with pytest.raises(SystemExit):
        rollout(*arguments)
    assert message in capsys.readouterr().err


def test_films_without_opengl_are_refused_in_one_line(rollout, tmp_path, monkeypatch):
    if find_spec("gymnasium_robotics") is None:
        pytest.skip("gymnasium-robotics is not installed: needs the extra kitchen")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(SystemExit, match="rollout.py: MuJoCo cannot draw with MUJOCO_GL=glfw"):
        rollout("--env", "kitchen", "--episodes", 1, "--videos", 1, "--out", tmp_path / "out")
