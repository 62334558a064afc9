"""The later stages through the command line: from a pre-trained policy, by the recipe, on the data that fit it."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import parser
from lerobot.datasets import LeRobotDataset
from safetensors.torch import load_file

from fm_policy import cli, recipes

RECIPES = recipes.available()
STAGE_LR = 1e-5
ON_DATA = ["--policy.coupling=nearest", f"--policy.finetune_lr={STAGE_LR}"]

FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
    "observation.environment_state": {"dtype": "float32", "shape": (16,), "names": None},
    "observation.image": {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channel"]},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
}
UNET = ["--policy.down_dims=[16,32]", "--policy.n_groups=4", "--policy.time_embed_dim=8"]
TRANSFORMER = ["--policy.transformer_dim=16", "--policy.transformer_layers=1", "--policy.transformer_heads=2"]
BASES = {
    "unet": ["obs=state", *UNET],
    "transformer": ["obs=state", "net=transformer", *TRANSFORMER],
    "image": ["obs=image", *UNET, "--save_freq=2"],
}
SUGAR = ["train", "policy=fm_ft", "env=pusht"]
SHORT = ["--steps=2", "--save_freq=1", "--batch_size=4", "--log_freq=1", "--policy.device=cpu", "--env_eval_freq=0"]
# A rate at which two steps part the average from the weights.
COARSE = ["--policy.optimizer_lr=0.01", "--policy.scheduler_warmup_steps=0"]


def write_noise(root: Path, largest: float) -> Path:
    """Three episodes of 20 random frames, between 0 and `largest`; one episode is held out."""
    dataset = LeRobotDataset.create(f"local/{root.name}", fps=10, features=FEATURES, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for _ in range(20):
            frame = {name: rng.uniform(0, largest, spec["shape"]) for name, spec in FEATURES.items()}
            types = {name: np.uint8 if name.endswith("image") else np.float32 for name in frame}
            dataset.add_frame({name: frame[name].astype(types[name]) for name in frame} | {"task": "push"})
        dataset.save_episode()
    dataset.finalize()
    return root


def lerobot(*words: str) -> None:
    """Run the program as in a process of its own: until its end LeRobot keeps what a recipe says of its base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "_config_path_args", {})
        patch.setattr(parser, "_config_yaml_overrides", {})
        assert cli.main(words) is None


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    return write_noise(tmp_path_factory.mktemp("demonstrations") / "noise", largest=255)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, demonstrations) -> Callable[[str], Path]:
    """Pre-train a tiny policy of a kind, once: the folder of its checkpoints, of steps 1 and 2."""

    @cache
    def train(kind: str) -> Path:
        run = tmp_path_factory.mktemp("pretrained") / kind
        lerobot(*SUGAR, *SHORT, *COARSE, *BASES[kind], f"--dataset.root={demonstrations}", f"--output_dir={run}")
        return run / "checkpoints"

    return train


@pytest.fixture
def base(pretrained) -> Path:
    """A pre-trained policy that sees states."""
    return policy_of(pretrained("unet") / "last")


def policy_of(checkpoint: Path) -> Path:
    return checkpoint / "pretrained_model"


def finetune(base: Path, data: Path, run: Path, *words: str, stage: str = "finetune") -> Path:
    """Train a later stage by the words of the command line; returns the last checkpoint."""
    where = [f"--policy.path={base}", f"--dataset.root={data}", f"--output_dir={run}"]
    lerobot(*SUGAR, f"stage={stage}", *SHORT, *where, *words)
    return run / "checkpoints" / "last"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def learning_rates(checkpoint: Path) -> list[float]:
    return [group["lr"] for group in read(checkpoint / "training_state" / "optimizer_param_groups.json")]


def of_net(weights: dict[str, torch.Tensor], role: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(role): value for name, value in weights.items() if name.startswith(role)}


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(policy_of(checkpoint) / "model.safetensors")


@pytest.mark.parametrize("kind", BASES)
def test_the_average_of_any_base_moves_by_small_steps_through_the_recipes_grid(
    kind, pretrained, demonstrations, tmp_path
):
    obs = "image" if kind == "image" else "state"
    checkpoints = pretrained(kind)
    words = [f"obs={obs}", "--save_freq=2", "--eval_steps=2", *ON_DATA]
    last = finetune(policy_of(checkpoints / "last"), demonstrations, tmp_path / "run", *words)

    config, recipe = read(policy_of(last) / "config.json"), read(RECIPES["pusht", obs, None, "finetune"])["policy"]
    said = {"path": None, "coupling": "nearest", "finetune_lr": STAGE_LR}
    assert {name: config.get(name) for name in recipe} == recipe | said
    assert (config["stage"], config["solver"], config["num_solver_steps"]) == ("finetune", "euler", 2)
    assert learning_rates(last) == [STAGE_LR]

    before, after = weights_of(checkpoints / "last"), weights_of(last)
    average, start = of_net(before, "ema_net."), of_net(after, "base_net.")
    assert start.keys() == average.keys()
    assert all(torch.equal(start[name], average[name]) for name in average)
    parted = max((of_net(before, "net.")[name] - average[name]).abs().max() for name in average)
    # No step of Adam with these betas is larger than lr * (1 - b1) / sqrt(1 - b2) < 2 lr.
    assert parted > 50 * 4 * STAGE_LR
    for role in ("net.", "ema_net."):
        moved = [(of_net(after, role)[name] - average[name]).abs().max() for name in average]
        assert 0 < max(moved) <= 4 * STAGE_LR
        assert np.mean([m > 0 for m in moved]) > 0.9
    assert (after["training_steps"], after["ema_updates"]) == (2, 2)


def test_plain_lerobot_train_keeps_the_statistics_of_its_base_if_told(base, demonstrations, tmp_path):
    other, run = write_noise(tmp_path / "other", largest=200), tmp_path / "run"
    plain = ["train", f"--config_path={RECIPES['pusht', 'state', None, 'finetune']}", f"--policy.path={base}"]
    flags = [*SHORT, f"--dataset.root={other}", f"--output_dir={run}", *ON_DATA]
    with pytest.raises(ValueError, match=r"(?s)has other statistics than .*keep_statistics=true"):
        lerobot(*plain, *flags)
    evaluated = ["--env_eval_freq=2", "--eval.n_episodes=2", "--env.episode_length=9"]
    lerobot(*plain, *flags, *evaluated, "--policy.keep_statistics=true")

    last = run / "checkpoints" / "last"
    assert learning_rates(last) == [STAGE_LR]
    files = sorted(file.name for file in base.glob("*normalizer_processor.safetensors"))
    assert len(files) == 2
    for file in files:
        there, here = load_file(base / file), load_file(policy_of(last) / file)
        for feature in ("observation.state", "observation.environment_state", "action"):
            for end in ("min", "max"):
                assert torch.equal(here[f"{feature}.{end}"], there[f"{feature}.{end}"])
    assert there["action.max"].max() > 230  # of 0 to 255, and not of 0 to 200
    assert len(list((run / "eval").rglob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("step", "flags", "message"),
    [
        ("last", ["--policy.horizon=32"], r"keeps the shape of its base .*\n  horizon: 16 there, 32 asked for"),
        ("000001", [], r"000001.* is half-trained: step 1 of 2"),
    ],
)
def test_what_does_not_fit_its_base_is_refused(step, flags, message, pretrained, demonstrations, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(policy_of(pretrained("unet") / step), demonstrations, tmp_path / "run", *flags)
    assert not list((tmp_path / "run").rglob("model.safetensors"))


def test_a_head_learns_at_its_own_rate_behind_the_frozen_average_of_its_base(pretrained, demonstrations, tmp_path):
    checkpoints = pretrained("unet")
    words = ["--save_freq=2", "--eval_steps=2", '--policy.head_activations=["tanh"]']
    last = finetune(policy_of(checkpoints / "last"), demonstrations, tmp_path / "run", *words, stage="residual")

    config, recipe = read(policy_of(last) / "config.json"), read(RECIPES["pusht", "state", None, "residual"])["policy"]
    assert {name: config.get(name) for name in recipe} == recipe | {"path": None}
    assert (config["stage"], config["head_activations"], config["num_solver_steps"]) == ("residual", ["tanh"], 16)
    assert learning_rates(last) == [config["head_lr"]] == [1e-3]

    average, after = of_net(weights_of(checkpoints / "last"), "ema_net."), weights_of(last)
    for role in ("net.", "ema_net.", "base_net."):
        assert all(torch.equal(after[role + name], value) for name, value in average.items())
    heads = {role: of_net(after, f"{role}head.") for role in ("net.", "ema_net.")}
    assert not of_net(after, "base_net.head.")
    assert heads["net."].keys() == heads["ema_net."].keys()
    # It starts with g = 0, whatever the observation; the average took its first step whole and of the second a part.
    for head in heads.values():
        assert 0 < head["drive.2.weight"].abs().max() < 4 * config["head_lr"]
    assert not torch.equal(heads["net."]["drive.2.weight"], heads["ema_net."]["drive.2.weight"])
    assert (after["training_steps"], after["ema_updates"]) == (2, 2)
    assert "| head | control_synth (constructed, shared), 4 Euler steps" in (policy_of(last) / "README.md").read_text()


@pytest.mark.parametrize(
    ("stage", "words", "rates"),
    [
        ("finetune", ON_DATA, [STAGE_LR]),
        ("finetune", ["--policy.coupling=reflow", "--policy.observation_noise=0.1"], [0.0]),  # the cosine's end
        ("residual", ["--policy.train_base=true"], [1e-3, 5e-6]),
    ],
)
def test_a_resumed_later_stage_is_the_unbroken_one(stage, words, rates, base, demonstrations, tmp_path):
    last = finetune(base, demonstrations, tmp_path / "run", *words, stage=stage)
    assert learning_rates(last) == rates
    whole = weights_of(last)
    first = last.with_name("000001")
    shutil.rmtree(last.with_name("000002"))
    lerobot("train", f"--config_path={policy_of(first) / 'train_config.json'}", "--resume=true")
    resumed = weights_of(last)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_its_loss_trains_from_scratch_as_the_refusal_says(demonstrations, tmp_path):
    words = ["stage=pretrain", "--policy.stage=finetune", "--policy.finetune_lr=0.01", *BASES["unet"]]
    where = [f"--dataset.root={demonstrations}", f"--output_dir={tmp_path / 'run'}"]
    lerobot(*SUGAR, *SHORT, *words, *where)
    last = tmp_path / "run" / "checkpoints" / "last"
    assert read(policy_of(last) / "config.json")["stage"] == "finetune"
    assert learning_rates(last) == [0.01]
