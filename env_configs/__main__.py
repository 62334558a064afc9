"""Command line: `python -m env_configs doctor [TASK ...]`."""

import argparse
import sys
from collections.abc import Sequence

from env_configs import doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m env_configs", description="The simulated tasks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("doctor", help="say what is installed, what is missing and how to mend it")
    check.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(doctor.EXTRAS)}; default: all")
    options = parser.parse_args(arguments)
    try:
        return doctor.main(options.tasks)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
