"""The table as Markdown and JSON, and the paper's two pictures of it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fm_policy.evaluation.statistics import mean_interval, paired_difference
from fm_policy.flow.noise import sample_noise
from fm_policy.images.data import Images
from fm_policy.images.net import ImageFlow
from fm_policy.images.recipes import Row
from fm_policy.images.sampling import GRIDS, Cell, Grid
from fm_policy.repeatable import repeatable

Cells = dict[tuple[str, int, str], Cell]
"""By row, seed and column."""

PICTURE_KEY = 2  # of the noise of Figure E.2
DRAWN = 16
COLOURS = 10  # of matplotlib's cycle


def as_json(cells: Cells, rows: dict[str, Row], seeds: Sequence[int], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, numbers of single seeds included."""
    found: dict[str, Any] = {}
    for key, column in dict.fromkeys((key, column) for key, _, column in cells):
        row = found.setdefault(key, {"title": rows[key].title, "columns": {}})
        values = _distances(cells, key, seeds, column)
        row["columns"][column] = {
            "mean": float(values.mean()),
            "interval": mean_interval(values),
            "minus_start": _difference(cells, rows, key, seeds, column),
            "seeds": {str(seed): asdict(cells[key, seed, column]) for seed in seeds},
        }
    return about | {"rows": found}


def as_markdown(numbers: dict[str, Any], columns: Sequence[str]) -> str:
    """Two tables: distances, and what each row takes off its base's."""
    titles = [GRIDS[column].title for column in columns]
    head = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    distances, differences = list(head), list(head)
    for row in numbers["rows"].values():
        cells = [row["columns"][column] for column in columns]
        texts = [
            f"{_text(cell['mean'], cell['interval'])}{_calls(cell, GRIDS[column])}"
            for cell, column in zip(cells, columns, strict=True)
        ]
        distances.append(f"| {row['title']} | {' | '.join(texts)} |")
        if cells[0]["minus_start"]:
            texts = [_text(cell["minus_start"][0], cell["minus_start"][1], "+") for cell in cells]
            differences.append(f"| {row['title']} | {' | '.join(texts)} |")
    floor = f"real images held out: {numbers['floor']:.2f} ({numbers['held_out']} of them)"
    parts = [f"Fréchet distance to the training images; {floor}. {numbers['features']}.", "\n".join(distances)]
    if len(differences) > len(head):
        parts += ["Minus the base, paired by seed:", "\n".join(differences)]
    return "\n\n".join(parts)


def draw_curves(curves: dict[str, list[dict[int, float]]], grid: Grid, floor: float, path: Path) -> None:
    """Figure 2a: the distance over the training behind the base, for all seeds and on average.

    Args:
        curves: By title, of each seed the distances by step.
        grid: The grid that they were measured on.
        floor: Distance of held-out images.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    for n, (title, seeds) in enumerate(curves.items()):
        share = np.array([*seeds[0]]) / max(seeds[0])
        values = np.array([[*curve.values()] for curve in seeds])
        look: dict[str, Any] = {"color": f"C{n}", "linestyle": "-" if n < COLOURS else "--"}
        label = f"{title} ({max(seeds[0])} steps)"
        axis.plot(share, values.mean(0), **look, marker="o", markersize=3, label=label)
        if len(seeds) > 1:
            axis.plot(share, values.T, **look, linewidth=0.5, alpha=0.5)
    axis.axhline(floor, color="0.5", linestyle=":", label="real images held out")
    axis.set(xlabel="share of the steps", ylabel=f"Fréchet distance, {grid.title}", yscale="log")
    figure.legend(loc="outside right upper", fontsize=7)
    _save(figure, path, dpi=80)


@torch.no_grad()
def draw_same_noise(models: Sequence[tuple[str, ImageFlow, Grid]], images: Images, seed: int, path: Path) -> None:
    """Figure E.2: what each model, on its grid, makes of the same noises; a column for each noise."""
    from matplotlib.figure import Figure

    height, width, channels = images.shape
    with repeatable((seed, 0, PICTURE_KEY), torch.device("cpu")):
        x0 = sample_noise((DRAWN, height * width, channels))
    figure = Figure(figsize=(0.5 * DRAWN + 3, 0.56 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for axis, (title, model, grid) in zip(axes, models, strict=True):
        device = next(model.parameters()).device
        pictures = images.pictures(model.solve(x0.to(device), grid.solver, grid.steps)).cpu()
        strip = torch.nn.functional.pad(pictures, (1, 1, 1, 1), value=1.0).movedim(1, -1)
        axis.imshow(
            torch.cat([*strip], dim=1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
        )
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(f"{title}\n{grid.title}", rotation=0, ha="right", va="center", fontsize=8)
    _save(figure, path, dpi=80)


def _distances(cells: Cells, key: str, seeds: Sequence[int], column: str) -> np.ndarray:
    """`(seeds, 1)`."""
    return np.array([[cells[key, seed, column].distance] for seed in seeds])


def _difference(cells: Cells, rows: dict[str, Row], key: str, seeds: Sequence[int], column: str) -> Any:
    """Mean and interval of the row minus the row that it starts from, None where that one is not there."""
    start = rows[key].recipe.start
    if any((start, seed, column) not in cells for seed in seeds):
        return None
    return paired_difference(_distances(cells, key, seeds, column), _distances(cells, start, seeds, column))


def _text(mean: float, interval: tuple[float, float] | None, sign: str = "") -> str:
    text = f"{mean:{sign}.2f}"
    return text if interval is None else f"{text} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


def _calls(cell: dict[str, Any], grid: Grid) -> str:
    """The calls of the net, where the title does not tell them."""
    found = [*cell["seeds"].values()]
    nfe = np.mean([one["nfe"] for one in found])
    head = f" + {found[0]['head_calls']}" if found[0]["head_calls"] else ""
    return f" ({nfe:.0f}{head})" if head or grid.solver == "dopri5" else ""


def _save(figure: Any, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
