"""One model of the table: trained by eq. (3) or (6), to be stopped at any time and continued to the same weights."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fm_policy.ema import ema_decay, ema_update
from fm_policy.files import digest, part, read_tensors, write_tensors
from fm_policy.flow.coupling import independent, inverse, minibatch_ot, nearest
from fm_policy.flow.losses import cfm_loss, masked_mse
from fm_policy.images.data import Images
from fm_policy.images.net import ImageFlow, Shape
from fm_policy.repeatable import repeatable
from fm_policy.slices import SAVE_SECONDS, Clock, TimeIsUpError, check_settings

COUPLINGS = ("nearest", "independent", "ot", "inverse")
INVERSE_CALLS = 32  # of `inverse`
START_KEY = 0  # what is drawn before the first step


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
        loss: "matching", eq. (3), or "likelihood", eq. (6).
        coupling: Of noise and data; `independent` or `ot` for eq. (3), one of `COUPLINGS` for eq. (6).
        steps: Of the optimiser.
        batch: Images per step.
        lr: Of Adam.
        start: The model whose averaged weights it starts from; "" for fresh ones.
        head: One of `fm_policy.images.net.HEADS` to be trained behind the start's flow, or "".
        warmup: Steps of linear growth of the rate.
        cosine: Whether the rate decays to 0 by a cosine.
        solver_steps: Euler steps that eq. (6) goes through.
        k: Noises per image of `nearest`.
        ema: Largest decay of the averaged weights, which are what is measured.
        flip: Whether images are mirrored at random.
    """

    loss: str
    coupling: str
    steps: int
    batch: int
    lr: float
    start: str = ""
    head: str = ""
    warmup: int = 0
    cosine: bool = False
    solver_steps: int = 0
    k: int = 0
    ema: float = 0.9999
    flip: bool = False

    def __post_init__(self) -> None:
        known = {"matching": ("independent", "ot"), "likelihood": COUPLINGS}
        if self.coupling not in known.get(self.loss, ()):
            raise ValueError(f"coupling of {self.loss} must be one of {known.get(self.loss)}, got {self.coupling!r}")
        if self.loss == "likelihood" and self.solver_steps < 1:
            raise ValueError(f"eq. (6) goes through at least 1 solver step, got solver_steps={self.solver_steps}")

    def cost(self) -> int:
        """Images that the flow's net sees in the whole training; a backward pass counts as two more.

        Those that a head sees do not count.
        """
        if self.loss == "matching":
            return 3 * self.batch * self.steps
        pairing = {"nearest": self.k * self.solver_steps, "inverse": INVERSE_CALLS}.get(self.coupling, 0)
        return self.batch * self.steps * (pairing + (1 if self.head else 3) * self.solver_steps)

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        grown = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * grown * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0)


@dataclass
class Trained:
    """A finished model.

    Attributes:
        model: With the averaged weights, frozen.
        curve: What was measured on the way, by step.
        settings: All that decides it: data, shape, recipe, seed, and a hash of the model that it started from.
    """

    model: ImageFlow
    curve: dict[int, float]
    settings: dict[str, Any]


class Trainer:
    """Weights, their average and Adam's state, kept in one file."""

    def __init__(
        self, images: Images, shape: Shape, recipe: Recipe, seed: int, start: ImageFlow | None, device: torch.device
    ) -> None:
        """Begin a training.

        Args:
            images: The data.
            shape: Of the flow's net.
            recipe: How to train.
            seed: Decides all that is drawn.
            start: The model that the recipe names.
            device: Where to compute.

        Raises:
            ValueError: If the recipe starts from a model and none is given, or the other way round, or is eq. (6) from
                fresh weights.
        """
        if recipe.loss == "likelihood" and not recipe.start:
            raise ValueError("eq. (6) fine-tunes a model: the recipe must name its start")
        if bool(recipe.start) != (start is not None):
            got = "none" if start is None else "a model"
            raise ValueError(f"the recipe starts from {recipe.start or 'fresh weights'}, got {got}")
        self.images, self.recipe, self.seed, self.device = images, recipe, seed, device
        self.settings: dict[str, Any] = {
            **{"image": images.shape, "data": images.fingerprint(), "shape": asdict(shape), "recipe": asdict(recipe)},
            **{"seed": seed, "start": None if start is None else digest(start.state_dict().values())},
        }
        with repeatable((seed, START_KEY), device):
            self.net = ImageFlow(images.shape, shape, recipe.head).to(device)
        if start is not None:
            self.net.flow.load_state_dict(start.flow.state_dict())
        self.average = copy.deepcopy(self.net).eval()
        self.start = start
        self.optimizer = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], recipe.lr, fused=True)
        self.step = 0
        self.curve: dict[int, float] = {}

    def run(
        self,
        file: Path,
        clock: Clock,
        measure: Callable[[ImageFlow], float] | None = None,
        points: int = 0,
        title: str = "",
    ) -> Trained:
        """Train to the end, from where `file` stands.

        Args:
            file: Of the finished model; beside it, `.partial` holds an unfinished one.
            clock: When to stop.
            measure: What the curve shows of the averaged model.
            points: How often it is measured, at equal distances, and once at the start; 0: never.
            title: Of the progress bar.

        Raises:
            TimeIsUpError: If the clock stopped it; it is saved.
            ValueError: If the file holds a model of other settings.
        """
        partial = file.with_suffix(".partial")
        if file.is_file():
            self._load(file)
            return Trained(self.average.requires_grad_(False), self.curve, self.settings)
        if partial.is_file():
            self._load(partial)
        saved = time.monotonic()
        at = {round(n * self.recipe.steps / points) for n in range(points + 1)} if measure and points else set()
        with tqdm(total=self.recipe.steps, initial=self.step, desc=title, unit="step", mininterval=5) as bar:
            while True:
                if measure and self.step in at and self.step not in self.curve:
                    self.curve[self.step] = measure(self.average)
                if self.step == self.recipe.steps:
                    break
                if clock.is_up() or time.monotonic() - saved > SAVE_SECONDS:
                    self._save(partial, unfinished=True)
                    saved = time.monotonic()
                if clock.is_up():
                    raise TimeIsUpError
                self._learn()
                bar.update()
        self._save(file, unfinished=False)
        partial.unlink(missing_ok=True)
        return Trained(self.average.requires_grad_(False), self.curve, self.settings)

    def _learn(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.step += 1
        self.net.train(self.recipe.loss == "matching")  # eq. (6) goes through the map that is deployed: no dropout
        with repeatable((self.seed, self.step), self.device):
            loss = self._loss(self._data())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        ema_update(self.average, self.net, ema_decay(self.step, max_decay=self.recipe.ema))

    def _data(self) -> Tensor:
        pixels = self.images.train.pixels
        rows = torch.randint(len(pixels), (self.recipe.batch,))
        x1 = self.images.chunks(pixels[rows].to(self.device))
        if self.recipe.flip:
            mirrored = x1.unflatten(1, self.images.shape[:2]).flip(2).flatten(1, 2)
            x1 = torch.where(torch.rand(len(x1), 1, 1, device=self.device) < 0.5, mirrored, x1)
        return x1

    def _loss(self, x1: Tensor) -> Tensor:
        if self.recipe.loss == "matching":
            return cfm_loss(self.net.flow, self._noise(x1), x1)
        return masked_mse(self._reconstruct(self._noise(x1)), x1)

    def _noise(self, x1: Tensor) -> Tensor:
        match self.recipe.coupling:
            case "nearest":
                return nearest(x1, self.recipe.k, self._reconstruct)
            case "inverse" if self.start is not None:
                return inverse(x1, self.start.flow)
            case "ot":
                return minibatch_ot(independent(x1), x1)
        return independent(x1)

    def _reconstruct(self, x0: Tensor) -> Tensor:
        return self.net.solve(x0, "euler", self.recipe.solver_steps, checkpoint=self.device.type == "cuda")

    def _save(self, file: Path, unfinished: bool) -> None:
        tensors = {f"average.{name}": value for name, value in self.average.state_dict().items()}
        if unfinished:
            tensors |= {f"net.{name}": value for name, value in self.net.state_dict().items()}
            for n, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"adam.{n}.{name}": value for name, value in state.items()}
        metadata = {"settings": self.settings, "step": self.step, "curve": self.curve}
        write_tensors(file, tensors, metadata)

    def _load(self, file: Path) -> None:
        tensors, metadata = read_tensors(file)
        check_settings(file, metadata["settings"], self.settings)
        self.step, self.curve = metadata["step"], {int(step): value for step, value in metadata["curve"].items()}
        self.average.load_state_dict(part(tensors, "average."))
        if file.suffix == ".partial":
            self.net.load_state_dict(part(tensors, "net."))
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in part(tensors, "adam.").items():
                n, _, key = name.partition(".")
                state.setdefault(int(n), {})[key] = value
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
