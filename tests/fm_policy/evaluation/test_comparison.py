"""Tables of methods and tasks: what they ask for, what is run for them, what they say."""

import csv
import io
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from fm_policy.assets import default_demos
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.comparison import errors, pictures, writers
from fm_policy.evaluation.comparison.cells import difference, fill, seed_differences
from fm_policy.evaluation.comparison.layout import read_layout
from fm_policy.evaluation.held_out_windows import HeldOutWindows
from fm_policy.evaluation.report import summarise
from fm_policy.evaluation.statistics import bootstrap_interval, mean_interval, sign_test

TASK = {"env": "pusht_b", "name": "Push-T", "seed": 7, "episodes": 4, "repeats": 2}


def describe(path, **fields) -> dict:
    methods = [{"name": "FM", "policy": str(path), "nfe": [2, 1]}, {"name": "once", "policy": str(path), "repeats": 1}]
    return {"base": "FM 2", "methods": methods, "tasks": [TASK]} | fields


# Statistics


def test_bootstrap_agrees_with_student_where_both_hold():
    values = np.random.default_rng(1).normal(0.1, 1, 400)
    assert bootstrap_interval(values) == pytest.approx(mean_interval(values[:, None]), abs=0.01)
    assert bootstrap_interval(values) == bootstrap_interval(values.copy())
    assert bootstrap_interval(np.ones(5)) is None  # nothing was seen of what lies between seeds
    assert bootstrap_interval(np.ones(1)) is None


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 3, 10 / 16), (1, 9, 22 / 1024)],
)
def test_sign_test_counts_coins(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


def test_differences_are_paired_by_seed_whatever_the_repeats():
    values, base = np.array([[1.0], [1.0], [0.0], [0.0]]), np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    found = difference(values, base)
    assert (found.mean, found.wins, found.losses, found.p) == (0.125, 1, 1, 1.0)
    low, high = found.interval
    assert low < 0.125 < high


def test_wins_are_counted_on_as_many_repeats_as_both_have():
    """Two methods that both succeed in six of ten episodes: one of these against the mean of ten would win, mostly."""
    draw = np.random.default_rng(0)
    once, often = (draw.random((2000, 1)) < 0.6).astype(float), (draw.random((2000, 10)) < 0.6).astype(float)
    found = difference(once, often)
    assert found.wins == ((once > often[:, :1]).sum()) and found.losses == ((once < often[:, :1]).sum())
    assert found.p > 0.05
    assert found.mean == pytest.approx(once.mean() - often.mean())  # of all repeats
    each = seed_differences(once, often)  # what a strip of the table shows
    assert set(each) == {-1, 0, 1} and ((each > 0).sum(), (each < 0).sum()) == (found.wins, found.losses)


# Layout


def test_rows_are_named_by_what_tells_them_apart(tmp_path):
    for step in ("000100", "000200", "last"):
        (tmp_path / "checkpoints" / step / "pretrained_model").mkdir(parents=True)
    tuned = {"name": "FT", "run": str(tmp_path), "nfe": [2, 4]}
    layout = read_layout({"methods": [{"name": "A", "policy": {"Push-T": "a"}, "nfe": 16}, tuned], "tasks": [TASK]})
    assert [row.name for row in layout.rows] == ["A", *(f"FT {n} step {s}" for s in (100, 200) for n in (2, 4))]
    assert layout.base.name == "A" and str(layout.base.policy_for(layout.columns[0])) == "a"
    assert layout.rows[-1].policy_for(layout.columns[0]).parent.name == "000200"
    assert [row.series for row in layout.rows] == ["A", *["FT"] * 4]


def test_methods_share_a_line_where_they_say_so():
    two, one = ({"name": f"FT {calls}", "policy": f"dir{calls}", "nfe": calls, "series": "FT"} for calls in (2, 1))
    rows = read_layout({"methods": [{"name": "FM", "policy": "dir", "nfe": [2, 1]}, two, one], "tasks": [TASK]}).rows
    assert [(row.name, row.series) for row in rows] == [("FM 2", "FM"), ("FM 1", "FM"), ("FT 2", "FT"), ("FT 1", "FT")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "B"}, r"the base must be one of the methods \['FM 2', 'FM 1', 'once'\], not 'B'"),
        ({"methods": []}, "a table needs methods with different names, got none"),
        ({"tasks": [TASK, TASK]}, r"a table needs tasks with different names, got \['Push-T'\]"),
        ({"methods": [{"name": "A", "policy": "x", "seeds": 3}]}, r"a method needs .* has unknown \['seeds'\]"),
        (
            {"methods": [{"name": "A", "policy": "x", "noise_scale": "0.5"}]},
            "noise_scale of method 'A' must be of type int or float, got '0.5'",
        ),
        (
            {"methods": [{"name": "A", "policy": "x", "noise_scale": True}]},
            "noise_scale of method 'A' must be of type int or float, got True",
        ),
        (
            {"methods": [{"name": "A", "policy": "x", "nfe": [2, "4"]}]},
            "nfe of method 'A' must be of type int, got '4'",
        ),
        ({"methods": [{"name": "A", "policy": "x", "solver": 3}]}, "solver of method 'A' must be of type str, got 3"),
        ({"methods": [{"name": "A", "policy": "x", "series": 3}]}, "series of method 'A' must be of type str, got 3"),
        ({"methods": [{"name": "A", "policy": "x", "series": 0}]}, "series of method 'A' must be of type str, got 0"),
        (
            {"methods": [{"name": "A", "run": "x", "series": "B"}]},
            "method 'A' is a run, which is a line of its own: leave its series away",
        ),
        ({"methods": [{"name": "A"}]}, "'A' needs either a policy, a checkpoint's folder, or a run"),
        ({"methods": [{"name": "FM 2", "policy": {"Lift": "x"}}]}, r"tasks that the table lacks: \['Lift'\]"),
        ({"methods": [{"name": "A", "run": "nowhere"}]}, "nowhere is no training run"),
        ({"methods": [{"name": "A", "policy": "x", "nfe": []}]}, "nfe of method 'A' is an empty list"),
        ({"methods": [{"name": 3, "policy": "x"}]}, "name of method 3 must be of type str, got 3"),
        (
            {"methods": [{"name": "A", "policy": ["x"]}]},
            r"policy of method 'A' must be of type str or dict, got \['x'\]",
        ),
        ({"methods": ["A"]}, r"a method needs \['name'\] by name, got 'A'"),
        ({"tasks": ["pusht_b"]}, r"a task needs \['env'\] by name, got 'pusht_b'"),
        ({"tasks": [TASK | {"episodes": "500"}]}, "episodes of task .* must be of type int, got '500'"),
        ({"rows": []}, r"the table needs .* has unknown \['rows'\]"),
    ],
)
def test_descriptions_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        read_layout(describe("x", **fields))


# Cells


@pytest.fixture(scope="module")
def make_task(short_pusht):
    return lambda column, sees_images: (short_pusht, ("gym-pusht",))


@pytest.fixture(scope="module")
def filled(checkpoint, make_task, tmp_path_factory):
    """A folder of evaluations, the layout, and its cells."""
    folder = tmp_path_factory.mktemp("cells")
    layout = read_layout(describe(checkpoint.path))
    return folder, layout, list(fill(layout, folder, make_task, "cpu"))


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*.json*")}


def test_cells_are_the_evaluations_that_were_asked_for(filled):
    _, _, cells = filled
    assert [(cell.row.name, cell.summary["nfe"], cell.summary["repeats"]) for cell in cells] == [
        *(("FM 2", 2, 2), ("FM 1", 1, 2), ("once", 2, 1))
    ]
    for cell in cells:
        assert cell.table("score").shape == (4, cell.summary["repeats"])
        assert {name: cell.summary[name] for name in ("score", "best_of_r")}.items() <= summarise(cell.episodes).items()
    assert np.array_equal(cells[2].table("score"), cells[0].table("score")[:, :1])
    assert cells[2].folder == cells[0].folder != cells[1].folder  # fewer repeats are read from what has more


def test_more_seeds_and_repeats_are_added_to_what_is_there(filled, checkpoint, make_task, tmp_path):
    folder, _, cells = filled
    copy = shutil.copytree(folder, tmp_path / "cells")
    methods = [{"name": "FM 2", "policy": str(checkpoint.path), "nfe": 2}]
    more = read_layout(describe(checkpoint.path, methods=methods, tasks=[TASK | {"episodes": 5, "repeats": 3}]))
    (grown,) = fill(more, copy, make_task, "cpu")
    assert (grown.folder.name, grown.summary["episodes_run_now"]) == (cells[0].folder.name, 5 * 3 - 4 * 2)
    (fresh,) = fill(more, tmp_path / "anew", make_task, "cpu")
    for name in ("score", "success"):
        assert np.array_equal(grown.table(name), fresh.table(name))
        assert np.array_equal(grown.table(name)[:4, :2], cells[0].table(name))

    before = contents(copy)
    fewer = list(fill(read_layout(describe(checkpoint.path)), copy, make_task, "cpu"))
    assert contents(copy) == before
    numbers = ("score", "score_interval", "success_interval", "best_of_r", "episodes", "repeats", "measures", "nfe")
    for cell, known in zip(fewer, cells, strict=True):
        assert {name: cell.summary[name] for name in numbers} == {name: known.summary[name] for name in numbers}


def test_a_cell_that_a_kill_stopped_while_it_grew_is_brought_to_its_end(filled, checkpoint, make_task, tmp_path):
    folder, layout, cells = filled
    copy = shutil.copytree(folder, tmp_path / "cells")
    growing = copy / cells[0].folder.name
    (growing / "summary.json").unlink()
    settings = json.loads((growing / "run.json").read_text())
    (growing / "run.json").write_text(json.dumps(settings | {"repeats": 3}))
    first = next(fill(layout, copy, make_task, "cpu"))
    assert (first.summary["episodes_run_now"], first.summary["repeats"]) == (4, 2)
    assert np.array_equal(first.table("score"), cells[0].table("score"))
    assert json.loads((growing / "summary.json").read_text())["repeats"] == 3


def test_nothing_is_run_twice_and_what_a_kill_left_goes_on(filled, make_task, tmp_path):
    folder, layout, cells = filled
    copy = shutil.copytree(folder, tmp_path / "cells")
    broken = copy / cells[1].folder.name
    lines = (broken / "episodes.jsonl").read_text().splitlines(keepends=True)
    (broken / "summary.json").unlink()
    (broken / "episodes.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    before = {path: content for path, content in contents(copy).items() if broken not in path.parents}
    again = list(fill(layout, copy, make_task, "cpu"))
    assert before.items() <= contents(copy).items()
    assert [sorted(a.episodes, key=lambda e: e.key) for a in again] == [
        sorted(cell.episodes, key=lambda e: e.key) for cell in cells
    ]
    assert again[1].summary["episodes_run_now"] == 3


def test_rows_of_another_checkpoint_task_seed_solver_or_noise_are_never_taken(
    filled, make_checkpoint, short_pusht, make_task
):
    folder, layout, cells = filled
    path = layout.base.policies[None]
    others = [
        describe(make_checkpoint(horizon=24).path),
        describe(path, tasks=[TASK | {"seed": 8}]),
        describe(path, methods=[{"name": "FM 2", "policy": str(path), "nfe": 2, "solver": "heun"}]),
        describe(path, methods=[{"name": "FM 2", "policy": str(path), "nfe": 2, "noise_scale": 0.5}]),
    ]
    known = {cell.folder for cell in cells}
    found = {next(fill(read_layout(other), folder, make_task, "cpu")).folder for other in others}
    longer = type(short_pusht)(episode_length=20)
    found.add(next(fill(layout, folder, lambda column, images: (longer, ("gym-pusht",)), "cpu")).folder)
    assert len(found) == 5 and not found & known
    assert {cell.folder for cell in fill(layout, folder, make_task, "cpu")} == known


def test_no_repeats_are_refused(checkpoint, make_task, tmp_path):
    layout = read_layout({"methods": [{"name": "A", "policy": str(checkpoint.path), "repeats": 0}], "tasks": [TASK]})
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        list(fill(layout, tmp_path, make_task, "cpu"))


def test_a_wrong_checkpoint_is_refused_before_anything_runs(checkpoint, make_task, tmp_path):
    wrong = describe(checkpoint.path)
    wrong["methods"].append({"name": "gone", "policy": "nowhere"})
    with pytest.raises(ValueError, match="nowhere is no folder"):
        next(fill(read_layout(wrong), tmp_path / "cells", make_task, "cpu"))
    assert not (tmp_path / "cells").exists()


# Errors on demonstrations


def test_the_error_is_that_of_the_chunks_at_the_rows_solver(filled, make_task, monkeypatch, tmp_path):
    """Against the windows themselves; it is kept beside the evaluation and measured once for a data set."""
    folder, _, cells = filled
    copy = shutil.copytree(folder, tmp_path / "cells")
    path = cells[0].row.policy_for(cells[0].column)
    layout = read_layout(describe(path, tasks=[TASK | {"demonstrations": str(default_demos())}]))
    monkeypatch.setattr(errors, "WINDOWS", 8)
    measured = list(fill(layout, copy, make_task, "cpu"))
    for cell in measured:
        loaded = load_checkpoint(path, nfe=cell.summary["nfe"])
        windows = HeldOutWindows.of_dataset(default_demos(), loaded.policy.config, 8, errors.DRAWS, errors.SEED)
        assert cell.error[0] == pytest.approx(windows.errors(loaded).mean())
        low, high = cell.error[1]
        assert low < cell.error[0] < high
    assert measured[0].error != measured[1].error  # 2 calls, 1 call
    monkeypatch.setattr(HeldOutWindows, "errors", None)
    assert [cell.error for cell in fill(layout, copy, make_task, "cpu")] == [cell.error for cell in measured]
    (drawn,) = [text for text in pictures.draw(measured, None) if "reconstruction error" in text]
    assert "need not succeed" in drawn
    assert writers.records(layout, measured)[1]["held_out_error_low"] == measured[1].error[1][0]


def test_a_policy_that_is_no_flow_has_no_error(tmp_path):
    checkpoint = SimpleNamespace(policy=object())
    assert errors.held_out_error(checkpoint, default_demos(), tmp_path / "error.json") is None
    assert not list(tmp_path.iterdir())


def test_absent_demonstrations_are_told_before_anything_runs(checkpoint, make_task, tmp_path):
    wrong = describe(checkpoint.path, tasks=[TASK | {"demonstrations": str(tmp_path / "nowhere")}])
    with pytest.raises(ValueError, match="no LeRobotDataset: .*nowhere"):
        next(fill(read_layout(wrong), tmp_path / "cells", make_task, "cpu"))
    assert not (tmp_path / "cells").exists()


# Writers and pictures


@pytest.fixture(scope="module")
def told(filled):
    _, layout, cells = filled
    return writers.records(layout, cells)


def test_csv_holds_every_number(told, filled):
    lines = list(csv.DictReader(io.StringIO(writers.as_csv(told))))
    assert [line["method"] for line in lines] == ["FM 2", "FM 1", "once"]
    assert float(lines[1]["best_of_r"]) == filled[2][1].summary["best_of_r"]
    assert lines[0]["score_minus_base"] == "" and lines[0]["success_minus_base_p"] == ""
    expected = filled[2][1].table("score").mean() - filled[2][0].table("score").mean()
    assert float(lines[1]["score_minus_base"]) == pytest.approx(expected)
    assert float(lines[1]["score_minus_base_low"]) <= expected <= float(lines[1]["score_minus_base_high"])


def test_markdown_shows_the_papers_two_numbers(told):
    text = writers.as_markdown(told, "FM 2")
    assert "## Push-T: seeds 7-10, R = 1 or 2" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| method", "| ---", "| FM 2", "| FM 1", "| once"]
    assert len({len(row) for row in rows}) == 1
    assert rows[3][1] == f"{told[1]['best_of_r']:.3f} (R = 2) / {told[1]['score']:.3f}"
    assert (rows[2][3], rows[3][3], rows[2][5]) == ("2", "1", "-")


def test_the_page_needs_no_other_file_and_shows_every_picture(told, filled):
    _, _, cells = filled
    drawn = pictures.draw(cells, cells[0])
    page = writers.as_html(told, "FM 2", {"Push-T": drawn})
    assert page.count("<img ") == len(drawn) == 3
    assert page.count('src="') == page.count('src="data:image/svg+xml;base64,')
    assert "href=" not in page and page.count('<tr class="base">') == 1
    assert all(f"{cell.summary['policy']['fingerprint']}</td><td>euler</td><td>1.0</td>" in page for cell in cells)


def test_every_number_of_calls_of_a_method_is_drawn(filled, monkeypatch):
    """Of several checkpoints of a run the last one, at each of its numbers of calls."""
    _, _, cells = filled
    base = cells[0]
    points = [(100, 2), (200, 2), (100, 4), (200, 4)]
    run = [
        replace(base, row=replace(base.row, series="FT", step=step), summary=base.summary | {"nfe": nfe})
        for step, nfe in points
    ]
    drawn = []

    def errorbar(axes, x, own, label):
        drawn.append((label, x, [cell.row.step for cell in own]))
        axes.plot(x, x, label=label)

    monkeypatch.setattr(pictures, "_errorbar", errorbar)
    pictures.success_by_calls(run)
    assert drawn == [("FT", [2, 4], [200, 200])]

    drawn.clear()
    methods = [replace(base, row=replace(base.row, name=name, series="FT")) for name in ("one way", "another")]
    pictures.success_by_calls(methods)
    ((label, places, steps),) = drawn
    assert (label, steps) == ("FT", [None, None])  # methods of a series do not hide one another
    assert places == pytest.approx([2, 2], rel=0.03) and places[0] < 2 < places[1]


def test_however_many_methods_have_as_many_calls_none_is_drawn_at_anothers(filled, monkeypatch):
    base = filled[2][0]
    alike = [replace(base, row=replace(base.row, name=str(n), series=str(n))) for n in range(24)]
    other = replace(base, row=replace(base.row, series="4"), summary=base.summary | {"nfe": 4})
    drawn = []
    monkeypatch.setattr(
        pictures, "_errorbar", lambda axes, x, own, label: drawn.extend(x) or axes.plot(x, x, label=label)
    )
    pictures.success_by_calls([*alike, other])
    assert 4 in drawn and len(set(drawn)) == 25
    assert all(abs(np.log2(x / 2)) < 0.25 for x in set(drawn) - {4})


def test_no_two_of_many_methods_look_alike(filled, monkeypatch):
    base = filled[2][0]
    many = [replace(base, row=replace(base.row, name=str(n), series=str(n))) for n in range(24)]
    monkeypatch.setattr(pictures, "_address", lambda figure: figure)
    bars = pictures.success_by_calls(many).axes[0].containers
    looks = [(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in bars]
    assert len(set(looks)) == len(looks) == 24


def test_names_are_shown_as_they_are(filled):
    """Neither a formula in a picture, nor a cell of a Markdown table, nor a tag of a page."""
    layout, cells = filled[1], filled[2]
    odd = [replace(cell, row=replace(cell.row, name=f"$\\foo|{n}<b>")) for n, cell in enumerate(cells)]
    told = writers.records(layout, odd)
    rows = [line for line in writers.as_markdown(told, odd[0].row.name).splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1 and "&lt;b&gt;" in rows[2]
    assert all(address.startswith("data:image/svg") for address in pictures.draw(odd, odd[0]).values())


def test_a_run_is_drawn_over_its_steps(checkpoint, make_task, tmp_path):
    for step in ("000100", "000200"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        shutil.copytree(checkpoint.path, tmp_path / "checkpoints" / step / "pretrained_model")
    tuned = {"name": "FT <1>", "run": str(tmp_path)}
    layout = read_layout({"methods": [tuned], "tasks": [TASK | {"episodes": 1, "repeats": 1}]})
    cells = list(fill(layout, tmp_path / "cells", make_task, "cpu"))
    assert len({cell.folder for cell in cells}) == 1  # the same weights: evaluated once
    drawn = pictures.draw(cells, cells[0])
    assert any(caption.startswith("Success over the training steps") for caption in drawn)
    page = writers.as_html(writers.records(layout, cells), "FT <1> step 100", {"Push-T": drawn})
    assert "FT &lt;1&gt; step 200" in page and "FT <1>" not in page
    assert "no interval" not in page and json.dumps(writers.records(layout, cells))
    assert all(a < b for a, b in pairwise(cell.row.step for cell in cells))
