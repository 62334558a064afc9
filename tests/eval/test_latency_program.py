"""`eval/latency.py`: what it times, and what it holds that against."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import load_checkpoint

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "latency.py")


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(PROGRAM)


def count_calls(module, call) -> int:
    counted = []
    hook = module.register_forward_pre_hook(lambda *_: counted.append(1))
    call()
    hook.remove()
    return len(counted)


def test_a_chunk_calls_the_network_as_often_as_it_says(program):
    policy = load_checkpoint(default_policy()).policy
    observation = program["observe"](policy.config, "cpu")
    for nfe in (1, 4):
        chunk = program["with_calls"](policy, nfe, observation)
        for _ in range(2):  # a queued action would call nothing
            assert count_calls(policy.net.velocity, chunk) == nfe
    parts = program["parts"](policy, observation)
    assert (
        count_calls(policy.net.velocity, parts["bare call"]) == count_calls(policy.net.encoder, parts["encoder"]) == 1
    )


@pytest.mark.parametrize(("how", "calls"), [("ddpm/3", 3), ("ddim/2", 2)])
def test_the_peer_has_as_large_a_net_and_calls_it_as_often(program, how, calls):
    policy = load_checkpoint(default_policy()).policy
    observation, peer = program["observe"](policy.config, "cpu"), program["peer"](policy.config, how, "cpu")
    assert count_calls(peer.diffusion.unet, program["chunk_of"](peer, observation)) == calls
    ours, its = (sum(p.numel() for p in net.parameters()) for net in (policy.net.velocity, peer.diffusion.unet))
    assert its == pytest.approx(ours, rel=0.12)  # LeRobot's modulates by a shift and a scale, with a wider embedding


def test_the_share_is_of_the_limit_in_the_same_round(program):
    taken = np.array([[2.0, 2.0, 9.0], [4.0, 4.0, 4.0]])  # the machine was half as fast in the second round
    numbers = program["row"](taken, limit=np.array([1.0, 2.0]))
    assert numbers["over_limit"] == 2
    assert (numbers["p50_ms"], numbers["worst_ms"]) == (4000, 9000)


def test_sixteen_rows_are_sixteen_times_the_operations_of_one(program):
    told = program["rates"](load_checkpoint(default_policy()).policy, [1, 16], rounds=2, calls=2)
    assert list(told) == ["matrices", "1", "16"] and told["matrices"]["share"] == 1
    assert told["matrices"]["operations"] == 2 * 1024**3
    assert told["16"]["operations"] == pytest.approx(16 * told["1"]["operations"], rel=0.01)  # the time's are one row's


def test_it_prints_and_writes_a_row_for_each(tmp_path):
    arguments = ["--nfe", "1", "2", "--peers", "ddim/2", "--rounds", "2", "--calls", "2", "--json", tmp_path / "n.json"]
    done = subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=True)
    told = json.loads((tmp_path / "n.json").read_text())
    assert list(told["rows"]) == ["bare call", "encoder", "NFE 1", "NFE 2", "processors", "peer ddim/2"]
    assert told["calls"] == 4 and told["parameters"] > 4e6 and list(told["rates"]) == ["matrices", "1", "16", "64"]
    for name, numbers in told["rows"].items():
        assert 0 < numbers["p50_ms"] <= numbers["p99_ms"] <= numbers["worst_ms"]
        assert (numbers["over_limit"] is not None) == name.startswith("NFE") and name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "flow/3"], "latency.py: a peer is ddpm/CALLS or ddim/CALLS"),
        (["--policy", "nowhere"], "latency.py: no checkpoint: nowhere is no folder"),
        (["--rounds", "0"], "latency.py: error: --rounds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["latency.py", *arguments])
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(PROGRAM, run_name="__main__")
    assert words in f"{refusal.value} {capsys.readouterr().err}"
