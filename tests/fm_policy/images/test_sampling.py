"""Cells of the table: counted batch by batch, stopped and continued."""

import json

import pytest
import torch

from fm_policy.images.net import ImageFlow, Shape
from fm_policy.images.quality import Moments, frechet_distance
from fm_policy.images.sampling import GRIDS, Grid, Measure
from fm_policy.slices import Clock, TimeIsUpError

CPU = torch.device("cpu")
GRID = Grid("Euler 2", "euler", 2)


def rows_of_pixels(pictures):
    """Features: the mean of each row."""
    return pictures.mean(dim=(1, 3))


@pytest.fixture(scope="module")
def model(images):
    torch.manual_seed(0)
    return ImageFlow(images.shape, Shape((8,), groups=4))


@pytest.fixture(scope="module")
def measure(images):
    references = []
    for split in (images.train, images.held_out):
        found = Moments(8)
        found.add(rows_of_pixels(images.pictures(images.chunks(split.pixels))))
        references.append(found)
    return Measure(images, rows_of_pixels, tuple(references), samples=25, batch=10, device=CPU, features="rows")


def test_a_cell_is_the_distance_of_all_samples(measure, model, tmp_path):
    cell = measure.cell(model, GRID, 3, tmp_path / "cell.json", {}, Clock())
    pictures = torch.cat([measure._pictures(model, GRID, 3, n, size)[0] for n, size in enumerate((10, 10, 5))])
    assert len(pictures.flatten(1).unique(dim=0)) == 25  # every batch has noise of its own
    found = Moments(8)
    found.add(rows_of_pixels(pictures))
    assert cell.distance == pytest.approx(frechet_distance(measure.references[0], found))
    assert cell.distance_held_out == pytest.approx(frechet_distance(measure.references[1], found))
    assert cell.distance != cell.distance_held_out
    assert measure.distance(model, GRID, 3) == pytest.approx(cell.distance)
    assert measure.distance(model, GRID, 4) != pytest.approx(cell.distance)
    assert (cell.nfe, cell.head_calls, cell.samples) == (2, 0, 25)


def test_stopped_and_continued_it_is_the_same(measure, model, after, tmp_path):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    expected = measure.cell(model, GRID, 0, whole, {"seed": 0}, Clock())
    for looks in (0, 1, 1):
        with pytest.raises(TimeIsUpError):
            measure.cell(model, GRID, 0, parts, {"seed": 0}, after(looks))
    assert not parts.exists()
    assert measure.cell(model, GRID, 0, parts, {"seed": 0}, after(1)) == expected
    assert json.loads(parts.read_text()) == json.loads(whole.read_text())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.json", "whole.json"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_cell_of_another_model_is_refused(measure, model, after, tmp_path, stopped):
    file = tmp_path / "cell.json"
    if stopped:
        with pytest.raises(TimeIsUpError):
            measure.cell(model, GRID, 0, file, {"seed": 0}, after(1))
    else:
        measure.cell(model, GRID, 0, file, {"seed": 0}, Clock())
    with pytest.raises(ValueError, match="was made with seed 0 instead of 1: choose another --out"):
        measure.cell(model, GRID, 0, file, {"seed": 1}, Clock())


def test_dopri5_s_calls_are_counted(measure, model, tmp_path):
    """It makes two calls to start and six in each step; the cell tells the mean over its three batches."""
    cell = measure.cell(model, GRIDS["dopri5"], 0, tmp_path / "cell.json", {}, Clock())
    assert cell.nfe > 8
    assert (3 * cell.nfe - 3 * 2) % 6 == pytest.approx(0)
