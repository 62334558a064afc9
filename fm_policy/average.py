"""The averaged weights of a checkpoint as a checkpoint of its own: `python -m fm_policy.average CHECKPOINT --out DIR`.

What a deployment needs, and what another training goes on from: its schedule and its average start anew there. Of
several fine-tunings of one base that differ in their draws alone it is their mean (a model soup, Wortsman et al. 2022):
what they have in common stays, what each one's batches did to it shrinks.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fm_policy.evaluation.checkpoint import Checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m fm_policy.average",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    checkpoints = "folder of the policy, as RUN/checkpoints/last/...; of several fine-tunings of one base, their mean"
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
        checkpoints: Folders of the policy, `fm_ft` or `dp_ema`; of several fine-tunings of one base, the mean of their
            averages is written.
        folder: Where to; absent or empty.
        device: Where the written policy runs unless told otherwise.
        half: Store the weights in half precision.

    Raises:
        ValueError: If `folder` is not free, a checkpoint cannot be read, a weight is too large for float16, or as
            `check_alike`.
    """
    from fm_policy import model_card
    from fm_policy.configuration_fm_ft import FlowMatchingConfig
    from fm_policy.evaluation.checkpoint import load_any_checkpoint
    from fm_policy.files import check_free, new_folder

    check_free(folder)
    first, *others = loaded = [load_any_checkpoint(path, device) for path in checkpoints]
    for one, other in combinations(loaded, 2):
        check_alike(one, other)
    policy = first.policy.ema_only()
    policy.config.pretrained_path = None  # where its base lay on this machine
    weights = mean([policy.state_dict(), *(other.policy.ema_only().state_dict() for other in others)])
    if half:
        weights = {name: halved(name, value) for name, value in weights.items()}
    with new_folder(folder) as draft:
        policy.save_pretrained(draft, state_dict=weights)
        if isinstance(policy.config, FlowMatchingConfig):
            average = "these are the averaged weights" if first.policy.config.use_ema else "no"
            average += f", in the mean of {len(checkpoints)} trainings" * bool(others) + ", stored as float16" * half
            model_card.write(policy.config, draft, model_card.words_of(checkpoints[0]), average)
        for processor in (first.preprocessor, first.postprocessor):
            processor.save_pretrained(draft)


def check_alike(first: "Checkpoint", other: "Checkpoint") -> None:
    """Check that two checkpoints are fine-tunings of one base that differ in nothing but their weights.

    Of trainings from different weights the mean is no policy, though it has a policy's shape.

    Raises:
        ValueError: If they are one and the same, naming the settings and files in which they differ, or if they do not
            hold one base.
    """
    if first.fingerprint == other.fingerprint:
        raise ValueError(f"{first.path} and {other.path} are one checkpoint, which is its own mean")
    here, there = settings(first), settings(other)
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        raise ValueError(f"{other.path} is no second training of {first.path}: they differ in {', '.join(differing)}")
    base, its_base = base_of(first.path), base_of(other.path)
    if not base or base.keys() != its_base.keys() or not all(w.equal(its_base[name]) for name, w in base.items()):
        raise ValueError(
            f"{first.path} and {other.path} do not hold one base that both were fine-tuned from, as the checkpoints of "
            "such runs do: the mean of other trainings is no policy"
        )


def settings(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What a checkpoint is besides its weights: its configuration, but for where its base lay, and its processors."""
    config = {f"config.json's {name}": value for name, value in vars(checkpoint.policy.config).items()}
    del config["config.json's pretrained_path"]
    return config | {path.name: path.read_bytes() for path in checkpoint.path.glob("policy_*processor*")}


def base_of(folder: Path) -> dict[str, "Tensor"]:
    """The weights that a fine-tuning started from, which its run's checkpoints keep; of others nothing."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith("base_net.")}  # noqa: SIM118


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
