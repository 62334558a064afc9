"""`eval/accelerator.py`: from a data set to checkpoints, small, and as if LeRobot were not installed in between.

The U-Net has some thousand parameters; the encoder is a ResNet-18, on pictures of 32 x 32.
"""

import copy
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file

from env_configs.demos.dataset import Episode, write_dataset
from env_configs.demos.pusht_zarr import features
from fm_policy.accelerator import data, diffusion, plan, shards, speed, training
from fm_policy.accelerator.net import make_net
from fm_policy.evaluation.checkpoint import load_any_checkpoint
from fm_policy.files import read_tensors, write_tensors
from fm_policy.net import FlowMatchingNet
from fm_policy.recipes import RecipeKey, available
from fm_policy.repeatable import repeatable
from fm_policy.slices import Clock, TimeIsUpError

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = str(REPOSITORY / "eval" / "accelerator.py")
CPU = torch.device("cpu")
SIDE = 32
WITHOUT_LEROBOT = """
import runpy, sys
MISSING = ("lerobot", "diffusers", "gymnasium", "datasets", "draccus", "scipy", "cvxpy", "torchdiffeq", "matplotlib")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TUNED = ("--method", "ft", "--solver-steps", 2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Push-T's recipe from pixels with a small U-Net, small pictures and four steps."""
    whole = json.loads(available()[RecipeKey("pusht", "image")].read_text())
    whole |= {"steps": 4, "batch_size": 4}
    small = {"down_dims": [8, 16], "time_embed_dim": 8, "crop_shape": [28, 28]}
    whole["policy"] |= small | {"scheduler_warmup_steps": 0, "optimizer_lr": 1e-3}
    whole["policy"]["input_features"]["observation.image"]["shape"] = [3, SIDE, SIDE]
    file = tmp_path_factory.mktemp("recipe") / "small.json"
    file.write_text(json.dumps(whole))
    return file


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A LeRobotDataset of three short episodes."""
    rng = np.random.default_rng(0)

    def episode(length: int) -> Episode:
        moved = {name: rng.uniform(0, 512, (length, 2)).astype(np.float32) for name in ("observation.state", "action")}
        pictures = rng.integers(0, 256, (length, SIDE, SIDE, 3), dtype=np.uint8)
        outcome = {f"next.{name}": np.zeros((length, 1), dtype) for name, dtype in outcomes.items()}
        return Episode(moved | outcome | {"observation.image": pictures}, "Push the T.")

    outcomes = {"reward": np.float32, "done": bool, "success": bool}
    recorded = features("image")
    recorded["observation.image"]["shape"] = (SIDE, SIDE, 3)
    root = tmp_path_factory.mktemp("data") / "small"
    write_dataset(root, 10, recorded, [episode(length) for length in (14, 20, 12)])
    return root


@pytest.fixture
def program(monkeypatch):
    return lambda *arguments: run(*arguments)


def run(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [PROGRAM, *map(str, arguments)])
        runpy.run_path(PROGRAM, run_name="__main__")


@pytest.fixture(scope="module")
def packed(root, tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "data.safetensors"
    run("pack", "--root", root, "--out", file)
    return file


@pytest.fixture(scope="module")
def common(packed, recipe):
    """What every training's command says."""
    return ("--data", packed, "--recipe", recipe, "--device", "cpu")


@pytest.fixture(scope="module")
def runs(common, tmp_path_factory):
    """A folder with a finished `fm`, trained where LeRobot cannot be imported."""
    folder = tmp_path_factory.mktemp("runs")
    command = [PROGRAM, "train", *common, "--out", folder, "--method", "fm"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT_LEROBOT, *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "parameters, 4 steps" in told.stdout
    return folder


def planned(recipe: Path, method: str = "fm", **changes):
    return plan.first_stage(method, plan.read_recipe(recipe, RecipeKey("pusht", "image")), **changes)


def tuned(recipe: Path, coupling: str):
    tuning = plan.read_recipe(None, plan.TUNING_OF[coupling])
    return plan.second_stage(plan.read_recipe(recipe, RecipeKey("pusht", "image")), tuning, coupling, 2, batch=4)


def trainer(chosen, packed, folder, base=None):
    windows = data.Windows(data.load(packed), chosen.policy, chosen.held_out, CPU)
    return training.Trainer(chosen, windows, folder, base, CPU)


def stopped_after(steps: int, of: training.Trainer):
    of.run(SimpleNamespace(is_up=lambda: of.step >= steps))


def test_windows_are_the_preprocessor_s(root, packed, recipe, runs, tmp_path):
    """Pictures, state and action as LeRobot's own processors normalise them, held out by LeRobot's rule."""
    from lerobot.datasets import LeRobotDataset

    run("home", "--run", runs / "fm", "--out", tmp_path / "shards")
    run("assemble", "--shards", tmp_path / "shards", "--out", tmp_path / "checkpoint")
    windows = trainer(planned(recipe), packed, tmp_path / "none").windows
    assert windows.train.tolist() == [*range(6), *range(14, 26)] and windows.held_out.tolist() == [34, 35, 36, 37]
    frame = LeRobotDataset("local/small", root=root)[17]
    seen = load_any_checkpoint(tmp_path / "checkpoint").preprocessor(
        {name: frame[name] for name in ("observation.image", "observation.state")}
    )
    batch = windows.at(torch.tensor([17, 25]))
    for name in ("observation.image", "observation.state"):
        torch.testing.assert_close(batch[name][0], seen[name], rtol=1e-5, atol=1e-5)
    post = load_any_checkpoint(tmp_path / "checkpoint").postprocessor(batch["action"][:1, 0])
    torch.testing.assert_close(post[0], frame["action"], rtol=1e-4, atol=1e-3)
    assert batch["action_is_pad"].sum(1).tolist() == [0, 7]
    assert torch.equal(batch["action"][1, 8], batch["action"][1, 15])


@pytest.mark.parametrize("method", ["fm", "ddpm", "reflow", "nearest", "independent"])
def test_the_loss_of_one_batch_falls(recipe, packed, runs, tmp_path, method):
    chosen = planned(recipe, method) if method in ("fm", "ddpm") else tuned(recipe, method)
    base = training.finished(runs / "fm", planned(recipe)) if chosen.method == "ft" else None
    learner = trainer(chosen, packed, tmp_path, base)
    batch = learner.windows.at(learner.windows.train[:4])
    # A distillation begins where it shall end, but for the grid: larger steps would lead away.
    optimizer = torch.optim.Adam(learner.net.parameters(), 1e-4 if method == "reflow" else 1e-3)
    losses = []
    for _ in range(8):
        with repeatable((0, 0), CPU):
            loss = training.loss_of(chosen, learner.net, learner.base, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("method", ["fm", "ft"])
def test_killed_and_continued_it_is_the_unbroken_run(recipe, packed, runs, tmp_path, method):
    """`fm` beside the one of another process."""
    base = None if method == "fm" else training.finished(runs / "fm", planned(recipe))
    chosen = planned(recipe) if method == "fm" else replace(tuned(recipe, "reflow"), steps=3)
    unbroken, broken = runs / "fm", tmp_path / "broken"
    if method == "ft":
        unbroken = tmp_path / "unbroken"
        trainer(chosen, packed, unbroken, copy.deepcopy(base)).run(Clock())
    with pytest.raises(TimeIsUpError):
        stopped_after(2, trainer(chosen, packed, broken, base))
    lost = trainer(chosen, packed, broken, base)
    lost.learn()
    continued = trainer(chosen, packed, broken, base)
    assert continued.step == 2
    continued.run(Clock())
    first, second = (load_file(folder / "average.safetensors") for folder in (unbroken, broken))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    logs = [(folder / "log.jsonl").read_text() for folder in (unbroken, broken)]
    assert logs[0] == logs[1] and json.loads(logs[0])["step"] == chosen.steps
    assert not (broken / "state.safetensors").exists()


def test_fine_tuning_and_its_control_follow_a_finished_base(program, common, runs, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: no finished fm in .*fm: train it to its end first, --method fm"):
        program("train", *common, "--out", tmp_path, *TUNED)
    with pytest.raises(SystemExit) as stopped:
        program("train", *common, "--out", runs, *TUNED, "--steps", 2, "--batch-size", 2, "--minutes", 1e-6)
    assert stopped.value.code == 75 and "goes on from here" in capsys.readouterr().err
    program("train", *common, "--out", runs, *TUNED, "--steps", 2, "--batch-size", 2)
    control = ("--method", "fm_continued", *TUNED[2:], "--steps", 2, "--batch-size", 2)
    program("train", *common, "--out", runs, *control)
    assert (runs / "ft_reflow_2" / "average.safetensors").is_file()
    steps = json.loads((runs / "fm_continued_for_ft_reflow_2" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert steps > 2


def test_shards_are_small_and_whole_and_make_the_same_chunk(runs, recipe, tmp_path):
    limit = 6 * 2**20
    shards.home(runs / "fm", tmp_path / "shards", limit)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) <= limit
    net = training.finished(runs / "fm", planned(recipe))
    weights, _ = shards.read_shards(tmp_path / "shards")
    assert all(torch.equal(weights[name], weight.half()) for name, weight in net.state_dict().items())
    shards.assemble(tmp_path / "shards", tmp_path / "checkpoint")
    checkpoint = load_any_checkpoint(tmp_path / "checkpoint")
    seen = {"observation.image": torch.randn(3, 1, 3, SIDE, SIDE), "observation.state": torch.rand(3, 1, 2)}
    x0 = torch.randn(3, 16, 2)
    with torch.no_grad():
        expected = net.chunk(checkpoint.policy.config, x0, net.encoder(seen))
    torch.testing.assert_close(checkpoint.policy.predict_action_chunk(seen, x0), expected, rtol=0, atol=2e-2)
    files[0].unlink()
    with pytest.raises(ValueError, match=f"lacks {files[0].name}, which its index names"):
        shards.read_shards(tmp_path / "shards")


def test_a_weight_that_half_precision_cannot_hold_does_not_come_home(runs, tmp_path):
    tensors, about = read_tensors(runs / "fm" / training.AVERAGE_FILE)
    next(weight for name, weight in tensors.items() if name.startswith("average.")).view(-1)[0] = 7e4
    write_tensors(tmp_path / "run" / training.AVERAGE_FILE, tensors, about)
    with pytest.raises(ValueError, match="has values up to 70000, too large for float16"):
        shards.home(tmp_path / "run", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("coupling", ["reflow", "nearest", "independent"])
def test_fine_tuning_draws_the_noise_that_the_policy_will(recipe, packed, runs, tmp_path, monkeypatch, coupling):
    """The chunks start from noise of the configured width; `nearest` chooses among it."""
    whole, drawn = tuned(recipe, coupling), []
    base = training.finished(runs / "fm", planned(recipe))
    learner = trainer(whole, packed, tmp_path, base)
    chunk = FlowMatchingNet.chunk
    monkeypatch.setattr(
        FlowMatchingNet, "chunk", lambda net, config, x0, o: drawn.append(x0) or chunk(net, config, x0, o)
    )
    for scale in (1.0, 0.5):
        with repeatable((0, 0), CPU):
            narrower = replace(whole, policy=whole.policy | {"noise_scale": scale})
            training.loss_of(narrower, learner.net, base, learner.windows.draw(4))
    first, last = drawn[0], drawn[len(drawn) // 2]
    torch.testing.assert_close(last, 0.5 * first)


def test_ddpm_becomes_lerobot_s_diffusion_policy(recipe, packed, tmp_path):
    learner = trainer(planned(recipe, "ddpm"), packed, tmp_path / "ddpm")
    learner.run(Clock())
    shards.home(tmp_path / "ddpm", tmp_path / "shards")
    shards.assemble(tmp_path / "shards", tmp_path / "checkpoint")
    policy = load_any_checkpoint(tmp_path / "checkpoint").policy
    batch = learner.windows.at(learner.windows.train[:3])
    level, x = torch.tensor([0, 40, 99]), torch.randn(3, 16, 2)
    with torch.no_grad():
        o = diffusion.features(learner.average.encoder, batch)
        expected = learner.average.velocity(level / 1000, x, o)
        theirs = policy.diffusion._prepare_global_conditioning(
            batch | {"observation.images": batch[data.IMAGE][:, None]}
        )
        torch.testing.assert_close(theirs, o, rtol=0, atol=5e-3)
        torch.testing.assert_close(policy.diffusion.unet(x, level, global_cond=theirs), expected, rtol=0, atol=2e-2)
    chunk = policy.predict_action_chunk(batch, torch.randn(3, *policy.config.noise_shape))
    assert policy.nfe == 100 and chunk.isfinite().all()


def test_noise_levels_are_diffusers():
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
    assert torch.equal(diffusion.signal_shares(CPU), scheduler.alphas_cumprod)


def test_speed_is_told(program, recipe, tmp_path, capsys, monkeypatch):
    # In bfloat16, which many CPUs do not know, the product for the device's rate takes most of a minute.
    monkeypatch.setitem(speed.MATRIX, "cpu", 64)
    small = ("--batch-size", 2, "--rounds", 1, "--calls", 2, "--nfe", 1, 2, "--eager", "--device", "cpu")
    program("speed", "--recipe", recipe, *small, "--json", tmp_path / "speed.json")
    told = json.loads((tmp_path / "speed.json").read_text())
    assert told["training"]["eager, bf16"]["share"] > 0 and told["inference"]["NFE 2, eager"]["p99"] > 0
    assert told["inference"]["NFE 2, eager, one CUDA graph"] == "needs CUDA"
    assert "needs CUDA" in capsys.readouterr().out


def test_the_script_goes_on_in_slices(tmp_path):
    """With a stand-in for Python, whose first training takes two slices."""
    stand_in, log = tmp_path / "python", tmp_path / "log"
    stand_in.write_text(
        f"""#!/usr/bin/env bash
        echo "$@" >> {log}
        case "$2" in
            train) [ "$(grep -c train {log})" -ne 1 ] || exit 75 ;;
            home) mkdir -p "${{@: -1}}" ;;
            speed) touch "${{@: -1}}" ;;
        esac
        """
    )
    stand_in.chmod(0o755)
    script = ("bash", str(Path(PROGRAM).with_suffix(".sh")), tmp_path / "data", tmp_path / "runs", tmp_path / "shards")
    environment = os.environ | {"PYTHON": str(stand_in), "FLAGS": "--bf16"}
    first = subprocess.run(script, env=environment | {"SLICES": "1"}, capture_output=True, text=True)
    assert first.returncode == 75 and log.read_text().count("\n") == 1
    rest = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert rest.returncode == 0, rest.stderr
    lines = log.read_text().splitlines()
    names = [line.rpartition("/")[2] for line in lines if " home " in line]
    assert names[:2] == ["fm", "ft_reflow_2"] and len(names) == len(set(names)) == 7
    assert sum(" train " in line and line.endswith("--bf16") for line in lines) == 8
    assert subprocess.run(script, env=environment).returncode == 0 and log.read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", 0), "--minutes must be above 0, got 0"),
        (("--method", "gan"), "invalid choice: 'gan'"),
        (("--coupling", "ot"), "invalid choice: 'ot'"),
        (("--device", "gpu"), "device must be cpu, cuda or cuda:N, got 'gpu'"),
        (("--data", "nothing.safetensors"), r"nothing.safetensors is no file of `accelerator.py pack`"),
        (("--recipe", "nothing.json"), "nothing.json is no recipe"),
        (("--steps", 9, "--method", "fm"), "was made with steps 4 instead of 9: choose another --out"),
        (("--seed", 3, "--method", "ft"), "was made with seed 1000 instead of 3"),
    ],
)
def test_bad_arguments_are_refused_by_name(program, common, runs, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        program("train", *common, "--out", runs, "--method", "fm", *arguments)
    assert message in f"{refused.value.code} {capsys.readouterr().err}"


def test_a_file_where_a_folder_should_be_is_named(program, runs, tmp_path):
    (tmp_path / "shards").write_text("")
    with pytest.raises(SystemExit, match=r"shards is not an empty folder: choose another one"):
        program("home", "--run", runs / "fm", "--out", tmp_path / "shards")


def test_other_folders_and_data_are_refused(recipe, packed, tmp_path):
    with pytest.raises(ValueError, match=r"no LeRobotDataset in .*: it has no meta/info.json"):
        data.pack(tmp_path)
    with pytest.raises(ValueError, match="no training in"):
        shards.home(tmp_path, tmp_path / "shards")
    with pytest.raises(ValueError, match="no shards in"):
        shards.assemble(tmp_path, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="is not an empty folder: choose another one"):
        shards.assemble(tmp_path, packed.parent)
    chosen = planned(recipe)
    chosen.policy["input_features"]["observation.image"]["shape"] = [3, 96, 96]
    with pytest.raises(ValueError, match=r"'observation.image' of the data has the shape \[3, 32, 32\]"):
        data.Windows(data.load(packed), chosen.policy, 0.0, CPU)
    chosen.policy["down_dims"] = [512, 1024, 2048]
    with pytest.raises(ValueError, match="a net has at most 30000000 parameters, this one 2"):
        make_net(chosen.policy)
    noisy = plan.read_recipe(recipe, RecipeKey("pusht", "image"))
    noisy["policy"]["observation_noise"] = 0.1
    with pytest.raises(ValueError, match="observation_noise must be 0, got 0.1"):
        plan.first_stage("fm", noisy)
    recipe_of_few = plan.read_recipe(recipe, RecipeKey("pusht", "image"))
    recipe_of_few["policy"]["n_groups"] = 4
    with pytest.raises(ValueError, match="ddpm needs n_groups=8, as LeRobot's last block, got 4"):
        plan.first_stage("ddpm", recipe_of_few)
