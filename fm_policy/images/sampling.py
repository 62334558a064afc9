"""A cell of the table: how far a model's images are from the real ones, on one grid."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fm_policy.files import read_tensors, write_json, write_tensors
from fm_policy.flow.noise import sample_noise
from fm_policy.images.data import Images
from fm_policy.images.net import HEAD_STEPS, ImageFlow
from fm_policy.images.quality import Extractor, Moments, batches, frechet_distance, moments
from fm_policy.repeatable import repeatable
from fm_policy.slices import Clock, TimeIsUpError, check_settings

SAMPLES_KEY = 1  # sets the noise of measurements apart from that of training steps


class Grid(NamedTuple):
    """A column: a solver and its steps (dopri5 chooses its own)."""

    title: str
    solver: str
    steps: int


GRIDS = {f"euler{n}": Grid(f"Euler {n}", "euler", n) for n in (4, 16, 100, 1000)} | {
    "dopri5": Grid("dopri5", "dopri5", 1)
}


@dataclass(frozen=True)
class Cell:
    """What was measured.

    Attributes:
        distance: Fréchet's, to the training images.
        distance_held_out: To those that no model saw.
        nfe: Calls of the flow's net for an image, on average over the batches.
        head_calls: Calls of the head on top.
        samples: Images.
    """

    distance: float
    distance_held_out: float
    nfe: float
    head_calls: int
    samples: int


class Measure:
    """Fréchet distances of models' images, from the same noise for all models of a seed."""

    def __init__(
        self,
        images: Images,
        extract: Extractor,
        references: tuple[Moments, Moments],
        samples: int,
        batch: int,
        device: torch.device,
        features: str,
    ) -> None:
        """Measure features of that name against their moments of the training and of the held-out images."""
        self.images, self.extract, self.references, self.features = images, extract, references, features
        self.samples, self.batch, self.device = samples, batch, device

    def cell(self, model: ImageFlow, grid: Grid, seed: int, file: Path, settings: dict[str, Any], clock: Clock) -> Cell:
        """Of a model on a grid, read from `file` where it is there already.

        Args:
            model: The model.
            grid: The column.
            seed: Decides the noise.
            file: Of the cell, JSON; beside it, `.partial` holds what an unfinished one has counted.
            settings: Of the model; kept with the cell.
            clock: When to stop.

        Raises:
            TimeIsUpError: If the clock stopped it; it is saved.
            ValueError: If the file holds a cell of other settings.
        """
        settings = settings | {"samples": self.samples, "batch": self.batch, "features": self.features}
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            check_settings(file, found["settings"], settings)
            return Cell(**found["cell"])
        partial = file.with_suffix(".partial")
        counted, calls, done = None, 0, 0
        if partial.is_file():
            tensors, metadata = read_tensors(partial)
            check_settings(partial, metadata["settings"], settings)
            calls, done = metadata["calls"], metadata["done"]
            counted = Moments(len(tensors["total"]))
            counted.load_state_dict(tensors)
        sizes = list(batches(self.samples, self.batch))
        for n, size in enumerate(sizes[done:], done):
            if clock.is_up():
                if counted is not None:
                    metadata = {"settings": settings, "calls": calls, "done": n}
                    write_tensors(partial, counted.state_dict(), metadata)
                raise TimeIsUpError
            pictures, of_batch = self._pictures(model, grid, seed, n, size)
            features = self.extract(pictures).cpu()
            counted = Moments(features.shape[1]) if counted is None else counted
            counted.add(features)
            calls += of_batch
        assert counted is not None
        to_train, to_held_out = (frechet_distance(reference, counted) for reference in self.references)
        head_calls = HEAD_STEPS if model.head is not None else 0
        cell = Cell(to_train, to_held_out, calls / len(sizes), head_calls, self.samples)
        write_json(file, {"settings": settings, "cell": asdict(cell)})
        partial.unlink(missing_ok=True)
        return cell

    def distance(self, model: ImageFlow, grid: Grid, seed: int) -> float:
        """To the training images, on the fly."""
        sizes = enumerate(batches(self.samples, self.batch))
        pictures = (self._pictures(model, grid, seed, n, size)[0] for n, size in sizes)
        return frechet_distance(self.references[0], moments(self.extract, pictures))

    @torch.no_grad()
    def _pictures(self, model: ImageFlow, grid: Grid, seed: int, n: int, size: int) -> tuple[torch.Tensor, int]:
        height, width, channels = self.images.shape
        with repeatable((seed, n, SAMPLES_KEY), torch.device("cpu")):
            x0 = sample_noise((size, height * width, channels)).to(self.device)
        x, calls = model.solve_counted(x0, grid.solver, grid.steps)
        return self.images.pictures(x), calls
