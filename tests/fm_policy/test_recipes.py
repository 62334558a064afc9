"""The recipes: LeRobot reads them, they leave nothing to a default, and they train."""

import dataclasses
import json
from pathlib import Path

import draccus
import numpy as np
import pytest
from lerobot.configs.default import DatasetConfig, EvalConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import lerobot_policy_fm_ft  # noqa: F401  (registers the policy and the tasks)
from env_configs.demos.pusht_zarr import features
from env_configs.pusht import FmPushtEnv
from fm_policy import cli, recipes
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

RECIPES = recipes.available()
EACH = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in RECIPES.values()])

# What a recipe rightly leaves open: machine, place, bookkeeping, and what LeRobot fills in itself.
LEFT_OPEN = {
    FlowMatchingConfig: {
        *("device", "pretrained_path", "pretrained_revision", "action_feature_names"),
        *("repo_id", "private", "tags", "license"),
    },
    FmPushtEnv: {"features", "features_map", "max_parallel_tasks", "disable_env_checker", "render_size"},
    DatasetConfig: {"root", "revision", "repo_type", "return_uint8", "depth_output_unit"},
    EvalConfig: {"recording_repo_id", "recording_private"},
    TrainPipelineConfig: {
        *("output_dir", "job_name", "resume", "checkpoint_path", "job", "save_checkpoint_to_hub"),
        *("reward_model", "optimizer", "scheduler"),
        *("prefetch_factor", "persistent_workers", "dataloader_multiprocessing_context"),
    },
}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@EACH
def test_a_recipe_names_every_field(path):
    recipe = read(path)
    sections = {
        TrainPipelineConfig: recipe,
        FlowMatchingConfig: recipe["policy"],
        FmPushtEnv: recipe["env"],
        DatasetConfig: recipe["dataset"],
        EvalConfig: recipe["eval"],
    }
    for config, section in sections.items():
        assert names(config) - LEFT_OPEN[config] == set(section) - {"type"}, config.__name__


@EACH
def test_lerobot_reads_a_recipe(path):
    recipe = read(path)
    config = draccus.decode(TrainPipelineConfig, recipe)
    assert isinstance(config.policy, FlowMatchingConfig)
    assert isinstance(config.env, FmPushtEnv)
    for section in ("policy", "env", "eval"):
        with draccus.config_type("json"):
            decoded = draccus.encode(getattr(config, section))
        wanted = {key: value for key, value in recipe[section].items() if key != "type"}
        assert {key: decoded[key] for key in wanted} == wanted


@EACH
def test_a_recipe_is_what_its_name_says_and_ends_with_one_evaluation(path):
    recipe = read(path)
    key = next(key for key, file in RECIPES.items() if file == path)
    assert recipe["env"]["type"] == f"fm_{key.env}"
    assert recipe["env"]["obs"] == key.obs
    assert ("observation.image" in recipe["policy"]["input_features"]) == (key.obs == "image")
    assert (recipe["policy"]["velocity_net"] == "transformer") == (key.net == "transformer")
    assert recipe["env_eval_freq"] == recipe["steps"]
    assert recipe["eval"]["n_episodes"] % recipe["eval"]["batch_size"] == 0


@EACH
def test_the_optimiser_is_pinned_to_the_last_number(path):
    config = draccus.decode(TrainPipelineConfig, read(path)).policy
    optimizer = dataclasses.asdict(config.get_optimizer_preset())
    assert optimizer == {
        "lr": config.optimizer_lr,
        "betas": config.optimizer_betas,
        "weight_decay": config.optimizer_weight_decay,
        "eps": 1e-8,
        "grad_clip_norm": 10.0,
    }
    scheduler = dataclasses.asdict(config.get_scheduler_preset())
    assert scheduler == {"name": config.scheduler_name, "num_warmup_steps": config.scheduler_warmup_steps}


# Training


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> dict[str, Path]:
    """Data sets in the form of demonstrations, three episodes of 20 random frames, by their observations."""
    folder = tmp_path_factory.mktemp("demonstrations")
    return {obs: write_noise(folder / obs, features(obs)) for obs in ("state", "image")}


def write_noise(root: Path, columns: dict[str, dict]) -> Path:
    dataset = LeRobotDataset.create(f"local/{root.name}", fps=10, features=columns, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for _ in range(20):
            frame = {name: rng.uniform(0, 255, spec["shape"]) for name, spec in columns.items()}
            dataset.add_frame(in_their_types(frame, columns) | {"task": "push"})
        dataset.save_episode()
    dataset.finalize()
    return root


def in_their_types(frame: dict[str, np.ndarray], columns: dict[str, dict]) -> dict:
    types = {name: spec["dtype"].replace("image", "uint8") for name, spec in columns.items()}
    return {name: values.astype(types[name]) for name, values in frame.items()}


@pytest.mark.parametrize(
    "key",
    [
        # The paper's net differs from the small one in its size, and its checkpoint fills a gigabyte.
        pytest.param(key, id=path.stem)
        for key, path in RECIPES.items()
        if key.net != "paper"
    ],
)
def test_a_recipe_trains_evaluates_and_leaves_a_policy(key, demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr("fm_policy.window_store.HF_LEROBOT_HOME", tmp_path / "home")
    run = tmp_path / "run"
    words = ["policy=fm_ft", *(f"{word}={value}" for word, value in key._asdict().items())]
    short = ["--steps=2", "--batch_size=4", "--log_freq=1", "--eval.n_episodes=2", "--env.episode_length=9"]
    cheap = ["--policy.device=cpu", "--policy.num_solver_steps=2"]
    where = [f"--dataset.root={demonstrations[key.obs]}", f"--output_dir={run}"]
    assert cli.main(["train", *words, *short, *cheap, *where]) is None

    last = run / "checkpoints" / "last"
    assert read(last / "training_state" / "training_step.json")["step"] == 2
    policy = FlowMatchingPolicy.from_pretrained(last / "pretrained_model")
    recipe = read(RECIPES[key])["policy"]
    assert set(policy.config.input_features) == set(recipe["input_features"])
    assert policy.config.velocity_net == recipe["velocity_net"]
    assert all(weights.isfinite().all() for weights in policy.state_dict().values())
    assert len(list((run / "eval").rglob("*.mp4"))) == 2
