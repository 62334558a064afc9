"""Pictures of one task's cells, as addresses that hold them whole (`data:image/svg+xml`)."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from env_configs.extras import not_installed
from env_configs.pusht import FmPushtEnv
from env_configs.pusht_geometry import BOARD, CORNERS, GOAL_POSE, place, start_poses
from fm_policy.evaluation.comparison.cells import Cell, seed_differences

if TYPE_CHECKING:  # matplotlib is no dependency of the package: only who wants pictures needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_LINE = 4
COLOURS, MARKERS = 10, "os^D"  # as many colours matplotlib has; whoever comes after them gets another marker
STEM_THIRD = np.array([[0.0, 0.0], [0.0, 40.0]])  # of the block's frame; the stem ends at 120


def draw(cells: Sequence[Cell], base: Cell | None) -> dict[str, str]:
    """Every picture that the cells of one task allow: its address by its caption.

    Args:
        cells: Of one task.
        base: The one that the others are compared with, if it is there.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed, naming the extra.
    """
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError as error:
        raise not_installed(error, "pictures") from error
    with rc_context({"text.parse_math": False}):  # a method's name is no formula
        return _draw(cells, base)


def _draw(cells: Sequence[Cell], base: Cell | None) -> dict[str, str]:
    pictures = {"Success against network calls per chunk, a head's included; 95 % intervals.": success_by_calls(cells)}
    if any(cell.row.step is not None for cell in cells):
        caption = "Success over the training steps of a run, with its 95 % band; dashed: the base."
        pictures[caption] = success_by_step(cells, base)
    if any(cell.error for cell in cells):
        caption = "Success against the reconstruction error on held-out demonstrations, with 95 % intervals; a policy "
        pictures[caption + "that errs less need not succeed more."] = success_by_error(cells)
    others = [cell for cell in cells if cell is not base]
    if base and others:
        caption = "Wins (blue) and losses (red) against the base, start by start in the order of the seeds: difference "
        caption += "of the shares of successful episodes, on as many repeats as both have."
        pictures[caption] = strips(others, base)
    if cells[0].summary["task"]["type"] == FmPushtEnv().type:
        caption = "Where episodes fail: an arrow for the block at every start, from its bar along a third of its stem, "
        caption += "from blue (none of its episodes) to red (all of them); "
        pictures[caption + "outlined: the target."] = failures(cells)
    return pictures


def success_by_calls(cells: Sequence[Cell]) -> str:
    """A line for each method."""
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    # Of several checkpoints of a run the last one stands for it.
    last = {(cell.row.series, _calls(cell), cell.row.step is None and cell.row.name): cell for cell in cells}
    shown = sorted(last.values(), key=_calls)
    for series in dict.fromkeys(cell.row.series for cell in cells):
        own = [cell for cell in shown if cell.row.series == series]
        _errorbar(axes, [_place(cell, shown) for cell in own], own, label=series)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network calls per chunk", ylabel="success", ylim=(0, 1))
    ticks = sorted({_calls(cell) for cell in cells})
    axes.set_xticks(ticks, [f"{calls:g}" for calls in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize="small", frameon=False)
    return _address(figure)


def _place(cell: Cell, shown: Sequence[Cell]) -> float:
    """Where a cell stands: at its calls, closely around them where others have as many, so that none is hidden."""
    alike = [other for other in shown if _calls(other) == _calls(cell)]
    number = next(number for number, other in enumerate(alike) if other is cell)
    apart = min(0.07, 0.5 / len(alike))  # of a doubling
    return _calls(cell) * 2 ** (apart * (number - (len(alike) - 1) / 2))


def _calls(cell: Cell) -> float:
    return cell.summary["nfe"] + cell.summary["head_nfe"]


def _errorbar(axes: "Axes", x: Sequence[float], cells: Sequence[Cell], label: str, linestyle: str = "-") -> None:
    success = np.array([cell.summary["success"] for cell in cells])
    ends = np.array([cell.summary["success_interval"] for cell in cells])
    # Wilson's interval holds the share, but for rounding at 0 and 1.
    errors = np.maximum([success - ends[:, 0], ends[:, 1] - success], 0)
    marker = MARKERS[len(axes.containers) // COLOURS % len(MARKERS)]
    look: dict[str, Any] = {"marker": marker, "markersize": 4, "capsize": 3, "linewidth": 1.2, "linestyle": linestyle}
    axes.errorbar(x, success, yerr=errors, elinewidth=1.2, label=label, **look)


def success_by_step(cells: Sequence[Cell], base: Cell | None) -> str:
    """A line with its band for each run."""
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    lines = [cell for cell in cells if cell.row.step is not None]
    for series, calls in dict.fromkeys((cell.row.series, cell.row.nfe) for cell in lines):
        own = [cell for cell in lines if (cell.row.series, cell.row.nfe) == (series, calls)]
        steps = [cell.row.step or 0 for cell in own]
        ends = np.array([cell.summary["success_interval"] for cell in own])
        label = series if calls is None else f"{series}, {calls} calls"
        (line,) = axes.plot(steps, [cell.summary["success"] for cell in own], marker="o", markersize=4, label=label)
        axes.fill_between(steps, ends[:, 0], ends[:, 1], color=line.get_color(), alpha=0.15, linewidth=0)
    if base:
        axes.axhline(base.summary["success"], color="0.4", linestyle="--", linewidth=1, label=base.row.name)
    axes.set(xlabel="training step", ylabel="success")
    axes.legend(fontsize="small", frameon=False)
    return _address(figure)


def success_by_error(cells: Sequence[Cell]) -> str:
    """A point for each policy whose error was measured, named beside it."""
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    measured = [cell for cell in cells if cell.error]
    for series in dict.fromkeys(cell.row.series for cell in measured):
        own = [cell for cell in measured if cell.row.series == series]
        _errorbar(axes, [cell.error[0] for cell in own if cell.error], own, label=series, linestyle="none")
        for cell in own:
            _name_point(axes, cell)
    axes.set(xlabel="reconstruction error, held out (normalised actions, squared)", ylabel="success", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.legend(fontsize="small", frameon=False)
    return _address(figure)


def _name_point(axes: "Axes", cell: Cell) -> None:
    assert cell.error  # only measured ones are drawn
    mean, interval = cell.error
    if interval:
        axes.hlines(cell.summary["success"], *interval, color="0.8", linewidth=0.8, zorder=0)
    mark = cell.row.name.removeprefix(cell.row.series).strip()
    axes.annotate(mark, (mean, cell.summary["success"]), xytext=(5, 4), textcoords="offset points", fontsize=7)


def strips(cells: Sequence[Cell], base: Cell) -> str:
    """A strip for each method, a field for each start."""
    differences = np.array([seed_differences(cell.table("success"), base.table("success")) for cell in cells])
    figure = _figure(9, 0.9 + 0.3 * len(cells))
    axes = figure.subplots()
    first, count = base.column.seed, differences.shape[1]
    extent = (first - 0.5, first + count - 0.5, len(cells) - 0.5, -0.5)
    image = axes.imshow(
        differences, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest", extent=extent
    )
    axes.set_yticks(range(len(cells)), [cell.row.name for cell in cells])
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("seed")
    figure.colorbar(image, ax=axes, pad=0.01)
    return _address(figure)


def failures(cells: Sequence[Cell]) -> str:
    """A board of Push-T for each method, with an arrow for the block at every start: 500 whole ones hide each other."""
    lines = -(-len(cells) // PER_LINE)
    columns = min(PER_LINE, len(cells))
    figure = _figure(2.6 * columns, 2.9 * lines)
    for axes, cell in zip(figure.subplots(lines, columns, squeeze=False).flat, cells, strict=False):
        _board(axes, cell)
    for axes in figure.axes[len(cells) :]:
        axes.set_axis_off()
    return _address(figure)


def _board(axes: "Axes", cell: Cell) -> None:
    from matplotlib.collections import PolyCollection

    starts = {episode.seed: episode.initial_state for episode in cell.episodes}
    poses = start_poses(np.array([starts[seed] for seed in sorted(starts)]))
    failing = 1 - cell.table("success").mean(axis=1)
    tail, tip = np.moveaxis(place(STEM_THIRD, poses), 1, 0)
    axes.quiver(
        *tail.T,
        *(tip - tail).T,
        failing,
        cmap="coolwarm",
        clim=(0, 1),
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.006,
    )
    goal = list(place(CORNERS, GOAL_POSE[None]).reshape(-1, 4, 2))
    axes.add_collection(PolyCollection(goal, facecolors="none", edgecolors="black", linewidths=1.2, zorder=3))
    axes.set(xlim=(0, BOARD), ylim=(BOARD, 0), xticks=[], yticks=[], aspect="equal")
    axes.set_title(f"{cell.row.name}\nsuccess {cell.summary['success']:.2f}", fontsize=9)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _address(figure: "Figure") -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
