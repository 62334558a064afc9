"""Deploy a policy: `python -m fm_policy.deploy export --policy DIR --out DIR2`, `python DIR2/runner.py --describe`.

`export` writes a folder that runs alone, with numpy and onnxruntime. `fuzz` drives such a folder's runner through
random observations, bad ones among them, and ends with status 1 if an action leaves its limits.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = _parse(argv)
    try:
        args.program(args)
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"deploy: {error}") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fm_policy.deploy", description=__doc__, formatter_class=formatter)
    programs = parser.add_subparsers(required=True, metavar="PROGRAM")

    export = programs.add_parser("export", help="a checkpoint to a folder that runs alone")
    export.set_defaults(program=_export)
    export.add_argument("--policy", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    export.add_argument("--nfe", type=int, help="network calls per chunk; the checkpoint's if not given")
    export.add_argument("--solver", help="euler, midpoint, heun or rk4; the checkpoint's if not given")
    export.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="pt2: torch.export's")

    fuzz = programs.add_parser("fuzz", help="random observations through an exported folder")
    fuzz.set_defaults(program=_fuzz)
    fuzz.add_argument("folder", type=Path, metavar="DIR", help="an exported folder")
    fuzz.add_argument("--observations", type=int, default=100_000, help="how many")
    fuzz.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _export(args: argparse.Namespace) -> None:
    # Imported late: help and wrong arguments need not wait for torch.
    from lerobot.utils.import_utils import register_third_party_plugins

    from fm_policy.deploy.export import export

    register_third_party_plugins()
    checkpoint = export(args.policy, args.out, args.nfe, args.solver, args.format)
    config = checkpoint.policy.config
    print(f"{args.out}: NFE {config.nfe} + {config.head_nfe}\n{checkpoint.note}".strip())


def _fuzz(args: argparse.Namespace) -> None:
    from fm_policy.deploy.fuzz import fuzz

    logging.getLogger("fm_policy.deploy").setLevel(logging.CRITICAL)
    result = fuzz(args.folder, args.observations, args.seed)
    print(result)
    if result.violations:
        raise SystemExit("deploy: an action left its limits")


if __name__ == "__main__":
    main()
