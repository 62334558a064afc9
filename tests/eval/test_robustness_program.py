"""`eval/robustness.py` with the shipped policy at one network call per chunk, on the shipped demonstrations."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import name_policies
from fm_policy.evaluation.episodes import read_episodes

EVAL = Path(__file__).resolve().parents[2] / "eval"
NFE_1 = ("--nfe", 1, "--samples", 12, "--draws", 3)
SIMULATED = ("--episodes", 2, "--sigma", 0.0, 0.1)


@pytest.fixture(scope="module")
def execute():
    """Runs a program of `eval` in this process with the given arguments."""

    def run(name: str, *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(EVAL / name), *map(str, arguments)])
            runpy.run_path(str(EVAL / name), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def out(execute, tmp_path_factory) -> Path:
    """Results of the shipped policy beside itself."""
    folder = tmp_path_factory.mktemp("robustness") / "new"
    policies = ("--policy", default_policy(), default_policy(), "--label", "one", "two")
    execute("robustness.py", *policies, *NFE_1, *SIMULATED, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def record(out) -> dict:
    return json.loads((out / "robustness.json").read_text())


def test_equal_policies_do_not_differ(record):
    one, two = record["policies"].values()
    assert one == two
    numbers = [entry["factor"] for entries in two["responses"].values() for entry in entries]
    numbers += [entry[name] for entry in record["rollouts"]["two"] for name in ("success", "max_reward", "jitter")]
    assert len(numbers) == 3 * 7 + 2 * 3
    for number in numbers:
        assert (number["minus_first"], number["minus_first_interval"]) == (0, [0, 0])


def test_without_a_head_a_disturbance_of_its_input_passes_as_it_came(record):
    one = record["policies"]["one"]
    assert (one["nfe"], one["head_nfe"], one["certified_factor"], one["spread"]["ratio"]) == (1, 0, None, 1)
    assert [entry["factor"]["mean"] for entry in one["responses"]["flow"]] == pytest.approx([1] * 7, rel=1e-4)
    sizes = [entry["size"] for entry in one["responses"]["noise"]]
    assert (sizes[0], sizes[3], sizes[-1]) == (0.01, 0.1, 1)
    for place in ("noise", "observation"):
        changes = [entry["change"] for entry in one["responses"][place]]
        assert changes == sorted(changes) and changes[0] > 0


def test_outcomes_are_those_of_the_written_episodes(record, out):
    for entry in record["rollouts"]["one"]:
        episodes = read_episodes(out / "rollouts" / "one" / f"noise_{entry['observation_noise']:g}" / "episodes.jsonl")
        assert [episode.seed for episode in sorted(episodes, key=lambda e: e.key)] == [1000, 1001]
        for name in ("max_reward", "success", "jitter"):
            values = [float(episode.to_row()[name]) for episode in episodes]
            assert entry[name]["mean"] == pytest.approx(sum(values) / 2)
    quiet, noisy = record["rollouts"]["one"]
    assert quiet["jitter"]["minus_least_noise"] == 0
    assert noisy["jitter"]["minus_least_noise"] == pytest.approx(noisy["jitter"]["mean"] - quiet["jitter"]["mean"])
    assert noisy["jitter"]["mean"] > quiet["jitter"]["mean"]


def test_a_table_and_a_picture_tell_it_and_nothing_is_run_twice(out, record, execute, capsys):
    policies = ("--policy", default_policy(), default_policy(), "--label", "one", "two")
    execute("robustness.py", *policies, *NFE_1, *SIMULATED, "--out", out)
    again = json.loads((out / "robustness.json").read_text())
    assert {name: again[name] for name in ("settings", "policies", "rollouts")} == {
        name: record[name] for name in ("settings", "policies", "rollouts")
    }
    summary = json.loads((out / "rollouts" / "two" / "noise_0.1" / "summary.json").read_text())
    assert (summary["episodes_run_now"], summary["observation_noise"]) == (0, 0.1)
    printed = capsys.readouterr().out
    assert "12 windows of 9 held-out episodes in " in printed
    for title in ("disturbed: the observation", "spread of one observation's chunks", "jitter, squared units"):
        assert title in printed
    assert printed.count("one, NFE 1 ") == 3
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_under_different_noise_are_compared_only_if_asked(out, execute, capsys):
    quiet, noisy = (out / "rollouts" / "one" / name for name in ("noise_0", "noise_0.1"))
    with pytest.raises(SystemExit, match="not of the same episodes:\n  observation_noise: 0.0 and 0.1$"):
        execute("compare.py", quiet, noisy)
    execute("compare.py", noisy, out / "rollouts" / "two" / "noise_0.1")
    assert capsys.readouterr().out.count("NFE 1  observation noise 0.1") == 2
    execute("compare.py", quiet, noisy, "--any-noise")
    assert capsys.readouterr().out.count("observation noise") == 1


def test_rollout_goes_on_with_such_an_evaluation(out, rollout, capsys):
    folder = out / "rollouts" / "one" / "noise_0.1"
    arguments = ("--nfe", 1, "--episodes", 2, "--out", folder, "--resume")
    with pytest.raises(SystemExit, match="observation_noise: 0.1 there, 0.0 now"):
        rollout(*arguments)
    rollout(*arguments, "--observation-noise", 0.1)
    assert "noise      0.1 in every normalised number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/checkpoints/last/pretrained_model", "runs/b/checkpoints/last/pretrained_model"], ["a", "b"]),
        (["runs/a/checkpoints/100/pretrained_model", "runs/a/checkpoints/200/pretrained_model"], ["100", "200"]),
        (["assets/base", "runs/a/checkpoints/last/pretrained_model"], ["base", "a"]),
        (["x/policy", "y/policy"], ["x", "y"]),
        (["x/policy"], ["policy"]),
    ],
)
def test_names_are_the_folders_that_tell_policies_apart(paths, names):
    assert name_policies([Path(path) for path in paths], None) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "one", "two"], r"--label needs 1 different names that folders can have, got \['one', 'two'\]"),
        (["--label", "a/b"], r"names that folders can have, got \['a/b'\]"),
        (["--episodes", "1", "--sigma", "-1"], "observation_noise must be finite and at least 0, got -1.0"),
        (["--episodes", "-1"], "episodes must be at least 1, got -1"),
        (["--env", "pushh"], "unknown task 'pushh'"),
        (["--root", "nowhere"], "no LeRobotDataset: nowhere"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(execute, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as refusal:
        execute("robustness.py", "--policy", default_policy(), "--out", tmp_path / "out", *arguments)
    assert str(refusal.value).startswith("robustness.py: ")
    assert not (tmp_path / "out").exists()
