"""The program `lerobot`: short words for LeRobot's own programs and this package's recipes.

    lerobot train policy=fm_ft env=pusht [obs=image] [net=transformer] [any LeRobot flag]
    lerobot train policy=fm_ft env=pusht [obs=image] stage=finetune --policy.path=DIR [any LeRobot flag]
    lerobot train policy=dp_ema env=pusht [any LeRobot flag]      # the baseline: LeRobot's diffusion policy
    lerobot train policy=fm_ft env=kitchen|lift|handover|transport [stage=finetune|residual ...] [any LeRobot flag]
    lerobot eval --policy.path=DIR --env.type=fm_pusht

The words of `train` choose a recipe and the data. The full `lerobot-train` command that they stand for is
printed before it runs. LeRobot's own flags (`--steps=1000`) come last in it, so that they win. Without words,
and for every other program, `lerobot X ...` is `lerobot-X ...`, unchanged.

Should LeRobot come to ship a `lerobot` program of its own, everything is handed over to that one, except
`train` with a `policy=` of this package, to which nobody else can answer.
"""

# LeRobot takes seconds to import: what needs it is imported in functions, so that a refusal comes at once.

import difflib
import json
import logging
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

from fm_policy import recipes
from fm_policy.cli_base import base_features
from fm_policy.cli_data import choose_data
from fm_policy.cli_usage import UsageError, value_of
from fm_policy.threads import give_way

DEFAULTS = {"obs": "state", "stage": recipes.FIRST_STAGE}
WORDS = ("policy", "env", "obs", "net", "stage")


def main(argv: Sequence[str] | None = None) -> int | str | None:
    """Run the program that `argv` (default: the process's own arguments) stands for.

    Returns:
        The exit status: what the program returned, or 2 where the words were refused.
    """
    give_way()  # first of all: to find out what the words stand for may load torch
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
    return words[:1] == ["train"] and any(f"policy={policy}" in words for policy in recipes.NETS)


def _expand_train(words: Sequence[str]) -> list[str]:
    chosen, flags = _split(words)
    if not chosen:
        return ["lerobot-train", *flags]
    key, recipe = _choose_recipe(chosen)
    if value_of(flags, "config_path") is not None:
        raise UsageError(f"--config_path and the words {_join(chosen)} both name a recipe: leave one of them away")
    if {"-h", "--help"} & set(flags):
        return ["lerobot-train", f"--config_path={recipe}", *flags]
    features = _features(key, recipe, flags)
    every = _evaluates_every(recipe, flags)
    if every != "0":
        _check_simulator(key.env)
    _hush_torchcodec()
    data = choose_data(key, features, flags)
    command = ["lerobot-train", f"--config_path={recipe}", *data, *_closing_evaluation(every, flags), *flags]
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
    elsewhere = "train another policy by LeRobot's --policy.type=... alone"
    _check_known("policy", chosen["policy"], recipes.NETS, note=elsewhere)
    wanted = DEFAULTS | {"net": recipes.NETS[chosen["policy"]]} | chosen
    known = recipes.available(chosen["policy"])
    _check_known("stage", wanted["stage"], sorted({key.stage for key in known}))
    later = wanted["stage"] != recipes.FIRST_STAGE
    if later and "net" in chosen:
        raise UsageError(f"stage={wanted['stage']} keeps the net of its base: leave net={wanted['net']} away")
    for word in ("env", "obs", "net"):
        _check_known(word, wanted[word], sorted({getattr(key, word) for key in known} - {None}))
    key = recipes.RecipeKey(wanted["env"], wanted["obs"], None if later else wanted["net"], wanted["stage"])
    if key not in known:
        choices = "; ".join(_join(other._asdict()) for other in known)
        raise UsageError(f"there is no recipe for {_join(key._asdict())} (known: {choices})")
    return key, known[key]


def _features(key: recipes.RecipeKey, recipe: Path, flags: Sequence[str]) -> Collection[str] | None:
    """Return what the policy learns from, by the recipe or, in a later stage, its base; None if that is not known."""
    if key.stage != recipes.FIRST_STAGE:
        return base_features(key, flags)
    return json.loads(recipe.read_text())["policy"]["input_features"].keys()


def _evaluates_every(recipe: Path, flags: Sequence[str]) -> str:
    """After how many steps LeRobot evaluates, and films, the policy; "0": never, as for the tasks of MuJoCo."""
    return value_of(flags, "env_eval_freq") or str(json.loads(recipe.read_text())["env_eval_freq"])


def _check_simulator(env: str) -> None:
    """Refuse now what would otherwise fail after the last step of training, in the closing evaluation."""
    from env_configs.doctor import EXTRAS, missing
    from env_configs.extras import install_command

    extra = EXTRAS[env]
    lacking = ", ".join(missing(extra))
    if lacking:
        raise UsageError(
            f"the closing evaluation needs the simulator, but {lacking}: {install_command(extra)}; "
            "or train without it: --env_eval_freq=0"
        )


def _hush_torchcodec() -> None:
    # The recipes decode with PyAV; LeRobot still tells, twice over a page, when torchcodec finds no FFmpeg.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)


def _closing_evaluation(every: str, flags: Sequence[str]) -> list[str]:
    """Keep the recipe's one evaluation at the end where the flags change the number of steps."""
    steps = value_of(flags, "steps")
    if steps is None or every == "0" or value_of(flags, "env_eval_freq") is not None:
        return []
    return [f"--env_eval_freq={steps}"]


def _check_known(kind: str, given: str, known: Collection[str], note: str = "") -> None:
    if given in known:
        return
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.7)
    meant = f", did you mean {close[0]!r}?" if close else ""
    remark = f"; {note}" if note else ""
    raise UsageError(f"unknown {kind} {given!r}{meant} (known: {', '.join(known)}{remark})")


def _join(words: Mapping[str, str | None]) -> str:
    return " ".join(f"{key}={value}" for key, value in words.items() if value is not None)


if __name__ == "__main__":
    sys.exit(main())
