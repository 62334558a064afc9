"""`eval/certify.py` on real checkpoints with small heads: what it certifies, what it refuses, and how it says so."""

import dataclasses
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from PIL import Image

from fm_policy.assets import pretrained_policy
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.residual import certificate, record
from fm_policy.residual.inequalities import jacobian

pytest.importorskip("cvxpy", reason="certificates by semidefinite programming need the extra `certify`")

PROGRAMS = Path(__file__).resolve().parents[2] / "eval"


def save(folder: Path, seed: int = 0, gain: float = 0.3, shift: float = 0.0, **changes) -> FlowMatchingPolicy:
    """The shipped policy with a head of random weights; the averaged head is another one than the trained."""
    torch.manual_seed(seed)
    config = PreTrainedConfig.from_pretrained(pretrained_policy())
    residual = {
        "stage": "residual",
        "use_ema": True,
        "head": "control_synth",
        "head_width": 8,
        "window_store": False,
        **changes,
    }
    config = dataclasses.replace(config, device="cpu", **residual)
    data_set = SimpleNamespace()  # what counts is that there is one: it makes the frozen base
    policy = FlowMatchingPolicy.from_pretrained(pretrained_policy(), config=config, dataset_meta=data_set)
    for net in (policy.net, policy.ema_net):
        for name, parameter in net.head.named_parameters():
            parameter.data += gain * torch.randn_like(parameter)
            if name == "parts.a0":
                parameter.data += shift * torch.eye(len(parameter))
    policy.save_pretrained(folder)
    for file in pretrained_policy().glob("policy_*"):
        shutil.copy(file, folder)
    return policy


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """Runs a program of `eval` in this process."""

    def run(program: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        runpy.run_path(str(PROGRAMS / program), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def constructed(tmp_path_factory) -> tuple[Path, FlowMatchingPolicy]:
    folder = tmp_path_factory.mktemp("constructed")
    return folder, save(folder)


@pytest.fixture(scope="module")
def unstable(tmp_path_factory) -> tuple[Path, FlowMatchingPolicy]:
    folder = tmp_path_factory.mktemp("unstable")
    return folder, save(folder, seed=1, gain=0.1, shift=0.5, head_mode="free")


def test_certifies_the_deployed_head_and_a_third_party_agrees(constructed, unstable, run, tmp_path, capsys):
    folder, policy = constructed
    run("certify.py", "--policy", folder, "--out", tmp_path / "new")
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(next(line for line in lines if line.startswith("contraction"))) :]  # LeRobot talks too
    assert [line.split()[:2] for line in lines[:3]] == [
        [name, "certified:"] for name in ("contraction", "euler", "iss")
    ]

    made = record.from_json((tmp_path / "new" / "certificate.json").read_text())
    assert (made.system.a0 == policy.ema_net.head.system().a0).all()
    assert not (made.system.a0 == policy.net.head.system().a0).all()
    assert made.contraction.rate >= policy.config.head_rate
    assert made.euler.step == policy.config.head_span / policy.config.head_steps == 0.0625

    table = {line[:20].strip(): line[20:].split() for line in lines[4:9]}
    pairs = {kind: table[kind] for kind in ("far", "close", "slowest")}
    assert sum(int(cells[0]) for cells in pairs.values()) >= 10_000
    assert [float(cell) for cell in table["certified"]] == pytest.approx([made.euler.factor, made.contraction.rate])
    for _, factor, rate in pairs.values():
        assert float(factor) <= made.euler.factor
        assert float(rate) >= made.contraction.rate
    assert max(float(cells[1]) for cells in pairs.values()) > 0.9 * made.euler.factor
    with Image.open(tmp_path / "new" / "certificate.png") as image:
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50  # not blank

    run("verify_certificate.py", tmp_path / "new" / "certificate.json", "--policy", folder)
    assert capsys.readouterr().out.count("holds, with a margin of") == 3
    with pytest.raises(SystemExit, match="is for weights"):
        run("verify_certificate.py", tmp_path / "new" / "certificate.json", "--policy", unstable[0])


def test_what_it_has_to_say_does_not_depend_on_a_picture(constructed, run, tmp_path, capsys, monkeypatch):
    folder, _ = constructed
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run("certify.py", "--policy", folder, "--out", tmp_path)  # and ends with status 0
    assert "certify.py: no certificate.png" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["certificate.json"]


def test_refuses_an_unstable_head_by_condition_and_amount(unstable, run, tmp_path, capsys):
    folder, policy = unstable
    with pytest.raises(SystemExit, match=r"certify\.py: not certified: contraction, euler, iss"):
        run("certify.py", "--policy", folder, "--out", tmp_path, "--pairs", 300)
    out = capsys.readouterr().out
    assert "contraction  infeasible: the Jacobian at the" in out
    assert "refused" in out

    system = policy.ema_net.head.system()
    slopes = (system.stacked_alpha, (system.stacked_alpha + system.stacked_beta) / 2, system.stacked_beta)
    values = np.concatenate([np.linalg.eigvals(jacobian(system, s)) for s in slopes])
    largest = values.real.max()
    assert np.linalg.eigvals(system.a0).real.max() > 0.2
    content = json.loads((tmp_path / "certificate.json").read_text())
    for name in ("contraction", "iss"):
        assert content[name]["answer"] == "infeasible"
        assert "is not Hurwitz" in content[name]["condition"]
    assert content["contraction"]["amount"] == pytest.approx(largest, rel=1e-9)
    assert content["euler"]["amount"] == pytest.approx(np.abs(1 + 0.0625 * values).max() - 1, rel=1e-9)
    with pytest.raises(SystemExit, match="the certificate claims nothing"):
        run("verify_certificate.py", tmp_path / "certificate.json", "--policy", folder)


def test_is_loud_where_a_simulated_pair_contradicts_the_certificate(constructed, run, tmp_path, capsys, monkeypatch):
    def too_good(*arguments) -> record.Record:
        made = certify(*arguments)
        return dataclasses.replace(made, euler=dataclasses.replace(made.euler, factor=made.euler.factor**2))

    certify = certificate.certify
    monkeypatch.setattr(certificate, "certify", too_good)
    with pytest.raises(SystemExit) as stopped:
        run("certify.py", "--policy", constructed[0], "--out", tmp_path, "--pairs", 300)
    assert stopped.value.code == 2
    assert "VIOLATED: a pair grew by" in capsys.readouterr().err


def test_refuses_what_has_no_head_to_certify(constructed, run, tmp_path):
    with pytest.raises(SystemExit, match=r"has no head that could be certified \(head=None\)"):
        run("certify.py", "--policy", pretrained_policy(), "--out", tmp_path)
    save(tmp_path / "unet", head="unet")
    with pytest.raises(SystemExit, match=r"has no head that could be certified \(head='unet'\)"):
        run("certify.py", "--policy", tmp_path / "unet")
    with pytest.raises(SystemExit, match="method must be one of .* got 'sdp'"):
        run("certify.py", "--policy", constructed[0], "--method", "sdp")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["unet"]
