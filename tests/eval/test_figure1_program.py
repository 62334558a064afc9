"""`eval/figure1.py`: its measures against closed forms, what its trainings do, and that it repeats itself."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fm_policy.flow.solvers import integrate
from fm_policy.residual.certificate import contraction, euler

PROGRAM = str(Path(__file__).resolve().parents[2] / "eval" / "figure1.py")
BASE, SCRATCH, TUNED, HEADED = NAMES = (
    "flow matching",
    "MLE from scratch",
    "flow matching, then MLE",
    "flow matching + contracting head",
)


@pytest.fixture
def figure1(monkeypatch):
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")

    return run


@pytest.fixture(scope="module")
def defined():
    """What the program defines, without running it."""
    return runpy.run_path(PROGRAM)


@pytest.fixture(scope="module")
def models(defined):
    """A short training."""
    return defined["train"]("nearest", 8, 300, 0)


def noise(count: int):
    return torch.randn(count, 1, 2, generator=torch.Generator().manual_seed(1))


def test_fine_tuning_brings_the_ends_of_the_same_noise_closer_to_the_data(defined, models):
    torch.manual_seed(2)
    found = {name: defined["measure"](models[name], noise(1000), defined["moons"](1000), 4) for name in (BASE, TUNED)}
    assert found[TUNED]["energy"] < 0.8 * found[BASE]["energy"]


def test_fine_tuning_lowers_its_loss_at_its_steps(models, defined):
    losses = {name: row["4"]["loss"] for name, row in defined["report"](models, "nearest", 8, 0)["models"].items()}
    assert losses[TUNED] < 0.98 * losses[BASE]


def test_the_head_contracts_as_certified(defined, models):
    head = models[HEADED].head
    system, step = head.system(), defined["SPAN"] / defined["HEAD_STEPS"]
    proven, proven_step = contraction(system), euler(system, step)
    assert proven.upper_bound(system) < 0 and proven_step.upper_bound(system) < 0
    assert proven.rate >= 0.999 * defined["RATE"] and proven_step.factor < 1
    at_one = models[BASE].trajectories(noise(200))[-1]
    numbers = defined["certificate"](head, at_one)
    assert numbers["rate"] == proven.rate and numbers["factor"] == proven_step.factor
    assert 0.5 < numbers["worst_pair"] <= proven_step.factor
    v, span = head.double().bind(torch.zeros(1, 1, dtype=torch.float64)), 5.0  # longer, for the rate to show
    ends = integrate(v, at_one.double(), "rk4", 100, start=1.0, end=1.0 + span).detach()
    root = torch.linalg.cholesky(torch.from_numpy(proven.p))
    before, after = (((x - x.roll(1, 0)) @ root).norm(dim=-1) for x in (at_one.double(), ends))
    assert (after / before).max() <= math.exp(-proven.rate * span)
    head.float()


def test_the_frozen_flow_is_the_same_behind_the_head(models):
    states, base = (models[name].trajectories(noise(5)) for name in (HEADED, BASE))
    assert torch.equal(states[:5], base) and len(states) == 9
    assert not torch.equal(states[-1], base[-1])
    for model in models.values():
        torch.testing.assert_close(model.trajectories(noise(5))[-1], model.solve(noise(5)))


def test_independent_pairs_collapse_to_the_mean(defined):
    """The minimiser of eq. (6) is E[x1] = (0, 0)."""
    ends = defined["train"]("independent", 1, 300, 0)[SCRATCH].solve(noise(500)).detach()
    assert ends.square().mean().sqrt() < 0.35
    assert defined["moons"](500).square().mean().sqrt() > 1.2
    assert defined["distance_to_moons"](ends).mean() > 0.5


def test_distance_to_moons(defined):
    radius, centres = defined["RADIUS"], defined["CENTRES"]
    (left, right), x = torch.tensor(centres), torch.tensor([radius, 0.0])
    points = torch.stack(
        [left + x, left - x, right + x, left + x.flip(0), right - x.flip(0), left - x + x.flip(0) / -9]
    )
    expected = torch.tensor([0, 0, 0, 0, 0, radius / 9])
    torch.testing.assert_close(defined["distance_to_moons"](points.unsqueeze(1)), expected, atol=1e-6, rtol=0)
    far = torch.tensor([[[0.0, 100.0]]]) + left
    assert defined["distance_to_moons"](far).item() == pytest.approx(100 - radius)
    torch.manual_seed(0)
    mean = defined["distance_to_moons"](defined["moons"](20_000)).mean().item()
    assert mean == pytest.approx(defined["THICKNESS"] * math.sqrt(2 / math.pi), rel=0.03)  # E|N(0, thickness²)|


def test_spectral_norms_are_the_largest_singular_values(defined):
    """Of v(t, x) = t (x1, 3 x1 + x2²): dv/dx = t [[1, 0], [3, 2 x2]]."""

    def v(t, x):
        first, second = x[..., 0], x[..., 1]
        return t * torch.stack([first, 3 * first + second**2], dim=-1)

    x = torch.tensor([[[0.0, 0.0]], [[5.0, -2.0]]])
    expected = [0.5 * torch.linalg.svdvals(torch.tensor([[1.0, 0.0], [3.0, c]]))[0] for c in (0.0, -4.0)]
    torch.testing.assert_close(defined["spectral_norms"](v, 0.5, x), torch.stack(expected))


def test_energy_distance_of_points(defined):
    """Between {0} and {a}: sqrt(2 |a|); between {0, a} and {0, a}: 0; between {0} and {0, a}: sqrt(|a| / 2)."""
    zero, a = torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]])
    both = torch.cat([zero, a])
    distance = defined["energy_distance"]
    assert distance(zero, a) == pytest.approx(math.sqrt(10))
    assert distance(both, both) == 0
    assert distance(zero, both) == pytest.approx(math.sqrt(2.5))


def test_straightness_of_a_right_angle(defined):
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]).view(3, 1, 1, 2)
    assert defined["straightness"](corner) == pytest.approx(5 / 7)
    assert defined["straightness"](corner[:2]) == 1


def test_the_same_seed_gives_the_same_numbers_and_a_picture(figure1, defined, tmp_path, capsys):
    picture, file = tmp_path / "new" / "figure.png", tmp_path / "numbers.json"
    figure1("--steps", 4, "--k", 2, "--seed", 3, "--out", picture, "--json", file)
    lines = capsys.readouterr().out.splitlines()
    written = json.loads(file.read_text(encoding="utf-8"))
    same, other = (defined["report"](defined["train"]("nearest", 2, 4, seed), "nearest", 2, seed) for seed in (3, 4))
    assert written == {"seed": 3, "steps": 4, "coupling": "nearest", "k": 2} | same
    assert list(same["models"]) == list(NAMES)
    assert all(
        math.isfinite(value) and value != other["models"][name][steps][key]
        for name, grids in same["models"].items()
        for steps, row in grids.items()
        for key, value in row.items()
    )
    assert [line[:32].strip() for line in lines[1:4]] == ["the data themselves", BASE, ""]
    assert "4 + 4" in lines[8] and "certified rate" in lines[10]
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50  # not blank


@pytest.mark.parametrize("name", ["steps", "k"])
def test_refuses_a_number_too_small(figure1, capsys, name):
    with pytest.raises(SystemExit):
        figure1(f"--{name}", 0)
    assert f"--{name} must be at least 1, got 0" in capsys.readouterr().err
