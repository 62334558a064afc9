"""The recipes: LeRobot reads them, they leave nothing to a default, and they train."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import draccus
import numpy as np
import pytest
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig, parser
from lerobot.configs.default import DatasetConfig, EvalConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import get_policy_class

import lerobot_policy_fm_ft  # noqa: F401  (registers the policy and the tasks)
from env_configs import PRESETS, make_env_config
from env_configs.demos.pusht_zarr import features
from fm_policy import cli, recipes, stages
from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.checkpoint import load_any_checkpoint
from fm_policy.evaluation.runs import Run, evaluate_into
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

RECIPES = recipes.available()
FIRST = {key: path for key, path in RECIPES.items() if key.stage == recipes.FIRST_STAGE}
LATER = {key: path for key, path in RECIPES.items() if key not in FIRST}


def each(chosen: dict[recipes.RecipeKey, Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("key", "path"), [pytest.param(*item, id=item[1].stem) for item in chosen.items()])


# What a recipe rightly leaves open: machine, place, bookkeeping, and what LeRobot fills in itself.
LEFT_OPEN = {
    FlowMatchingConfig: {
        *("device", "pretrained_path", "pretrained_revision", "action_feature_names"),
        *("repo_id", "private", "tags", "license"),
        *("rtc_method", "rtc_warm_start", "compile_model"),
    },
    EnvConfig: {"features", "features_map", "max_parallel_tasks", "disable_env_checker", "render_size"},
    DatasetConfig: {"root", "revision", "repo_type", "return_uint8", "depth_output_unit"},
    EvalConfig: {"recording_repo_id", "recording_private"},
    TrainPipelineConfig: {
        *("output_dir", "job_name", "resume", "checkpoint_path", "job", "save_checkpoint_to_hub"),
        *("reward_model", "optimizer", "scheduler"),
        *("prefetch_factor", "persistent_workers", "dataloader_multiprocessing_context"),
    },
}

# What every stage after the first sets, what one of them sets besides, and what they take from their base: a new field
# of the configuration belongs into one of these.
SET_BY_EVERY = {
    *("stage", "coupling", "nearest_k", "nearest_steps", "reflow_steps", "variance", "sigma"),
    *("cfm_weight", "checkpoint_solver", "train_encoder", "observation_noise"),
    *("keep_statistics", "finetune_lr", "use_ema", "ema_power", "ema_max_decay"),
    *("window_store", "use_amp", "use_peft", "push_to_hub"),
}
SET_BY = {
    "finetune": {"solver", "num_solver_steps"},
    "residual": {
        *("head", "head_mode", "head_layout", "head_activations", "head_width", "head_rate", "head_span"),
        *("head_steps", "head_penalty", "head_penalty_weight", "head_penalty_margin", "train_base", "head_lr"),
    },
}
ALWAYS_TAKEN = {
    *stages.INHERITED,
    *("n_action_steps", "noise_scale", "drop_n_last_frames", "crop_is_random", "transformer_dropout"),
    *("optimizer_lr", "optimizer_betas", "optimizer_weight_decay", "scheduler_name", "scheduler_warmup_steps"),
}
# LeRobot drops a list from a recipe that starts from a policy: the base's holds, or the command line's.
NO_OVERRIDE = {"sigma", "head_activations"}


def set_by(stage: str) -> set[str]:
    return SET_BY_EVERY | SET_BY[stage]


def taken_from_base(stage: str) -> set[str]:
    return ALWAYS_TAKEN | set().union(*SET_BY.values()) - SET_BY[stage]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@each(RECIPES)
def test_a_recipe_names_every_field(key, path):
    recipe = read(path)
    sections = {
        TrainPipelineConfig: recipe,
        DatasetConfig: recipe["dataset"],
        EvalConfig: recipe["eval"],
    }
    task, _ = PRESETS[key.env]
    assert names(task) - LEFT_OPEN[EnvConfig] == set(recipe["env"]) - {"type"}
    for config, section in sections.items():
        assert names(config) - LEFT_OPEN[config] == set(section) - {"type"}, config.__name__


def test_the_recipe_of_the_baseline_names_every_field_and_shares_all_that_it_can():
    """So that policies are compared, not settings: the same data, windows, net size, optimiser and steps."""
    (baseline,) = recipes.available("dp_ema").values()
    theirs, ours = read(baseline), read(baseline.with_name("pusht_state.json"))
    assert names(DiffusionEmaConfig) - LEFT_OPEN[FlowMatchingConfig] == set(theirs["policy"]) - {"type"}
    assert {name: value for name, value in theirs.items() if name != "policy"} == {
        name: value for name, value in ours.items() if name != "policy"
    }
    shared = set(theirs["policy"]) & set(ours["policy"]) - {"type"}
    differing = {name for name in shared if theirs["policy"][name] != ours["policy"][name]}
    assert differing == {"spatial_softmax_num_keypoints"}  # of images, which this task does not show
    assert theirs["policy"]["diffusion_step_embed_dim"] == ours["policy"]["time_embed_dim"]
    assert theirs["policy"]["do_mask_loss_for_padding"]
    sizes = [size_of(recipe) for recipe in (theirs, ours)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@each({key: path for key, path in RECIPES.items() if key.env == "pusht"})
def test_of_mirrored_demonstrations_whole_pairs_are_held_out(key, path):
    """LeRobot rounds the number of episodes up; a mirror image that is learned from would tell of the one held out."""
    share = read(path)["dataset"]["eval_split"]
    assert math.ceil(206 * 2 * share) == 2 * math.ceil(206 * share) == 22


def size_of(recipe: dict) -> int:
    config = draccus.decode(TrainPipelineConfig, recipe).policy
    config.device = "cpu"
    return sum(p.numel() for p in get_policy_class(config.type)(config).parameters() if p.requires_grad)


@each(FIRST)
def test_a_recipe_of_the_first_stage_names_the_whole_policy(key, path):
    assert names(FlowMatchingConfig) - LEFT_OPEN[FlowMatchingConfig] == set(read(path)["policy"]) - {"type"}


@pytest.mark.parametrize("stage", SET_BY)
def test_every_field_is_set_by_a_later_stage_or_taken_from_its_base(stage):
    assert names(FlowMatchingConfig) - LEFT_OPEN[FlowMatchingConfig] == set_by(stage) | taken_from_base(stage)
    assert not set_by(stage) & taken_from_base(stage)


@each(LATER)
def test_a_recipe_of_a_later_stage_names_what_the_stage_sets(key, path):
    assert set(read(path)["policy"]) == set_by(key.stage) - NO_OVERRIDE | {"path"}


@each(LATER)
def test_a_later_stage_sees_the_data_and_the_task_of_the_first(key, path):
    recipe, first = read(path), read(FIRST[recipes.RecipeKey(key.env, key.obs)])
    for section in ("dataset", "env", "eval", "seed", "num_workers"):
        assert recipe[section] == first[section]


@each(FIRST)
def test_lerobot_reads_a_recipe_of_the_first_stage(key, path):
    recipe = read(path)
    config = draccus.decode(TrainPipelineConfig, recipe)
    assert isinstance(config.policy, FlowMatchingConfig)
    assert isinstance(config.env, PRESETS[key.env][0])
    for section in ("policy", "env", "eval"):
        with draccus.config_type("json"):
            decoded = draccus.encode(getattr(config, section))
        wanted = {key: value for key, value in recipe[section].items() if key != "type"}
        assert {key: decoded[key] for key in wanted} == wanted


@pytest.fixture
def validated(monkeypatch) -> Callable[..., TrainPipelineConfig]:
    """The configuration that LeRobot's trainer makes of its command line."""
    # Where LeRobot keeps what a recipe says of its base, until the process ends.
    monkeypatch.setattr(parser, "_config_path_args", {})
    monkeypatch.setattr(parser, "_config_yaml_overrides", {})

    @parser.wrap()
    def make(config: TrainPipelineConfig) -> TrainPipelineConfig:
        config.validate()
        return config

    def run(*flags: str) -> TrainPipelineConfig:
        monkeypatch.setattr("sys.argv", ["lerobot-train", *flags])
        return make()

    return run


@pytest.fixture
def base(tmp_path, monkeypatch) -> str:
    """A policy, by a relative path, that shares no value with a later stage's recipe where it can help it."""
    monkeypatch.chdir(tmp_path)
    config = FlowMatchingConfig(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (2,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        device="cpu",
        **{"horizon": 32, "down_dims": (8, 16), "velocity_net": "transformer", "optimizer_betas": (0.5, 0.6)},
        **{"solver": "heun", "num_solver_steps": 3, "nearest_k": 2, "nearest_steps": 2},
        **{"variance": "diagonal", "sigma": (0.1, 0.2)},
        **{"head_activations": ("prelu",), "head_width": 7, "head_span": 2.0, "head_penalty": "linear", "head_lr": 1.0},
        **{"cfm_weight": 0.5, "keep_statistics": True, "finetune_lr": 1.0, "use_amp": False, "push_to_hub": True},
        **{"use_ema": False, "ema_power": 0.5, "ema_max_decay": 0.5},
    )
    config.save_pretrained(tmp_path / "base")
    return "base"


@each(LATER)
def test_a_later_stage_changes_its_base_by_the_recipe_alone(key, path, base, validated):
    config = validated(f"--config_path={path}", f"--policy.path={base}")
    wanted = {name: value for name, value in read(path)["policy"].items() if name != "path"}
    assert {name: getattr(config.policy, name) for name in wanted} == wanted
    kept = PreTrainedConfig.from_pretrained(base)
    for name in taken_from_base(key.stage) | NO_OVERRIDE:
        assert getattr(config.policy, name) == getattr(kept, name), name
    assert config.policy.pretrained_path == Path(base)
    assert config.optimizer.lr == wanted["head_lr" if key.stage == "residual" else "finetune_lr"]
    assert config.optimizer.betas == (0.5, 0.6)
    schedule = "cosine" if wanted["coupling"] == "reflow" else "constant"
    assert dataclasses.asdict(config.scheduler) == {"name": schedule, "num_warmup_steps": 0}
    for name in ("steps", "save_freq", "batch_size"):
        assert getattr(config, name) == read(path)[name]
    assert config.env_eval_freq == (config.steps if key.env == "pusht" else 0)


@each(LATER)
def test_the_command_line_wins_over_a_later_stages_recipe(key, path, base, validated):
    config = validated(
        *(f"--config_path={path}", f"--policy.path={Path(base).absolute()}"),
        *("--policy.finetune_lr=1e-5", "--policy.head_lr=1e-5", "--steps=300"),
        *("--policy.coupling", "nearest", "--policy.variance=diagonal", "--policy.sigma=[0.3,0.4]"),
    )
    assert config.policy.finetune_lr == config.optimizer.lr == 1e-5
    assert (config.policy.coupling, config.policy.variance, config.policy.sigma) == ("nearest", "diagonal", (0.3, 0.4))
    assert config.steps == 300


@each(LATER)
def test_lerobot_says_what_a_later_stage_lacks(key, path, validated):
    with pytest.raises(ValueError, match=r"say which policy to fine-tune: --policy\.path=DIR"):
        validated(f"--config_path={path}")


@each(RECIPES)
def test_a_recipe_is_what_its_name_says_and_ends_with_one_evaluation_at_most(key, path):
    recipe = read(path)
    defaults = (None, recipes.DEFAULT_NET, recipes.FIRST_STAGE)
    assert path.stem == "_".join(word for word in key if word not in defaults)
    assert recipe["env"]["type"] == f"fm_{key.env}"
    assert recipe["env"].get("obs", "state") == key.obs
    assert recipe["policy"]["stage"] == key.stage
    # LeRobot films what it evaluates, which takes MuJoCo without a graphics card longer than the training.
    assert recipe["env_eval_freq"] == (recipe["steps"] if key.env == "pusht" else 0)
    assert recipe["steps"] % recipe["save_freq"] == 0
    assert recipe["eval"]["n_episodes"] % recipe["eval"]["batch_size"] == 0


@each(FIRST)
def test_a_recipe_of_the_first_stage_sees_and_runs_what_its_name_says(key, path):
    policy = read(path)["policy"]
    task = draccus.decode(TrainPipelineConfig, read(path)).env
    seen = {task.features_map[name]: feature.shape for name, feature in task.features.items() if name != "pixels"}
    named = policy["input_features"] | policy["output_features"]
    assert {name: tuple(spec["shape"]) for name, spec in named.items() if name != "observation.image"} == seen
    assert ("observation.image" in policy["input_features"]) == (key.obs == "image")
    assert (policy["velocity_net"] == "transformer") == (key.net == "transformer")


@each(FIRST)
def test_the_optimiser_is_pinned_to_the_last_number(key, path):
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
        for key, path in FIRST.items()
        if key.net != "paper" and key.env == "pusht"
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


def test_the_baseline_trains_and_is_evaluated_by_the_same_engine(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr("fm_policy.window_store.HF_LEROBOT_HOME", tmp_path / "home")
    run = tmp_path / "run"
    short = ["--steps=2", "--batch_size=4", "--env_eval_freq=0", "--policy.device=cpu"]
    where = [f"--dataset.root={demonstrations['state']}", f"--output_dir={run}"]
    assert cli.main(["train", "policy=dp_ema", "env=pusht", *short, *where]) is None

    task = make_env_config("pusht", episode_length=9)
    for solver, nfe in (("ddpm", 3), ("ddim", 2)):
        checkpoint = load_any_checkpoint(run / "checkpoints" / "last" / "pretrained_model", solver=solver, nfe=nfe)
        assert checkpoint.policy.ema_updates == 2
        assert checkpoint.note == f"evaluating with {solver} at NFE {nfe}; the checkpoint's own is ddpm at NFE 100"
        summary = evaluate_into(tmp_path / solver, checkpoint, task, Run(episodes=2))
        assert (summary["solver"], summary["nfe"], summary["head_nfe"], summary["steps"]) == (solver, nfe, 0, 9)
        alone = evaluate_into(tmp_path / f"{solver}_alone", checkpoint, task, Run(episodes=2, batch_size=1))
        assert {alone[name] == summary[name] for name in ("score", "measures")} == {True}
