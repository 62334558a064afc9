"""`eval/verify_certificate.py`: holds for the checkpoint that was certified, and for nothing else."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fm_policy.assets import FOLDER
from fm_policy.residual import record
from fm_policy.residual.certificate import Search, certify
from fm_policy.residual.control_synth import ControlSynth

pytest.importorskip("cvxpy", reason="certificates by semidefinite programming need the extra `certify`")

PROGRAM = Path(__file__).resolve().parents[2] / "eval" / "verify_certificate.py"
ACTIVATIONS = ["tanh", "prelu", "leaky_relu"]
RATE, SPAN, STEPS = 0.3, 0.25, 4


def make_head(mode: str) -> ControlSynth:
    torch.manual_seed(0)
    head = ControlSynth(3, 5, 4, mode=mode, width=6, input_width=8, rate=RATE, activations=ACTIVATIONS)
    for name, parameter in head.named_parameters():
        if name != "parts.a0":
            torch.nn.init.normal_(parameter, std=0.2)
    return head


def save(folder: Path, mode: str) -> tuple[Path, Path]:
    """A policy's folder, with another head than the averaged one, and the certificate of the averaged one."""
    folder.mkdir()
    head = make_head(mode)
    raw = {f"net.head.{name}": torch.zeros_like(tensor) for name, tensor in head.state_dict().items()}
    tensors = raw | {f"ema_net.head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors | {"net.velocity.weight": torch.ones(3)}, folder / "model.safetensors")
    config = {"head_activations": ACTIVATIONS, "head_rate": RATE, "head_span": SPAN, "head_steps": STEPS}
    (folder / "config.json").write_text(json.dumps(config))
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    made = certify(head.system(), SPAN / STEPS, sha256, Search("semidefinite"))
    file = folder / "certificate.json"
    file.write_text(record.to_json(made))
    return folder, file


@pytest.fixture(scope="module", params=["constructed", "penalty"])
def certified(request, tmp_path_factory) -> tuple[Path, Path]:
    return save(tmp_path_factory.mktemp("certified") / "policy", request.param)


@pytest.fixture
def copied(certified, tmp_path) -> tuple[Path, Path]:
    """The same, to be changed."""
    for file in certified[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path, tmp_path / "certificate.json"


@pytest.fixture
def verify(monkeypatch):
    def run(file: Path, policy: Path) -> None:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), str(file), "--policy", str(policy)])
        runpy.run_path(str(PROGRAM), run_name="__main__")

    return run


def change(file: Path, edit, seal: bool = True) -> None:
    """Edit the document; `seal` makes its checksum fit again, as a forger would."""
    content = json.loads(file.read_text())
    del content["checksum"]
    old = record.checksum(content)
    edit(content)
    file.write_text(json.dumps(content | {"checksum": record.checksum(content) if seal else old}))


def bend(document: dict, *path, by) -> None:
    *most, last = path
    for key in most:
        document = document[key]
    document[last] = by(document[last])


def test_the_shipped_certificate_holds(verify, capsys):
    folder = FOLDER / "pusht_certified"
    verify(folder / "certificate.json", folder)
    out = capsys.readouterr().out
    assert all(f"{condition}: holds" in out for condition in ("contraction", "euler", "iss"))
    assert "factor 0.998478" in out  # as its README says


def test_holds(certified, verify, capsys):
    folder, file = certified
    verify(file, folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == ["contraction", "euler", "iss"]
    assert all("holds, with a margin of" in line for line in lines[::2])
    rate = json.loads(file.read_text())["contraction"]["rate"]
    assert rate > 0.05
    assert f"rate {rate:.6g}" in lines[1]
    assert "gain" in lines[5]


def test_knows_nothing_of_the_code_that_made_it():
    source = PROGRAM.read_text()
    assert "fm_policy" not in source
    assert "torch" not in source.replace("as torch does", "")


@pytest.mark.parametrize(
    ("path", "by", "message"),
    [
        (("contraction", "rate"), lambda rate: 1.01 * rate, "contraction: the inequality does not hold"),
        (("euler", "factor"), lambda factor: 1 - 1.01 * (1 - factor), "euler: the inequality does not hold"),
        (("iss", "phi"), lambda phi: 0.99 * phi, "iss: the inequality does not hold"),
        (("iss", "derived", "gain"), lambda gain: 0.9 * gain, "iss: gain is"),
        (("euler", "derived", "region_factor"), lambda factor: 1.1 * factor, "euler: region_factor is"),
        (("contraction", "p", 0, 1), lambda entry: entry + 1e-12, "contraction: P is not symmetric"),
        (("contraction", "p"), lambda p: p[:-1], r"contraction: p must be .* of the shape \(3, 3\)"),
        (("contraction", "t", 2), lambda entry: -entry, "contraction: t must not be negative"),
        (("contraction", "t", 2), lambda _: 0.0, "contraction: the inequality does not hold"),
        (("contraction", "rate"), lambda _: 0.0, "contraction: claims nothing"),
        (("contraction", "margin"), lambda margin: margin + 0.1, "contraction: the margin is"),
        (("euler", "step"), lambda step: step / 2, "is for Euler steps of 0.03125, the head takes 0.0625"),
        (("system", "a0", 0, 0), lambda entry: entry - 1e-3, "a0 is not the checkpoint's"),
        (("system", "w", 1, 0, 0), lambda entry: entry + 1e-3, "w is not the checkpoint's"),
        (("weights_sha256",), lambda sha: sha[::-1], "is for weights"),
        (("format",), lambda _: 2, "no certificate of format 1"),
        (("iss",), lambda entry: {"answer": "certified"}, "lacks"),
    ],
)
def test_refuses_a_forged_entry(copied, verify, path, by, message):
    folder, file = copied
    change(file, lambda content: bend(content, *path, by=by))
    with pytest.raises(SystemExit, match=message):
        verify(file, folder)


def test_refuses_any_changed_entry_by_its_checksum(copied, verify):
    folder, file = copied
    change(file, lambda content: bend(content, "contraction", "rate", by=lambda rate: 0.999 * rate), seal=False)
    with pytest.raises(SystemExit, match="was changed after it was written"):
        verify(file, folder)


def test_refuses_another_checkpoint(copied, verify):
    folder, file = copied
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"net.velocity.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(SystemExit, match="is for weights"):
        verify(file, folder)
    # Even a forged sha256 does not help if the head is another one.
    save_file(tensors | {"ema_net.head.parts.w.0": -tensors["ema_net.head.parts.w.0"]}, folder / "model.safetensors")
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    change(file, lambda content: content.update(weights_sha256=sha256))
    with pytest.raises(SystemExit, match=r"the certificate's \w+ is not the checkpoint's"):
        verify(file, folder)


def test_refuses_other_units(copied, verify):
    folder, file = copied
    config = json.loads((folder / "config.json").read_text()) | {"head_activations": ["leaky_relu", *ACTIVATIONS[1:]]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="alpha is not the checkpoint's"):
        verify(file, folder)


def test_says_so_where_there_is_nothing_to_verify(copied, verify, capsys):
    folder, file = copied
    refusal = {"answer": "undecided", "condition": "nothing found", "amount": 0.5, "method": "full"}
    change(file, lambda content: content.update(dict.fromkeys(("contraction", "euler", "iss"), refusal)))
    with pytest.raises(SystemExit, match="claims nothing"):
        verify(file, folder)
    assert "contraction: not claimed, undecided: nothing found" in capsys.readouterr().out
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"model\.safetensors"):
        verify(file, folder)


def test_refuses_a_policy_without_a_head(copied, verify):
    folder, file = copied
    save_file({"net.velocity.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(SystemExit, match=r"holds no head of the kind that is certified"):
        verify(file, folder)
