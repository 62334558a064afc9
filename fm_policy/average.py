"""The average of a checkpoint's weights as a checkpoint of its own: `python -m fm_policy.average CHECKPOINT --out DIR`.

What a deployment needs, and what another training goes on from: its schedule and its average start anew there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m fm_policy.average",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the policy, as RUN/checkpoints/last/...")
    add("--out", type=Path, required=True, help="folder to write; absent or empty")
    add("--half", action="store_true", help="store the weights as float16; they are still computed with as float32")
    add("--device", default="cpu", help="where the written policy runs unless told otherwise")
    args = parser.parse_args(argv)
    try:
        export(args.checkpoint, args.out, args.device, args.half)
    except (OSError, ValueError) as error:
        raise SystemExit(f"average: {error}") from error
    print(f"{args.out}: {args.checkpoint} with its averaged weights alone")


def export(checkpoint: Path, folder: Path, device: str = "cpu", half: bool = False) -> None:
    """Write a checkpoint's policy with its averaged weights alone, and its processors, whole or not at all.

    Args:
        checkpoint: Folder of the policy, `fm_ft` or `dp_ema`.
        folder: Where to; absent or empty.
        device: Where the written policy runs unless told otherwise.
        half: Store the weights in half precision.

    Raises:
        ValueError: If `folder` is not free, `checkpoint` cannot be read, or a weight is too large for float16.
    """
    from fm_policy import model_card
    from fm_policy.configuration_fm_ft import FlowMatchingConfig
    from fm_policy.evaluation.checkpoint import load_any_checkpoint
    from fm_policy.files import check_free, new_folder

    check_free(folder)
    loaded = load_any_checkpoint(checkpoint, device)
    policy = loaded.policy.ema_only()
    policy.config.pretrained_path = None  # where its base lay on this machine
    weights = {name: halved(name, value) if half else value for name, value in policy.state_dict().items()}
    with new_folder(folder) as draft:
        policy.save_pretrained(draft, state_dict=weights)
        if isinstance(policy.config, FlowMatchingConfig):
            average = "these are the averaged weights" if loaded.policy.config.use_ema else "no"
            stored = average + ", stored as float16" * half
            model_card.write(policy.config, draft, model_card.about(checkpoint), stored)
        for processor in (loaded.preprocessor, loaded.postprocessor):
            processor.save_pretrained(draft)


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
