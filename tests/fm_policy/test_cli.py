"""The program `lerobot`: what its words stand for, what it refuses, and which data it takes."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm_policy import cli, recipes
from fm_policy.cli_data import HUMAN_DEMOS
from fm_policy.cli_usage import value_of as value

SUGAR = ["train", "policy=fm_ft", "env=pusht"]
NAMED = ["--dataset.repo_id=me/mine"]
RECIPES = recipes.available()
STATE_RECIPE = RECIPES[recipes.RecipeKey("pusht", "state")]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty LeRobot home, and no FM_DATA."""
    monkeypatch.delenv("FM_DATA", raising=False)
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HOME", tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def conversions(monkeypatch) -> list[list[str]]:
    """Stands for the converter, which takes half a minute: notes its calls and writes the data set's card."""
    calls = []

    def convert(arguments: list[str]) -> int:
        calls.append(arguments)
        options = dict(argument.removeprefix("--").split("=") for argument in arguments[1:] if "=" in argument)
        seen = {"state": "observation.environment_state", "image": "observation.image"}[options["obs"]]
        write_card(Path(options["root"]), ["observation.state", seen, "action"])
        return 0

    monkeypatch.setattr("env_configs.demos.__main__.main", convert)
    return calls


def write_card(root: Path, features: list[str]) -> None:
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps({"features": {name: {} for name in features}}))


def human_demos(folder: Path, content: bytes = b"demonstrations") -> Path:
    source = folder / HUMAN_DEMOS["pusht"]
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(content)
    return source


def write_policy(folder: Path, kind: str, *features: str) -> Path:
    """The config.json of a policy, as far as the command line reads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"type": kind, "input_features": {name: {} for name in features}}))
    return folder


# What the words stand for


def test_every_program_of_lerobot_is_reached_with_its_arguments_unchanged():
    names = [name for name in cli.programs() if name != "lerobot"]
    assert {"lerobot-train", "lerobot-eval", "lerobot-rollout", "lerobot-train-tokenizer"} <= set(names)
    arguments = ["--policy.path=x", "a=b", "--flag", "value"]
    for name in set(names) - {"lerobot-train"}:
        assert cli.expand([name.removeprefix("lerobot-"), *arguments]) == [name, *arguments]


def test_train_without_words_is_left_alone():
    flags = ["--config_path=run/train_config.json", "--resume", "true", "--steps=7"]
    assert cli.expand(["train", *flags]) == ["lerobot-train", *flags]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([], ("pusht", "state", "unet")),
        (["stage=pretrain", "obs=state", "net=unet"], ("pusht", "state", "unet")),
        (["net=transformer"], ("pusht", "state", "transformer")),
        (["obs=image"], ("pusht", "image", "unet")),
        (["net=paper", "obs=image"], ("pusht", "image", "paper")),
    ],
)
def test_words_choose_the_recipe(words, key):
    command = cli.expand([*SUGAR, *words, *NAMED])
    assert command[0] == "lerobot-train"
    assert value(command, "config_path") == str(RECIPES[recipes.RecipeKey(*key)])


def test_the_baseline_has_a_recipe_of_its_own():
    command = cli.expand(["train", "policy=dp_ema", "env=pusht", *NAMED])
    assert value(command, "config_path") == str(STATE_RECIPE.with_name("pusht_state_diffusion.json"))


def test_flags_come_last_wherever_they_stood_between_the_words():
    command = cli.expand(["train", "--steps", "10", "policy=fm_ft", "--seed=-3", "env=pusht", *NAMED])
    assert command[-4:] == ["--steps", "10", "--seed=-3", *NAMED]
    assert command.index(f"--config_path={STATE_RECIPE}") < command.index("--steps")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--steps=10"], "10"),
        (["--steps", "10"], "10"),
        (["--steps=10", "--steps=20"], "20"),
        (["--steps=10", "--env_eval_freq=0"], "0"),
    ],
)
def test_the_closing_evaluation_stays_at_the_end(flags, expected):
    assert value(cli.expand([*SUGAR, *flags, *NAMED]), "env_eval_freq") == expected


def test_a_task_that_is_slow_to_film_has_no_closing_evaluation_unless_asked_for():
    words = ["train", "policy=fm_ft", "env=kitchen", "--steps=10", *NAMED]
    assert value(cli.expand(words), "env_eval_freq") is None
    assert value(cli.expand([*words, "--env_eval_freq=10"]), "env_eval_freq") == "10"


def test_the_whole_command_is_printed(capsys):
    command = cli.expand([*SUGAR, "--job_name=two words", *NAMED])
    assert capsys.readouterr().out.splitlines()[-1].split(" ", 1)[0] == command[0]
    cli.expand([*SUGAR, "--job_name=two words", *NAMED])
    assert "'--job_name=two words'" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_asks_for_no_data(flag, home, conversions, capsys):
    assert cli.expand([*SUGAR, flag]) == ["lerobot-train", f"--config_path={STATE_RECIPE}", flag]
    assert cli.main([flag]) == 0
    assert "lerobot train policy=fm_ft env=pusht" in capsys.readouterr().out


# Refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"say which program to run: .*eval.*train"),
        (["foo"], r"unknown program 'foo' \(known: .*eval.*train"),
        (["trian"], r"unknown program 'trian', did you mean 'train'\?"),
        (["train", "polcy=fm_ft"], r"unknown word 'polcy', did you mean 'policy'\? \(known: policy, env"),
        ([*SUGAR, "steps=10"], r"unknown word 'steps' \(known: .*LeRobot's own flags start with two dashes"),
        ([*SUGAR, "now"], r"unknown word 'now' \(known: policy, env, obs, net, stage"),
        ([*SUGAR, "obs=state", "obs=image"], r"'obs' is said twice: obs=state and obs=image"),
        (["train", "env=pusht"], r"env=pusht lacks the word policy="),
        (["train", "policy=fm_ft"], r"policy=fm_ft lacks the word env="),
        (["train", "policy=act", "env=pusht"], r"unknown policy 'act' \(known: fm_ft, dp_ema; .*--policy\.type"),
        (
            ["train", "policy=fm_ft", "env=nope"],
            r"unknown env 'nope' \(known: handover, kitchen, lift, pusht, transport\)",
        ),
        ([*SUGAR, "obs=imgae"], r"unknown obs 'imgae', did you mean 'image'\? \(known: image, state\)"),
        ([*SUGAR, "net=mlp"], r"unknown net 'mlp' \(known: paper, transformer, unet\)"),
        ([*SUGAR, "net=diffusion"], r"unknown net 'diffusion' \(known: paper, transformer, unet\)"),
        (["train", "policy=dp_ema", "env=lift"], r"unknown env 'lift' \(known: pusht\)"),
        (["train", "policy=dp_ema", "env=pusht", "stage=finetune"], r"unknown stage 'finetune' \(known: pretrain\)"),
        (
            [*SUGAR, "stage=finetuen"],
            r"unknown stage 'finetuen', did you mean 'finetune'\? \(known: finetune, pretrain, residual\)",
        ),
        (
            [*SUGAR, "obs=image", "net=transformer"],
            r"no recipe for env=pusht obs=image net=transformer stage=pretrain \(",
        ),
        ([*SUGAR, "--config_path=x.json"], r"--config_path and the words policy=fm_ft env=pusht both name"),
    ],
)
def test_words_that_do_not_say_what_to_do_are_refused(words, message):
    with pytest.raises(cli.UsageError, match=message):
        cli.expand(words)


def test_a_refusal_is_one_line_and_status_2(capsys):
    assert cli.main(["train", "policy=fm_ft", "env=nope"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "lerobot: unknown env 'nope' (known: handover, kitchen, lift, pusht, transport)\n"
    assert captured.out == ""


# Data


@pytest.mark.parametrize("flags", [["--dataset.repo_id=me/mine"], ["--dataset.root", "mine"]])
def test_a_named_data_set_is_left_alone(flags, home, conversions, tmp_path, monkeypatch, capsys):
    human_demos(tmp_path)
    monkeypatch.setenv("FM_DATA", str(tmp_path))
    assert cli.expand([*SUGAR, *flags]) == ["lerobot-train", f"--config_path={STATE_RECIPE}", *flags]
    assert conversions == []
    assert "mine, as --dataset." in capsys.readouterr().out


def test_human_demonstrations_are_converted_once(home, conversions, tmp_path, monkeypatch, capsys):
    source = human_demos(tmp_path)
    monkeypatch.setenv("FM_DATA", str(tmp_path))
    first = cli.expand(SUGAR)
    root = value(first, "dataset.root")
    assert conversions == [["pusht", f"--source={source}", f"--root={root}", "--obs=state", "--mirror"]]
    assert Path(root).parent == home / "fm_ft"
    assert value(first, "dataset.repo_id") == f"local/{Path(root).name}"
    assert f"the human demonstrations and their mirror images of {source}" in capsys.readouterr().out
    assert cli.expand(SUGAR) == first
    assert len(conversions) == 1


def test_another_file_or_observation_is_another_data_set(home, conversions, tmp_path, monkeypatch):
    monkeypatch.setenv("FM_DATA", str(tmp_path))
    roots = set()
    for content, words in [(b"one", SUGAR), (b"one", [*SUGAR, "obs=image"]), (b"two", SUGAR)]:
        human_demos(tmp_path, content)
        roots.add(value(cli.expand(words), "dataset.root"))
    assert len(roots) == len(conversions) == 3


def test_a_conversion_that_fails_stops_the_training(home, tmp_path, monkeypatch):
    source = human_demos(tmp_path, b"not a zarr store")
    monkeypatch.setenv("FM_DATA", str(tmp_path))
    with pytest.raises(cli.UsageError, match=f"{source} could not be converted"):
        cli.expand(SUGAR)
    assert list(home.rglob("info.json")) == []


@pytest.mark.parametrize("fm_data", [None, "empty"])
def test_without_human_demonstrations_the_shipped_ones_serve(fm_data, home, tmp_path, monkeypatch, capsys):
    from fm_policy.assets import default_demos

    if fm_data:
        monkeypatch.setenv("FM_DATA", str(tmp_path))
    command = cli.expand(SUGAR)
    assert value(command, "dataset.root") == str(default_demos())
    reason = f"FM_DATA={tmp_path} holds none" if fm_data else "FM_DATA is not set"
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("env", ["kitchen", "lift", "handover", "transport"])
def test_a_task_without_demonstrations_says_which_are_wanted_and_where(env, home, tmp_path, monkeypatch):
    for reason in ("FM_DATA is not set", f"FM_DATA={tmp_path} holds none of this task"):
        with pytest.raises(cli.UsageError, match=f"{reason}: set FM_DATA to a folder that holds {HUMAN_DEMOS[env]}"):
            cli.expand(["train", "policy=fm_ft", f"env={env}"])
        monkeypatch.setenv("FM_DATA", str(tmp_path))


def test_demonstrations_without_the_recipes_observations_are_refused(home, tmp_path, monkeypatch):
    write_card(tmp_path / "demos", ["observation.state", "action"])
    monkeypatch.setattr("fm_policy.assets.default_demos", lambda: tmp_path / "demos")
    with pytest.raises(cli.UsageError, match=r"lacks observation\.image, from which the policy learns"):
        cli.expand([*SUGAR, "obs=image"])


def test_a_missing_simulator_is_refused_before_the_training_and_not_after_it(monkeypatch):
    monkeypatch.setattr("env_configs.doctor.missing", lambda extra: [f"the simulator of {extra} is missing"])
    with pytest.raises(cli.UsageError, match=r"the simulator of pusht is missing.*--env_eval_freq=0"):
        cli.expand([*SUGAR, *NAMED])
    assert cli.expand([*SUGAR, "--env_eval_freq=0", *NAMED])[0] == "lerobot-train"
    lift = ["train", "policy=fm_ft", "env=lift", *NAMED]
    assert cli.expand(lift)[0] == "lerobot-train"
    with pytest.raises(cli.UsageError, match=r"the simulator of robosuite is missing"):
        cli.expand([*lift, "--env_eval_freq=3000"])


# A later stage


def test_a_later_stage_takes_its_recipe_and_starts_from_the_named_policy(tmp_path):
    base = write_policy(tmp_path / "base", "fm_ft", "observation.state", "observation.environment_state")
    for flags in ([f"--policy.path={base}"], ["--policy.path", str(base)]):
        command = cli.expand([*SUGAR, "stage=finetune", *flags, *NAMED])
        assert value(command, "config_path") == str(STATE_RECIPE.with_name("pusht_state_finetune.json"))
        assert command[-len(flags) - 1 :] == [*flags, *NAMED]


def test_a_later_stage_learns_from_what_its_base_sees(home, tmp_path, monkeypatch):
    base = write_policy(tmp_path / "base", "fm_ft", "observation.state")
    write_card(tmp_path / "demos", ["observation.state", "action"])
    monkeypatch.setattr("fm_policy.assets.default_demos", lambda: tmp_path / "demos")
    command = cli.expand([*SUGAR, "stage=finetune", f"--policy.path={base}"])
    assert value(command, "dataset.root") == str(tmp_path / "demos")
    with pytest.raises(cli.UsageError, match=r"lacks observation\.environment_state"):
        cli.expand(SUGAR)


def test_a_base_on_the_hub_is_left_to_lerobot():
    command = cli.expand([*SUGAR, "stage=finetune", "--policy.path=someone/policy", *NAMED])
    assert value(command, "policy.path") == "someone/policy"


def test_help_on_a_later_stage_asks_for_no_base():
    assert cli.expand([*SUGAR, "stage=finetune", "--help"])[-1] == "--help"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"stage=finetune starts from a pre-trained policy, --policy\.path=DIR; .*stage=pretrain --policy\.stage="),
        (["--policy.path="], r"starts from a pre-trained policy"),
        (["net=unet", "--policy.path=base"], r"stage=finetune keeps the net of its base: leave net=unet away"),
        (["--policy.path=no/such/folder"], r"there is no folder no/such/folder"),
        (
            ["--policy.path=empty/tunedd"],
            r"there is no folder empty/tunedd, .* one empty: for a policy of that name on the Hub",
        ),
        (["--policy.path=empty"], r"empty holds no policy \(no config\.json\).*checkpoints/\*/pretrained_model"),
        (["--policy.path=act"], r"act holds a policy of type 'act', expected 'fm_ft'"),
        (["--policy.path=cut"], r"cut/config\.json is broken, perhaps cut off when it was copied: JSONDecodeError"),
        (["--policy.path=bare"], r"bare/config\.json names no input_features, got None"),
        (["--policy.path=image"], r"image sees observation\.image, which obs=state does not show: say obs=image"),
        (["obs=image", "--policy.path=state"], r"state sees observation\.environment_state, .*: say obs=state"),
        (["--policy.path=robot"], r"robot sees observation\.images\.wrist, which obs=state does not show$"),
    ],
)
def test_a_later_stage_without_a_fitting_base_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in {"cut": '{"type": "fm', "bare": '{"type": "fm_ft"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    write_policy(tmp_path / "act", "act", "observation.state")
    write_policy(tmp_path / "state", "fm_ft", "observation.state", "observation.environment_state")
    write_policy(tmp_path / "image", "fm_ft", "observation.state", "observation.image")
    write_policy(tmp_path / "robot", "fm_ft", "observation.state", "observation.images.wrist")
    with pytest.raises(cli.UsageError, match=message):
        cli.expand([*SUGAR, "stage=finetune", *words, *NAMED])


def test_a_refusal_comes_before_lerobot_is_imported():
    program = (
        "import sys; from fm_policy import cli; print(cli.main(sys.argv[1:]), {'torch', 'lerobot'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, *SUGAR, "stage=finetune"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2 set()\n"


# Handing over


def test_a_program_sees_its_own_arguments_and_its_status_is_returned(monkeypatch):
    seen = []
    program = SimpleNamespace(load=lambda: lambda: seen.append(list(sys.argv)) or 3)
    monkeypatch.setattr(cli, "programs", lambda: {"lerobot-info": program})
    before = list(sys.argv)
    assert cli.main(["info", "--x=1"]) == 3
    assert seen == [["lerobot-info", "--x=1"]]
    assert sys.argv == before


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_give_way_to_other_work_unless_the_environment_says_otherwise(monkeypatch, said, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is taken back in the end, whatever the program sets
        monkeypatch.delenv(name)
    for name in said:
        monkeypatch.setenv(name, said[name])
    seen = []
    program = SimpleNamespace(load=lambda: lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")))
    monkeypatch.setattr(cli, "programs", lambda: {"lerobot-info": program})
    cli.main(["info"])
    assert seen == [expected]


@pytest.mark.parametrize(
    "words",
    [
        ["lerobot", *SUGAR, "--nonsense=1"],
        ["eval/rollout.py", "--policy", "nowhere"],
        ["eval/table.py", "--method", "FM=nowhere", "--out", "out"],
    ],
)
def test_threads_are_told_how_to_wait_before_torch_is_loaded(tmp_path, words):
    """Later it has no effect."""
    source = Path(__file__).resolve().parents[2]
    start = "from fm_policy import cli; cli.main()"
    if words[0] != "lerobot":
        start = f"import runpy; runpy.run_path({str(source / words[0])!r}, run_name='__main__')"
    script = f"""
import os, sys

class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print("torch is loaded at", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch)
sys.argv = {words!r}
{start}
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "FM_DATA")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "torch is loaded at 1000\n"


def test_steps_aside_for_a_lerobot_program_of_lerobot(monkeypatch):
    theirs = EntryPoint("lerobot", "lerobot.cli:main", "console_scripts")
    known = cli.programs() | {"lerobot": theirs}
    monkeypatch.setattr(cli, "programs", lambda: known)
    for words in ([], ["--help"], ["foo"], ["eval", "--x"], ["train", "policy=act"], ["train", "--steps=1"]):
        assert cli.expand(words) == ["lerobot", *words]
    assert cli.expand([*SUGAR, *NAMED])[0] == "lerobot-train"
