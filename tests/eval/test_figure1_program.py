"""`eval/figure1.py`: its measures against closed forms, that it repeats itself, and what its couplings do."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "figure1.py")


@pytest.fixture
def figure1(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")

    return run


@pytest.fixture(scope="module")
def rooms():
    """What the program defines, without running it."""
    return runpy.run_path(PROGRAM)


def numbers_of(content):
    """All numbers of the models, in order."""
    flat = [value for found in content["models"].values() for value in found.values() if not isinstance(value, list)]
    return flat + [x for found in content["models"].values() for norm in found["norms"] for x in norm]


def test_the_same_seed_gives_the_same_finite_numbers_and_a_picture(figure1, tmp_path, capsys):
    picture, first, second = tmp_path / "new" / "figure.png", tmp_path / "1.json", tmp_path / "2.json"
    figure1("--steps", 4, "--samples", 50, "--seed", 3, "--out", picture, "--json", first)
    lines = capsys.readouterr().out.splitlines()
    figure1("--steps", 4, "--samples", 50, "--seed", 3, "--json", second)
    content = json.loads(first.read_text(encoding="utf-8"))
    assert content == json.loads(second.read_text(encoding="utf-8"))
    names = ["flow matching", "MLE from scratch", "flow matching, then MLE", "flow matching + contracting head"]
    assert list(content["models"]) == names
    assert [len(found["norms"]) for found in content["models"].values()] == [4, 4, 4, 8]
    assert all(math.isfinite(value) for value in numbers_of(content))
    assert [line[:32].strip() for line in lines[2:7]] == ["the data themselves", *names]
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50  # not blank
    figure1("--steps", 4, "--samples", 50, "--seed", 4, "--json", second)
    assert numbers_of(json.loads(second.read_text(encoding="utf-8"))) != numbers_of(content)


def test_reconstruction_from_independent_pairs_falls_between_the_modes(rooms):
    """The minimiser of eq. (6) is E[x1], the middle of the fork, where no sample of the data lies."""
    x0 = torch.randn(200, 1, 2, generator=torch.Generator().manual_seed(0))
    deviations = {}
    for kind in rooms["COUPLINGS"]:
        model = rooms["train"](kind, k=8, head_mode="constructed", steps=150, seed=0)["MLE from scratch"]
        with torch.no_grad():
            deviations[kind] = rooms["deviation"](model.solve(x0))
    assert deviations["independent"] < 0.3
    assert 0.8 < deviations["nearest"] < 1.3  # the data: sqrt((1.5^2 + 2 * 0.15^2) / 2) = 1.07


def test_trajectories_end_where_the_map_leads(rooms):
    model = rooms["train"]("nearest", k=2, head_mode="free", steps=2, seed=0)["flow matching + free head"]
    x0 = torch.randn(5, 1, 2)
    torch.testing.assert_close(model.trajectories(x0)[-1], model.solve(x0))


def test_spectral_norms_are_the_largest_singular_values(rooms):
    """Of v(t, x) = t (x1, 3 x1 + x2²): dv/dx = t [[1, 0], [3, 2 x2]]."""

    def v(t, x):
        first, second = x[..., 0], x[..., 1]
        return t * torch.stack([first, 3 * first + second**2], dim=-1)

    x = torch.tensor([[[0.0, 0.0]], [[5.0, -2.0]]])
    expected = [0.5 * torch.linalg.svdvals(torch.tensor([[1.0, 0.0], [3.0, c]]))[0] for c in (0.0, -4.0)]
    torch.testing.assert_close(rooms["spectral_norms"](v, 0.5, x), torch.stack(expected))


def test_energy_distance_of_points(rooms):
    """Between {0} and {a}: sqrt(2 |a|); between {0, a} and {0, a}: 0; between {0} and {0, a}: sqrt(|a| / 2)."""
    zero, a = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]])
    both = torch.cat([zero, a])
    distance = rooms["energy_distance"]
    assert distance(zero, a) == pytest.approx(math.sqrt(10))
    assert distance(both, both) == 0
    assert distance(zero, both) == pytest.approx(math.sqrt(2.5))


def test_straightness_of_a_right_angle(rooms):
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]).view(3, 1, 1, 2)
    assert rooms["straightness"](corner) == pytest.approx(5 / 7)
    assert rooms["straightness"](corner[:2]) == 1


@pytest.mark.parametrize(("name", "value", "least"), [("k", 0, 1), ("steps", 0, 1), ("samples", 1, 2)])
def test_refuses_a_number_too_small(figure1, capsys, name, value, least):
    with pytest.raises(SystemExit):
        figure1(f"--{name}", value)
    assert f"--{name} must be at least {least}, got {value}" in capsys.readouterr().err
