"""The choice among checkpoints, on policies whose reconstruction is known: v = b everywhere, so that x̂1 = x0 + b."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset
from safetensors.torch import load_file, save_file

from fm_policy import cli, window_store
from fm_policy.average import export
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors
from fm_policy.select.__main__ import main
from fm_policy.select.choice import choose

SHAPES = {"observation.state": 2, "observation.environment_state": 16, "action": 2}
LENGTHS = (9, 12, 7, 11, 10, 8, 20, 3, 14, 6, 10, 17)
HELD_OUT = (9, 10, 11)  # the last quarter
HORIZON, BOARD = 16, 512.0


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    """Random states and actions of Push-T's shapes."""
    root = tmp_path_factory.mktemp("demonstrations") / "noise"
    features = {name: {"dtype": "float32", "shape": (size,), "names": None} for name, size in SHAPES.items()}
    dataset = LeRobotDataset.create("local/noise", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for length in LENGTHS:
        for _ in range(length):
            frame = {name: rng.uniform(0, BOARD, size).astype(np.float32) for name, size in SHAPES.items()}
            dataset.add_frame(frame | {"task": "push"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(autouse=True)
def no_store(monkeypatch) -> None:
    """No window store of another test."""
    monkeypatch.setattr(window_store, "_store", None)


def constant_policy(tiny, velocity: float, **fields) -> FlowMatchingPolicy:
    """A policy whose averaged net gives the velocity everywhere, and whose net in training gives 7."""
    features = {"observation.state": FeatureType.STATE, "observation.environment_state": FeatureType.ENV}
    inputs = {name: PolicyFeature(kind, (SHAPES[name],)) for name, kind in features.items()}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    policy = tiny.policy(input_features=inputs, output_features=outputs, **fields)
    for net, value in ((policy.net, 7.0), (policy.ema_net, velocity)):
        last = net.velocity.out[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, value)
    return policy


def save(folder: Path, policy: FlowMatchingPolicy, training: TrainPipelineConfig) -> None:
    ends = {"min": torch.tensor(0.0), "max": torch.tensor(BOARD)}
    stats = {name: {key: end.expand(size) for key, end in ends.items()} for name, size in SHAPES.items()}
    for part in (policy, training, *make_fm_ft_pre_post_processors(policy.config, stats)):
        part.save_pretrained(folder)


@pytest.fixture
def make_run(tiny, demonstrations, tmp_path):
    """Makes the folder of a run from the velocities of its checkpoints."""

    def make(velocities: dict[str, float], eval_split: float = 0.25, env=None, **fields) -> Path:
        run = tmp_path / "run"
        data = DatasetConfig(repo_id="local/noise", root=str(demonstrations), eval_split=eval_split)
        for step, velocity in velocities.items():
            policy = constant_policy(tiny, velocity, **fields)
            training = TrainPipelineConfig(dataset=data, env=env, policy=policy.config, batch_size=16)
            save(run / "checkpoints" / step / "pretrained_model", policy, training)
        (run / "checkpoints" / "last").symlink_to(max(velocities))
        return run

    return make


def record(run: Path) -> dict:
    return json.loads((run / "select.json").read_text())


def read_actions(root: Path) -> list[np.ndarray]:
    """Normalised actions of every episode."""
    frames = LeRobotDataset("local/noise", root=root).hf_dataset.with_format("numpy")
    actions, episodes = np.stack(frames["action"]), np.asarray(frames["episode_index"])
    return [actions[episodes == index] / BOARD * 2 - 1 for index in range(len(LENGTHS))]


def expected_errors(root: Path, velocity: float, n_obs_steps: int, draws: int, seed: int) -> np.ndarray:
    """Mean of (x0 + b - a)² over the actions that exist, frame by frame, `(held-out episodes, draws)`."""
    actions = read_actions(root)
    windows = [(episode, t) for episode in HELD_OUT for t in range(LENGTHS[episode])]
    noise = torch.randn(draws, len(windows), HORIZON, 2, generator=torch.Generator().manual_seed(seed)).numpy()
    errors = []
    for draw in noise:
        squares: dict[int, list[float]] = {episode: [] for episode in HELD_OUT}
        for (episode, t), x0 in zip(windows, draw, strict=True):
            for i in range(HORIZON):
                step = t + 1 - n_obs_steps + i
                if 0 <= step < LENGTHS[episode]:
                    squares[episode].extend((x0[i] + velocity - actions[episode][step]) ** 2)
        errors.append([np.mean(squares[episode]) for episode in HELD_OUT])
    return np.array(errors).T


@pytest.mark.parametrize("store", [True, False], ids=["window-store", "lerobots-windows"])
def test_the_least_error_on_exactly_the_held_out_windows_is_chosen(make_run, demonstrations, capsys, store):
    velocities = {"000100": 3.0, "000200": 0.0, "000300": 0.4}
    run = make_run(velocities, window_store=store, n_obs_steps=2)
    main([str(run), "--draws", "2", "--seed", "3"])
    found = record(run)
    expected = {s: expected_errors(demonstrations, b, n_obs_steps=2, draws=2, seed=3) for s, b in velocities.items()}
    for step, errors in expected.items():
        assert found["checkpoints"][step]["mean"] == pytest.approx(errors.mean(), rel=1e-5)
    # The paired interval by hand: three episodes, t(0.975, 2) = 4.302653.
    for step, row in found["checkpoints"].items():
        gaps = (expected[step] - expected["000200"]).mean(axis=1)
        half = 4.302653 * gaps.std(ddof=1) / np.sqrt(3)
        assert row["difference"] == pytest.approx(gaps.mean(), rel=1e-4)
        assert row["difference_interval"] == pytest.approx([gaps.mean() - half, gaps.mean() + half], rel=1e-3)
        assert row["separated"] == (step == "000100")
    assert found["chosen"] == "000200"
    assert found["criterion"]["held_out_episodes"] == 3
    assert found["criterion"]["windows"] == sum(LENGTHS[i] for i in HELD_OUT)
    table, why = capsys.readouterr().out.split("\n\n")
    marks = [line.rpartition("  ")[2] for line in table.splitlines()[-3:]]
    assert marks[1:] == ["best", "not separated"] and marks[0].endswith("]")
    assert "(3 held-out episodes, 33 windows x 2 draws of noise); not separated from it" in why
    assert why.splitlines()[0].endswith("passed over for their means alone: 000300.")
    assert why.splitlines()[1] == str(run / "checkpoints" / "000200" / "pretrained_model")


def test_the_error_rises_with_the_noise_on_the_weights(make_run):
    run = make_run({"000100": 0.0, "000200": 0.0, "000300": 0.0})
    generator = torch.Generator().manual_seed(0)
    for step, scale in {"000100": 0.5, "000200": 0.0, "000300": 0.1}.items():
        file = run / "checkpoints" / step / "pretrained_model" / "model.safetensors"
        weights = load_file(file)
        for name, values in weights.items():
            if name.startswith("ema_net"):
                values += scale * torch.randn(values.shape, generator=generator)
        save_file(weights, file, metadata={"format": "pt"})
    main([str(run / "checkpoints"), "--samples", "20", "--draws", "1"])
    found = record(run / "checkpoints")
    means = {step: row["mean"] for step, row in found["checkpoints"].items()}
    assert means["000200"] < means["000300"] < means["000100"]
    assert (found["chosen"], found["criterion"]["windows"]) == ("000200", 20)


def test_equal_checkpoints_are_not_separated_and_the_first_is_taken():
    errors = np.array([[0.1, 0.3], [0.2, 0.2], [0.4, 0.1]])
    best, standings = choose({"000100": errors, "000200": errors.copy()}, smallest=True)
    assert best == "000100"
    assert (standings["000200"].difference_interval, standings["000200"].separated) == ((0, 0), False)


def test_one_held_out_episode_separates_nothing():
    best, standings = choose({"000100": np.array([[0.9]]), "000200": np.array([[0.1]])}, smallest=True)
    assert best == "000200"
    assert (standings["000100"].difference_interval, standings["000100"].separated) == (None, False)


# The chosen policy on its own


def test_out_holds_the_averaged_weights_alone(make_run, tiny, tmp_path, capsys):
    run, out = make_run({"000100": 0.3}), tmp_path / "new" / "chosen"
    main([str(run), "--samples", "4", "--draws", "1", "--out", str(out)])
    assert "it is the only one" in capsys.readouterr().out
    chosen = load_checkpoint(out)
    assert chosen.policy.net.velocity.out[-1].bias.tolist() == pytest.approx([0.3, 0.3])
    assert not any(name.startswith("ema_") for name in chosen.policy.state_dict())
    assert not (out / "train_config.json").exists()
    corner = {"observation.state": torch.full((1, 2), BOARD), "observation.environment_state": torch.zeros(1, 16)}
    batch, noise = chosen.preprocessor(corner), torch.zeros(1, HORIZON, 2)
    assert batch["observation.state"].tolist() == [[1.0, 1.0]]
    action = chosen.postprocessor(chosen.policy.predict_action_chunk(batch, noise)[:, 0])
    assert action.numpy() == pytest.approx((0.3 + 1) / 2 * BOARD, rel=1e-5)


def test_out_is_whole_or_absent(make_run, tmp_path, monkeypatch):
    run, out = make_run({"000100": 0.3}), tmp_path / "chosen"

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowMatchingPolicy, "_save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        export([run / "checkpoints" / "000100" / "pretrained_model"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_out_is_refused_before_anything_is_computed_if_it_holds_something(make_run, tmp_path):
    run = make_run({"000100": 0.3})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(SystemExit, match="full is not an empty folder"):
        main([str(run), "--out", str(tmp_path / "full")])
    assert not (run / "select.json").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]


# What cannot be chosen


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["net.velocity.out.1.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "it lacks policy_postprocessor.json": lambda folder: (folder / "policy_postprocessor.json").unlink(),
    "it lacks config.json": shutil.rmtree,
    "model.safetensors cannot be read": cut,
    "train_config.json cannot be read": lambda folder: (folder / "train_config.json").write_text('{"dataset": {'),
    "1 weights hold NaN": poison,
    "policy_preprocessor_step_5_normalizer_processor.safetensors": lambda folder: next(
        folder.glob("policy_preprocessor_step*")
    ).unlink(),
}


def test_checkpoints_that_are_not_whole_are_skipped_and_named(make_run, capsys):
    steps = {f"{i:06d}": damage for i, damage in enumerate(DAMAGES, start=1)}
    run = make_run(dict.fromkeys(steps, 0.0) | {"000100": 0.5})
    for step, damage in steps.items():
        DAMAGES[damage](run / "checkpoints" / step / "pretrained_model")
    main([str(run), "--samples", "4", "--draws", "1"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("select:")]
    assert len(warnings) == len(steps)
    for line, (step, damage) in zip(warnings, steps.items(), strict=True):
        assert line.startswith(f"select: checkpoint {step} is skipped: ") and damage in line
    found = record(run)
    assert (found["chosen"], list(found["checkpoints"]), list(found["skipped"])) == ("000100", ["000100"], [*steps])


def enlarge(run: Path, step: str) -> None:
    """Multiply what the average of a checkpoint starts from until its chunks overflow."""
    file = run / "checkpoints" / step / "pretrained_model" / "model.safetensors"
    weights = load_file(file)
    enlarged = {name: values + 1e38 * name.startswith("ema_net.velocity") for name, values in weights.items()}
    assert all(values.isfinite().all() for values in enlarged.values())
    save_file(enlarged, file, metadata={"format": "pt"})


def test_a_checkpoint_whose_finite_weights_make_chunks_that_are_not_is_skipped(make_run, capsys):
    run = make_run({"000100": 0.0, "000200": 0.0, "000300": 0.4})
    enlarge(run, "000100")
    main([str(run), "--samples", "4", "--draws", "1"])
    found = record(run)
    assert (found["chosen"], list(found["checkpoints"]), list(found["skipped"])) == (
        "000200",
        ["000200", "000300"],
        ["000100"],
    )
    assert "checkpoint 000100 is skipped: its training diverged: its criterion is not finite" in capsys.readouterr().err
    for step in ("000200", "000300"):
        enlarge(run, step)
    with pytest.raises(SystemExit, match="no checkpoint can be chosen: the criterion of 000100, 000200, 000300"):
        main([str(run), "--samples", "4", "--draws", "1"])


def test_a_run_without_a_usable_checkpoint_is_refused(make_run, tmp_path):
    run = make_run({"000100": 0.0})
    cut(run / "checkpoints" / "000100" / "pretrained_model")
    with pytest.raises(SystemExit, match="run holds no usable checkpoint:\n  000100: .* cannot be read"):
        main([str(run)])
    with pytest.raises(SystemExit, match="nowhere holds no checkpoints"):
        main([str(tmp_path / "nowhere")])


def test_a_policy_of_another_type_is_refused(make_run):
    run = make_run({"000100": 0.0})
    config = run / "checkpoints" / "000100" / "pretrained_model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"type": "diffusion"}))
    with pytest.raises(SystemExit, match="holds a policy of type 'diffusion', expected 'fm_ft'"):
        main([str(run)])


def test_a_run_that_changed_its_data_is_refused(make_run):
    run = make_run({"000100": 0.0, "000200": 0.0})
    file = run / "checkpoints" / "000200" / "pretrained_model" / "train_config.json"
    settings = json.loads(file.read_text())
    settings["dataset"]["eval_split"] = 0.5
    file.write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"dataset.eval_split: 0.25 at 000100, 0.5 at 000200"):
        main([str(run)])


@pytest.mark.parametrize(
    ("eval_split", "arguments", "message"),
    [
        (0.0, [], "held no episodes out .* choose --by coverage, or train with --dataset.eval_split"),
        (0.25, ["--draws", "0"], "draws must be at least 1, got 0"),
        (0.25, ["--by", "coverage"], "no task .* choose --by error, or train with --env.type"),
        (
            0.25,
            ["--by", "coverage", "--seed", "901"],
            "seeds 901-1000 overlap 1000-1499, on which results are reported",
        ),
        (0.25, ["--by", "coverage", "--seed", "1499", "--episodes", "1"], "overlap 1000-1499"),
    ],
)
def test_what_cannot_be_measured_is_refused(make_run, eval_split, arguments, message):
    run = make_run({"000100": 0.0}, eval_split)
    with pytest.raises(SystemExit, match=message):
        main([str(run), *arguments])
    assert not (run / "select.json").exists()


# A training by LeRobot


@pytest.fixture(scope="module")
def trained(demonstrations, tmp_path_factory) -> Path:
    """A run of two steps with two checkpoints, in a task of short episodes."""
    run = tmp_path_factory.mktemp("trained") / "run"
    short = ["--steps=2", "--save_freq=1", "--batch_size=8", "--env_eval_freq=0", "--eval_steps=0"]
    cheap = ["--policy.device=cpu", "--policy.num_solver_steps=1", "--policy.down_dims=[16,32]"]
    small = ["--env.episode_length=16", "--dataset.eval_split=0.25", "--policy.use_ema=false"]
    where = [f"--dataset.root={demonstrations}", f"--output_dir={run}"]
    cli.main(["train", "policy=fm_ft", "env=pusht", *short, *cheap, *small, *where])
    return run


def test_a_trained_run_is_chosen_from_by_error(trained):
    main([str(trained), "--draws", "2"])
    found = record(trained)
    assert list(found["checkpoints"]) == ["000001", "000002"]
    means = {step: row["mean"] for step, row in found["checkpoints"].items()}
    assert found["chosen"] == min(means, key=means.get)
    assert found["criterion"]["windows"] == 33


def test_a_trained_run_is_chosen_from_by_coverage_and_continued_after_a_kill(trained, capsys):
    arguments = [str(trained), "--by", "coverage", "--episodes", "3", "--repeats", "2"]
    main(arguments)
    found = record(trained)
    rows = found["checkpoints"]
    work = trained / "select"
    for step, row in rows.items():
        summary = json.loads((work / step / "summary.json").read_text())
        assert (row["mean"], row["success"]) == (summary["score"], summary["success"])
        assert summary["seed"] == 20000
    assert found["chosen"] == max(rows, key=lambda step: rows[step]["mean"])
    assert found["criterion"]["task"]["config"]["episode_length"] == 16

    # A kill in the second evaluation: five of its six episodes are there, the last row is cut off.
    file = work / "000002" / "episodes.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    (work / "000002" / "summary.json").unlink()
    main(arguments)
    assert record(trained)["checkpoints"] == rows
    assert json.loads((work / "000002" / "summary.json").read_text())["episodes_run_now"] == 1
    assert "score" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="holds another evaluation:\n  episodes: 3 there, 2 now"):
        main([*arguments, "--episodes", "2"])
    assert record(trained)["checkpoints"] == rows
    main([*arguments, "--episodes", "4"])  # more episodes are added to what is there
    for step in rows:
        assert json.loads((work / step / "summary.json").read_text())["episodes_run_now"] == 2
