"""What a head's certificate promises of the chunks, held against chunks."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import PreTrainedConfig

from fm_policy.assets import pretrained_policy
from fm_policy.deploy.runner import describe
from fm_policy.deploy.settings import settings_of
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.flow.solvers import integrate
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.residual.certificate import Search, certify
from fm_policy.residual.record import to_json


def save(folder: Path, **changes) -> None:
    """The shipped policy with a constructed head of random weights, and the certificate of that."""
    torch.manual_seed(0)
    config = PreTrainedConfig.from_pretrained(pretrained_policy())
    residual = {"stage": "residual", "head": "control_synth", "head_width": 8, "num_solver_steps": 1} | changes
    config = dataclasses.replace(config, device="cpu", window_store=False, **residual)
    policy = FlowMatchingPolicy.from_pretrained(pretrained_policy(), config=config, dataset_meta=SimpleNamespace())
    for parameter in policy.net.head.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    for file in pretrained_policy().glob("policy_*"):
        shutil.copy(file, folder)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    record = certify(policy.net.head.system(), config.head_span / config.head_steps, weights, Search("identity"))
    (folder / "certificate.json").write_text(to_json(record))


@pytest.fixture(scope="module")
def certified(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certified")
    save(folder)
    return folder


@pytest.mark.parametrize(("name", "steps"), [("euler", 4), ("iss", 1000)])
def test_the_bounds_hold_for_the_steps_of_the_graph_and_for_the_ode(name, steps, certified):
    checkpoint = load_checkpoint(certified)
    bound = settings_of(checkpoint)["certificate"][name]
    assert bound["answer"] == "certified"
    net, generator = checkpoint.policy.net, torch.Generator().manual_seed(0)
    observations = 2 * torch.rand(64, net.encoder.output_dim, generator=generator) - 1
    before = 3 * torch.randn(64, 16, 2, generator=generator)
    with torch.inference_mode():
        v = net.head.bind(observations)
        after = integrate(v, before, "euler", steps, start=1.0, end=1.0 + checkpoint.policy.config.head_span)
        g = v(1.0, torch.zeros_like(before))
    allowed = bound["before"] * before.norm(dim=-1) + bound["gain"] * g.norm(dim=-1)
    assert (after.norm(dim=-1) <= allowed).all()
    if name == "euler":
        assert (after.norm(dim=-1) > 0.9 * allowed).any()  # and it is no empty promise


def test_the_folder_tells_what_is_certified(certified):
    settings = settings_of(load_checkpoint(certified))
    told = describe(settings)
    gain = settings["certificate"]["iss"]["gain"]
    assert f"certificate: the head as an ODE (ISS): |x| <= {settings['certificate']['iss']['before']:.6g}" in told
    assert f"+ {gain:.6g} |g|" in told
    assert "certificate: the head's steps in the graph: |x| <= " in told


def test_without_a_certificate_nothing_is_promised():
    settings = settings_of(load_checkpoint(pretrained_policy()))
    assert settings["certificate"] is None
    assert "certificate" not in describe(settings)


def test_what_is_not_certified_is_said(tmp_path):
    save(tmp_path, head_mode="free")
    certificate = settings_of(load_checkpoint(tmp_path))["certificate"]
    assert certificate["iss"]["answer"] in ("infeasible", "undecided")
    assert certificate["claims"][0] == f"the head as an ODE (ISS): {certificate['iss']['answer']}"


def test_a_certificate_of_other_weights_is_refused(certified, tmp_path):
    folder = Path(shutil.copytree(certified, tmp_path / "copy"))
    shutil.copy(pretrained_policy() / "model.safetensors", folder)
    shutil.copy(pretrained_policy() / "config.json", folder)
    with pytest.raises(ValueError, match="certifies other weights than those beside it"):
        settings_of(load_checkpoint(folder))


def test_a_certificate_that_was_changed_is_refused(certified, tmp_path):
    folder = Path(shutil.copytree(certified, tmp_path / "copy"))
    content = json.loads((folder / "certificate.json").read_text())
    content["iss"]["phi"] = 1e-3
    (folder / "certificate.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot be relied on: .*was changed"):
        settings_of(load_checkpoint(folder))
