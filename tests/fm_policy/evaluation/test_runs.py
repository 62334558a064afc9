import json
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock

from env_configs import make_env_config
from fm_policy.evaluation import runs
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.episodes import read_episodes
from fm_policy.evaluation.finished import read_finished
from fm_policy.evaluation.report import as_text, chunk_times, summarise
from fm_policy.evaluation.rollouts import evaluate
from fm_policy.evaluation.runs import Run, evaluate_into
from fm_policy.evaluation.statistics import mean_interval, table, wilson_interval
from fm_policy.sources import source_fingerprint

RUN = Run(seed=1000, episodes=5, repeats=2, batch_size=4, packages=("gym-pusht", "pymunk"))


@pytest.fixture(scope="module")
def finished(checkpoint, short_pusht, tmp_path_factory):
    """Folder and summary of an unbroken evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "folder"
    return folder, evaluate_into(folder, checkpoint, short_pusht, RUN)


def by_key(folder):
    return sorted(read_episodes(folder / "episodes.jsonl"), key=lambda episode: episode.key)


def test_rows_are_those_of_the_engine(finished, checkpoint, short_pusht):
    rows = evaluate(
        checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor, short_pusht, range(1000, 1005), 2
    )
    assert by_key(finished[0]) == sorted(rows, key=lambda episode: episode.key)


def test_summary_says_what_the_rows_say(finished):
    folder, summary = finished
    rows = by_key(folder)
    rewards = np.array([row.max_reward for row in rows]).reshape(5, 2)
    assert summary["score"] == pytest.approx(rewards.mean())
    assert summary["score_interval"] == pytest.approx(mean_interval(rewards))
    assert summary["best_of_r"] == pytest.approx(rewards.max(axis=1).mean())
    assert summary["success"] == 0
    assert summary["success_interval"] == pytest.approx(wilson_interval(0, 5))
    assert summary["measures"]["final_coverage"] == pytest.approx(np.mean([r.measures["final_coverage"] for r in rows]))
    assert (summary["episodes"], summary["repeats"], summary["nfe"], summary["steps"]) == (5, 2, 2, 30)
    assert summary["head_nfe"] == 0
    assert summary["ms_per_chunk"]["rows"] == 16
    assert 0 < summary["ms_per_chunk"]["p50"] <= summary["ms_per_chunk"]["p99"]


def test_summary_tells_where_it_comes_from(finished, checkpoint, short_pusht):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["policy"] == {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint}
    assert summary["task"]["config"]["block_range"] == [100, 400]
    assert set(summary["task"]["versions"]) == {"gym-pusht", "pymunk"}
    assert {"lerobot", "torch", "numpy", "gymnasium"} <= set(summary["versions"])
    assert summary["command"].startswith("python ")
    assert summary["hardware"]["cores"] >= 1 and summary["hardware"]["cpu"]
    assert summary["seconds"]["evaluation"] > 0
    assert not list(folder.glob("*.part"))


def test_text_names_score_and_success(finished):
    text = as_text(finished[1])
    assert f"score      {finished[1]['score']:.3f}" in text
    assert "5 seeds x 2 repeats, NFE 2 per chunk" in text
    assert "best of 2" in text


def test_calls_of_a_head_are_told_beside_those_of_the_net(make_checkpoint, short_pusht, tmp_path):
    with_head = make_checkpoint(stage="residual", head="control_synth", head_steps=3)
    summary = evaluate_into(tmp_path, with_head, short_pusht, replace(RUN, episodes=1, repeats=1))
    assert (summary["nfe"], summary["head_nfe"]) == (2, 3)
    assert "1 seeds x 1 repeats, NFE 2 + 3 per chunk" in as_text(summary)
    # The policy's fingerprint says which head it was: evaluations from before there were heads are continued.
    assert "head_nfe" not in json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize("kept", [0, 1, 7, 10])
def test_a_broken_evaluation_ends_with_the_rows_of_an_unbroken_one(finished, checkpoint, short_pusht, tmp_path, kept):
    """As a kill leaves it: some rows whole, the next one half, no summary."""
    folder, unbroken = finished
    lines = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    rest = "".join(lines[kept:])[:40]
    (tmp_path / "run.json").write_text((folder / "run.json").read_text())
    (tmp_path / "episodes.jsonl").write_text("".join(lines[:kept]) + rest)
    summary = evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, batch_size=3), resume=True)
    assert by_key(tmp_path) == by_key(folder)
    assert summary["episodes_run_now"] == 10 - kept
    same = ("score", "score_interval", "success", "success_interval", "best_of_r", "measures", "nfe", "task", "policy")
    assert {name: summary[name] for name in same} == {name: unbroken[name] for name in same}


def test_an_evaluation_from_before_there_was_noise_or_jitter_is_continued(finished, checkpoint, short_pusht, tmp_path):
    settings = json.loads((finished[0] / "run.json").read_text())
    assert (settings.pop("observation_noise"), settings.pop("noise_scale")) == (0, 1)
    (tmp_path / "run.json").write_text(json.dumps(settings))
    old = [json.loads(line) for line in (finished[0] / "episodes.jsonl").read_text().splitlines()[:7]]
    lines = [json.dumps({name: value for name, value in row.items() if name != "jitter"}) for row in old]
    (tmp_path / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="observation_noise: 0.0 there, 0.1 now"):
        evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, observation_noise=0.1), resume=True)
    summary = evaluate_into(tmp_path, checkpoint, short_pusht, RUN, resume=True)
    assert (summary["score"], summary["episodes_run_now"]) == (finished[1]["score"], 3)
    assert set(finished[1]["measures"]) - set(summary["measures"]) == {"jitter"}
    assert "jitter" not in as_text(summary)


def test_noise_in_observations_is_told(checkpoint, short_pusht, tmp_path):
    summary = evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, repeats=1, observation_noise=0.1))
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    assert by_key(tmp_path) == evaluate(*parts, short_pusht, range(1000, 1005), observation_noise=0.1)
    assert json.loads((tmp_path / "run.json").read_text())["observation_noise"] == 0.1
    jitter = table(by_key(tmp_path), "jitter")
    assert summary["measures"]["jitter"] == pytest.approx(jitter.mean())
    text = as_text(summary)
    assert "noise      0.1 in every normalised number of the observations" in text
    assert f"jitter     {jitter.mean():.3g}  " in text


def test_scaled_noise_is_told_and_not_mixed_with_other(checkpoint, short_pusht, tmp_path):
    scaled = load_checkpoint(checkpoint.path, noise_scale=0.5)
    few = replace(RUN, episodes=1, repeats=1)
    summary = evaluate_into(tmp_path, scaled, short_pusht, few)
    assert summary["noise_scale"] == 0.5
    assert "per chunk, of noise scaled by 0.5\n" in as_text(summary)
    with pytest.raises(ValueError, match=r"noise_scale: 0.5 there, 1.0 now"):
        evaluate_into(tmp_path, checkpoint, short_pusht, few, resume=True)


def test_a_finished_evaluation_stays_as_it_was_measured(finished, checkpoint, short_pusht):
    """Nothing is run, so that there is nothing to measure anew."""
    folder, summary = finished
    others = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "summary.json"}
    again = evaluate_into(folder, checkpoint, short_pusht, RUN, resume=True)
    assert others and {path: path.read_bytes() for path in others} == others
    assert again == json.loads(json.dumps(summary)) | {"episodes_run_now": 0} and again["ms_per_chunk"]
    assert json.loads((folder / "summary.json").read_text()) == again


def test_films_of_episodes_that_ran_before_are_not_promised(checkpoint, short_pusht, tmp_path, caplog):
    few = replace(RUN, episodes=1, repeats=1)
    evaluate_into(tmp_path, checkpoint, short_pusht, few)
    evaluate_into(tmp_path, checkpoint, short_pusht, replace(few, repeats=2, videos=1), resume=True)
    assert "not filmed, since their episodes ran before: seeds [1000]" in caplog.text
    caplog.clear()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "episode_1000_0.mp4").touch()  # of a run that was broken off after it
    evaluate_into(tmp_path, checkpoint, short_pusht, replace(few, repeats=2, videos=1), resume=True)
    assert "not filmed" not in caplog.text


def test_a_draft_that_a_kill_left_is_no_evaluation(checkpoint, short_pusht, tmp_path):
    (tmp_path / "run.json.part").write_text("{")
    assert (
        evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, episodes=1, repeats=1))["episodes_run_now"] == 1
    )


def test_resuming_in_an_empty_folder_starts(checkpoint, short_pusht, tmp_path):
    summary = evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, episodes=1, repeats=1), resume=True)
    assert summary["episodes_run_now"] == 1
    assert summary["score_interval"] is None


def test_an_evaluation_grows_by_seeds_and_repeats(finished, checkpoint, short_pusht, tmp_path):
    """The rows that were there stay; a summary of fewer never stands beside more."""
    few = replace(RUN, episodes=3, repeats=1)
    evaluate_into(tmp_path, checkpoint, short_pusht, few)
    rows = (tmp_path / "episodes.jsonl").read_text()
    sharing = evaluate_into(tmp_path, checkpoint, short_pusht, replace(few, repeats=2), resume=True)
    grown = evaluate_into(tmp_path, checkpoint, short_pusht, RUN, resume=True)
    assert (sharing["episodes_run_now"], grown["episodes_run_now"]) == (3, 4)
    assert (tmp_path / "episodes.jsonl").read_text().startswith(rows)
    assert by_key(tmp_path) == by_key(finished[0])
    assert grown["score_interval"] == finished[1]["score_interval"]
    with pytest.raises(ValueError, match="holds another evaluation:\n  repeats: 2 there, 1 now"):
        evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, repeats=1), resume=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(grown))


def test_a_kill_while_an_evaluation_grows_leaves_no_summary_of_fewer(checkpoint, short_pusht, tmp_path, monkeypatch):
    few = replace(RUN, episodes=1, repeats=1)
    evaluate_into(tmp_path, checkpoint, short_pusht, few)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_episodes", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_into(tmp_path, checkpoint, short_pusht, replace(few, repeats=2), resume=True)
    with pytest.raises(ValueError, match="lacks summary.json"):
        read_finished(tmp_path)
    monkeypatch.undo()
    assert evaluate_into(tmp_path, checkpoint, short_pusht, replace(few, repeats=2), resume=True)["repeats"] == 2
    assert len(read_finished(tmp_path)[1]) == 2


def test_a_full_folder_is_refused_unless_it_is_to_be_continued(finished, checkpoint, short_pusht):
    with pytest.raises(ValueError, match="is not empty"):
        evaluate_into(finished[0], checkpoint, short_pusht, RUN)


def test_two_evaluations_do_not_write_to_one_folder(checkpoint, short_pusht, tmp_path):
    """Nor do two tables that share a cell; what the first one writes is whole."""
    folder, few = tmp_path / "cell", replace(RUN, episodes=1, repeats=1)
    with FileLock(tmp_path / ".cell.lock"), pytest.raises(ValueError, match="another evaluation is writing to .*cell"):
        evaluate_into(folder, checkpoint, short_pusht, few, resume=True)
    assert not folder.exists()
    summary = evaluate_into(folder, checkpoint, short_pusht, few, resume=True)
    assert summary["code"] == source_fingerprint(["fm_policy", "env_configs"])


def test_a_foreign_folder_is_not_continued(checkpoint, short_pusht, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"run\.json is missing beside \['notes\.txt'\]"):
        evaluate_into(tmp_path, checkpoint, short_pusht, RUN, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_evaluation_is_not_continued_and_what_differs_is_named(
    finished, make_checkpoint, checkpoint, short_pusht
):
    def refusal(policy=checkpoint, task=short_pusht, run=RUN):
        with pytest.raises(ValueError, match="holds another evaluation") as error:
            evaluate_into(finished[0], policy, task, run, resume=True)
        return str(error.value)

    assert "repeats: 2 there, 1 now" in refusal(run=replace(RUN, repeats=1))
    assert "episodes: 5 there, 4 now" in refusal(run=replace(RUN, episodes=4, repeats=3))
    assert "seed: 1000 there, 1001 now" in refusal(run=replace(RUN, seed=1001))
    assert "n_action_steps: 8 there, 4 now" in refusal(run=replace(RUN, n_action_steps=4))
    assert "task.config.starts: 'random_state' there, 'gymnasium' now" in refusal(
        task=replace(short_pusht, starts="gymnasium")
    )
    assert "num_solver_steps: 2 there, 3 now" in refusal(policy=make_checkpoint(num_solver_steps=3))
    other = refusal(policy=make_checkpoint(time_embed_dim=8))
    assert "policy: '" in other and "num_solver_steps" not in other


@pytest.mark.parametrize("values", [{"episodes": 0}, {"repeats": 0}, {"seed": -1}, {"batch_size": 0}, {"videos": -1}])
def test_bad_values_are_refused_by_name(values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} must be at least [01], got {value}"):
        Run(**values)


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_impossible_noise_is_refused(sigma):
    with pytest.raises(ValueError, match=f"observation_noise must be finite and at least 0, got {sigma}"):
        Run(observation_noise=sigma)


def test_videos_are_the_first_episodes(checkpoint, short_pusht, tmp_path):
    evaluate_into(tmp_path, checkpoint, short_pusht, replace(RUN, episodes=2, repeats=1, videos=1))
    assert [path.name for path in tmp_path.glob("videos/*")] == ["episode_1000_0.mp4"]


def test_summarise_pools_the_calls_of_an_adaptive_solver(finished):
    rows = by_key(finished[0])[:2]
    two = [replace(rows[0], nfe=10.0, chunks=1), replace(rows[1], nfe=40.0, chunks=2)]
    assert summarise(two)["nfe"] == 30.0


def test_chunk_times_are_those_of_the_usual_size():
    calls = [(64, 0.010), (64, 0.012), (64, 0.011), (16, 9.0), (32, 9.0)]
    assert chunk_times(calls) == {"p50": 11.0, "p99": pytest.approx(11.98), "rows": 64}
    assert chunk_times([]) is None


def test_a_task_says_how_many_of_its_environments_fit_into_memory():
    tasks = {name: make_env_config(name) for name in ("pusht_b", "transport")}
    assert {name: Run().at_once(task) for name, task in tasks.items()} == {"pusht_b": 64, "transport": 16}
    assert Run(batch_size=3).at_once(tasks["transport"]) == 3
