"""The averaged weights of a checkpoint as a checkpoint of its own: `python -m fm_policy.average CHECKPOINT --out DIR`.

What a deployment needs, and what another training goes on from: its schedule and its average start anew there. Of
several trainings that differ in their draws alone it is their mean (a model soup, Wortsman et al. 2022):
what they have in common stays, what each one's batches did to it shrinks.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Which base a training had is told by where it lay, which differs from one machine to the next.
NO_SETTING = "pretrained_path"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m fm_policy.average",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    checkpoints = "folder of the policy, as RUN/checkpoints/last/...; of several, their mean"
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=checkpoints)
    add("--out", type=Path, required=True, help="folder to write; absent or empty")
    add("--half", action="store_true", help="store the weights as float16; they are still computed with as float32")
    add("--device", default="cpu", help="where the written policy runs unless told otherwise")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoints, args.out, args.device, args.half)
    except (OSError, ValueError) as error:
        raise SystemExit(f"average: {error}") from error
    names = " + ".join(map(str, args.checkpoints))
    print(f"{args.out}: {names} with {'their' if len(args.checkpoints) > 1 else 'its'} averaged weights alone")


def export(checkpoints: Sequence[Path], folder: Path, device: str = "cpu", half: bool = False) -> None:
    """Write a checkpoint's policy with its averaged weights alone, and its processors, whole or not at all.

    Args:
        checkpoints: Folders of the policy, `fm_ft` or `dp_ema`; of several, the mean of their averages is written.
        folder: Where to; absent or empty.
        device: Where the written policy runs unless told otherwise.
        half: Store the weights in half precision.

    Raises:
        ValueError: If `folder` is not free, a checkpoint cannot be read, two of them differ in more than their weights,
            or a weight is too large for float16.
    """
    from fm_policy import model_card
    from fm_policy.configuration_fm_ft import FlowMatchingConfig
    from fm_policy.evaluation.checkpoint import load_any_checkpoint
    from fm_policy.files import check_free, new_folder

    check_free(folder)
    for other in checkpoints[1:]:
        check_alike(checkpoints[0], other)
    loaded = load_any_checkpoint(checkpoints[0], device)
    policy = loaded.policy.ema_only()
    policy.config.pretrained_path = None  # where its base lay on this machine
    others = [load_any_checkpoint(path, device).policy.ema_only().state_dict() for path in checkpoints[1:]]
    weights = mean([policy.state_dict(), *others])
    if half:
        weights = {name: halved(name, value) for name, value in weights.items()}
    with new_folder(folder) as draft:
        policy.save_pretrained(draft, state_dict=weights)
        if isinstance(policy.config, FlowMatchingConfig):
            average = "these are the averaged weights" if loaded.policy.config.use_ema else "no"
            average += f", in the mean of {len(checkpoints)} trainings" * bool(others) + ", stored as float16" * half
            model_card.write(policy.config, draft, model_card.about(checkpoints[0]), average)
        for processor in (loaded.preprocessor, loaded.postprocessor):
            processor.save_pretrained(draft)


def check_alike(first: Path, other: Path) -> None:
    """Check that two checkpoints differ in nothing but their weights.

    Raises:
        ValueError: If one of them is no checkpoint, or naming the settings and files in which they differ.
    """
    here, there = settings(first), settings(other)
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        raise ValueError(f"{other} is no second training of {first}: they differ in {', '.join(differing)}")


def settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint is, besides its weights: the fields of its config.json, and its processors' files."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"no checkpoint: {folder} has no config.json")
    fields = {
        f"config.json's {name}": value for name, value in json.loads(file.read_text()).items() if name != NO_SETTING
    }
    return fields | {path.name: path.read_bytes() for path in folder.glob("policy_*processor*") if path.is_file()}


def mean(weights: Sequence[Mapping[str, "Tensor"]]) -> dict[str, "Tensor"]:
    """The mean of every weight, name by name; of a number that counts, the first's."""
    import torch

    return {
        name: torch.stack([each[name] for each in weights]).mean(dim=0) if value.is_floating_point() else value
        for name, value in weights[0].items()
    }


def halved(name: str, value: "Tensor") -> "Tensor":
    """A weight in half precision; a number that counts is left as it is.

    Raises:
        ValueError: If the weight is too large for float16.
    """
    if not value.is_floating_point():
        return value
    half = value.half()
    if not half.isfinite().all():
        raise ValueError(f"the weight {name} has values up to {value.abs().max():g}, too large for float16")
    return half


if __name__ == "__main__":
    main()
