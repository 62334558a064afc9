"""The program `lerobot`: short words for LeRobot's own programs and this package's recipes.

    lerobot train policy=fm_ft env=pusht [obs=image] [net=transformer] [stage=pretrain] [any LeRobot flag]
    lerobot eval --policy.path=DIR --env.type=fm_pusht

The words of `train` choose a recipe and the data. The full `lerobot-train` command that they stand for is
printed before it runs. LeRobot's own flags (`--steps=1000`) come last in it, so that they win. Without words,
and for every other program, `lerobot X ...` is `lerobot-X ...`, unchanged.

Should LeRobot come to ship a `lerobot` program of its own, everything is handed over to that one, except
`train` with the word `policy=fm_ft`, to which nobody else can answer.
"""

# LeRobot takes seconds to import: what needs it is imported in functions, so that a refusal comes at once.

import difflib
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import EntryPoint, distribution, version
from itertools import pairwise
from pathlib import Path

from fm_policy import recipes

POLICIES = ("fm_ft",)
STAGES = ("pretrain",)
DEFAULTS = {"obs": "state", "net": recipes.DEFAULT_NET, "stage": "pretrain"}
WORDS = ("policy", "env", *DEFAULTS)

# Where the folder FM_DATA keeps the human demonstrations of each task.
HUMAN_DEMOS = {"pusht": "pusht/pusht_cchi_v7_replay.zarr.zip"}


class UsageError(ValueError):
    """The words on the command line do not say what to do; the message says what would."""


def main(argv: Sequence[str] | None = None) -> int | str | None:
    """Run the program that `argv` (default: the process's own arguments) stands for.

    Returns:
        The exit status: what the program returned, or 2 where the words were refused.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]) and "lerobot" not in programs():
        print(f"{__doc__}\nPrograms: {', '.join(_names(programs()))}")
        return 0
    try:
        command = expand(words)
    except UsageError as error:
        print(f"lerobot: {error}", file=sys.stderr)
        return 2
    return run(command)


def run(command: Sequence[str]) -> int | str | None:
    """Run one of LeRobot's programs in this process; `command` is its name and arguments."""
    before, sys.argv = sys.argv, list(command)
    try:
        return programs()[command[0]].load()()
    finally:
        sys.argv = before


def programs() -> dict[str, EntryPoint]:
    """Return LeRobot's console programs by name, as the installed LeRobot declares them."""
    scripts = distribution("lerobot").entry_points.select(group="console_scripts")
    return {script.name: script for script in scripts}


def expand(words: Sequence[str]) -> list[str]:
    """Return the command of LeRobot that `words` stand for, its program's name first.

    Raises:
        UsageError: A word is unknown, said twice or missing.
    """
    known = programs()
    if "lerobot" in known and not _only_ours(words):
        return ["lerobot", *words]
    if not words:
        raise UsageError(f"say which program to run: {', '.join(_names(known))}")
    program, *rest = words
    _check_known("program", program, _names(known))
    return _expand_train(rest) if program == "train" else [f"lerobot-{program}", *rest]


def _names(known: Collection[str]) -> list[str]:
    return sorted(name.removeprefix("lerobot-") for name in known)


def _only_ours(words: Sequence[str]) -> bool:
    return words[:1] == ["train"] and any(f"policy={policy}" in words for policy in POLICIES)


def _expand_train(words: Sequence[str]) -> list[str]:
    chosen, flags = _split(words)
    if not chosen:
        return ["lerobot-train", *flags]
    key, recipe = _choose_recipe(chosen)
    if _value_of(flags, "config_path") is not None:
        raise UsageError(f"--config_path and the words {_join(chosen)} both name a recipe: leave one of them away")
    if {"-h", "--help"} & set(flags):
        return ["lerobot-train", f"--config_path={recipe}", *flags]
    _check_simulator(key.env, flags)
    _hush_torchcodec()
    data = _choose_data(key, recipe, flags)
    command = ["lerobot-train", f"--config_path={recipe}", *data, *_closing_evaluation(flags), *flags]
    print(shlex.join(command), flush=True)
    return command


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate this program's `word=value` from LeRobot's flags and the values that follow them."""
    chosen: dict[str, str] = {}
    flags: list[str] = []
    value_follows = False
    for word in words:
        if value_follows or word.startswith("-"):
            flags.append(word)
            value_follows = word.startswith("--") and "=" not in word and word != "--help"
            continue
        key, _, value = word.partition("=")
        if key in chosen:
            raise UsageError(f"the word {key!r} is said twice: {key}={chosen[key]} and {word}")
        _check_known("word", key, WORDS, note="LeRobot's own flags start with two dashes")
        chosen[key] = value
    return chosen, flags


def _choose_recipe(chosen: dict[str, str]) -> tuple[recipes.RecipeKey, Path]:
    for word in ("policy", "env"):
        if word not in chosen:
            raise UsageError(f"{_join(chosen)} lacks the word {word}=..., as in: policy=fm_ft env=pusht")
    wanted = DEFAULTS | chosen
    known = recipes.available()
    elsewhere = "train another policy by LeRobot's --policy.type=... alone"
    _check_known("policy", wanted["policy"], POLICIES, note=elsewhere)
    _check_known("stage", wanted["stage"], STAGES)
    for word in recipes.RecipeKey._fields:
        _check_known(word, wanted[word], sorted({getattr(key, word) for key in known}))
    key = recipes.RecipeKey(*(wanted[word] for word in recipes.RecipeKey._fields))
    if key not in known:
        choices = "; ".join(_join(other._asdict()) for other in known)
        raise UsageError(f"there is no recipe for {_join(key._asdict())} (known: {choices})")
    return key, known[key]


def _check_simulator(env: str, flags: Sequence[str]) -> None:
    """Refuse now what would otherwise fail after the last step of training, in the closing evaluation."""
    from env_configs.doctor import EXTRAS, missing
    from env_configs.extras import install_command

    extra = EXTRAS[env]
    lacking = ", ".join(missing(extra))
    if lacking and _value_of(flags, "env_eval_freq") != "0":
        raise UsageError(
            f"the closing evaluation needs the simulator, but {lacking}: {install_command(extra)}; "
            "or train without it: --env_eval_freq=0"
        )


def _hush_torchcodec() -> None:
    # The recipes decode with PyAV; LeRobot still tells, twice over a page, when torchcodec finds no FFmpeg.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)


def _closing_evaluation(flags: Sequence[str]) -> list[str]:
    """Keep the recipe's one evaluation at the end where the flags change the number of steps."""
    steps = _value_of(flags, "steps")
    if steps is None or _value_of(flags, "env_eval_freq") is not None:
        return []
    return [f"--env_eval_freq={steps}"]


def _choose_data(key: recipes.RecipeKey, recipe: Path, flags: Sequence[str]) -> list[str]:
    """Return flags that name the demonstrations, none where `flags` do; say which ones are taken and why."""
    for flag in ("dataset.repo_id", "dataset.root"):
        named = _value_of(flags, flag)
        if named is not None:
            print(f"Data: {named}, as --{flag} says.", flush=True)
            return []
    root, why = _human_demos(key) or _shipped_demos()
    print(f"Data: {root}, {why}.", flush=True)
    _check_features(root, recipe)
    return [f"--dataset.repo_id=local/{root.name}", f"--dataset.root={root}"]


def _human_demos(key: recipes.RecipeKey) -> tuple[Path, str] | None:
    source = _human_source(key.env)
    if source is None or not source.is_file():
        return None
    return _convert_once(source, key), f"the human demonstrations of {source}, which FM_DATA leads to"


def _human_source(env: str) -> Path | None:
    folder = os.environ.get("FM_DATA")
    return Path(folder).absolute() / HUMAN_DEMOS[env] if folder and env in HUMAN_DEMOS else None


def _shipped_demos() -> tuple[Path, str]:
    from fm_policy.assets import default_demos

    folder = os.environ.get("FM_DATA")
    reason = f"FM_DATA={folder} holds none of this task" if folder else "FM_DATA is not set"
    return default_demos(), f"the demonstrations shipped with fm_policy; for human ones, {reason}"


def _convert_once(source: Path, key: recipes.RecipeKey) -> Path:
    """Return the LeRobotDataset made from `source`, converted unless this very file was converted before.

    The folder's name carries the fingerprint of the file and of this package's version, and the converter
    writes it whole or not at all, so that a folder that exists is the right one. Of several runs that start
    together one converts and the others wait.
    """
    from filelock import FileLock
    from lerobot.utils.constants import HF_LEROBOT_HOME

    root = HF_LEROBOT_HOME / "fm_ft" / f"{key.env}_{key.obs}_{_fingerprint(source)}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f"{root.name}.lock")):
        if not root.exists():
            _convert(source, root, key)
    return root


def _convert(source: Path, root: Path, key: recipes.RecipeKey) -> None:
    from env_configs.demos.__main__ import main as convert

    arguments = [key.env, f"--source={source}", f"--root={root}", f"--obs={key.obs}"]
    print(shlex.join(["python", "-m", "env_configs.demos", *arguments]), flush=True)
    if convert(arguments) != 0:
        raise UsageError(f"{source} could not be converted; name another data set by --dataset.root=...")


def _fingerprint(source: Path) -> str:
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(version("lerobot_policy_fm_ft").encode())
    return digest.hexdigest()[:12]


def _check_features(root: Path, recipe: Path) -> None:
    wanted = json.loads(recipe.read_text())["policy"]["input_features"]
    held = json.loads((root / "meta" / "info.json").read_text())["features"]
    missing = sorted(set(wanted) - set(held))
    if missing:
        raise UsageError(
            f"{root} lacks {', '.join(missing)}, from which {recipe.stem} learns: "
            "set FM_DATA to the folder of the human demonstrations, or name others by --dataset.repo_id=..."
        )


def _check_known(kind: str, given: str, known: Collection[str], note: str = "") -> None:
    if given in known:
        return
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.7)
    meant = f", did you mean {close[0]!r}?" if close else ""
    remark = f"; {note}" if note else ""
    raise UsageError(f"unknown {kind} {given!r}{meant} (known: {', '.join(known)}{remark})")


def _value_of(flags: Sequence[str], name: str) -> str | None:
    """Return what `--name=value` or `--name value` gives, the last of several; None where it is absent."""
    found = None
    for flag, following in pairwise([*flags, ""]):
        key, equals, value = flag.partition("=")
        if key == f"--{name}":
            found = value if equals else following
    return found


def _join(words: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in words.items())


if __name__ == "__main__":
    sys.exit(main())
