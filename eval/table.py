"""Fill a table of methods and tasks, running what is missing, and report on it: `python eval/table.py --table FILE`."""

import argparse
import json
from pathlib import Path
from typing import Any

from fm_policy.threads import give_way


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--table", type=Path, metavar="FILE", help="JSON, see fm_policy/evaluation/comparison/layout.py; or by hand:")
    add("--method", action="append", default=[], metavar="NAME=DIR[@NFE[/SOLVER]]", help="a checkpoint; repeatable")
    by_hand = [
        add("--env", nargs="+", help="tasks; pusht_b if not given"),
        add("--episodes", type=int, help="number of seeds, each one a start; 500 if not given"),
        add("--repeats", type=int, help="episodes of each seed, with different noise; 1 if not given"),
        add("--seed", type=int, help="first seed; 1000 if not given"),
        add("--base", help="the method that the others are compared with; the first one if not given"),
    ]
    add("--out", type=Path, default=Path("outputs/table"), help="folder; what it holds of this table is not run again")
    add("--processes", type=int, default=1, help="of this machine that share the episodes; no number depends on it")
    add("--device", default="cpu", help="where the policies run")
    args = parser.parse_args()
    if (args.table is None) == (not args.method):
        parser.error("name either a --table or the methods, --method NAME=DIR ...")
    told = [option.option_strings[0] for option in by_hand if getattr(args, option.dest) is not None]
    if args.table and told:
        parser.error(f"{args.table} says the tasks and the base: leave {', '.join(told)} away")
    return args


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The table as `comparison.layout` wants it."""
    if args.table:
        return json.loads(args.table.read_text(encoding="utf-8"))
    given = {name: value for name in ("episodes", "repeats", "seed") if (value := getattr(args, name)) is not None}
    base = {} if args.base is None else {"base": args.base}
    tasks = [{"env": env} | given for env in args.env or ["pusht_b"]]
    return base | {"methods": [method(word) for word in args.method], "tasks": tasks}


def method(word: str) -> dict[str, Any]:
    """What `NAME=DIR[@NFE[/SOLVER]]` says."""
    name, _, rest = word.partition("=")
    policy, _, how = rest.partition("@")
    nfe, _, solver = how.partition("/")
    if not (name and policy) or (how and not nfe.isdigit()):
        raise ValueError(f"a method is NAME=DIR[@NFE[/SOLVER]], as in FM=outputs/tuned@16, not {word!r}")
    chosen = {"nfe": int(nfe)} if nfe else {}
    return {"name": name, "policy": policy} | chosen | ({"solver": solver} if solver else {})


def make(args: argparse.Namespace) -> None:
    """Make the table as one process, or as one of several that share the episodes."""
    from lerobot.envs.configs import EnvConfig

    from env_configs import make_env_config
    from env_configs.extras import SIMULATORS
    from fm_policy.evaluation.comparison import pictures, writers
    from fm_policy.evaluation.comparison.cells import fill
    from fm_policy.evaluation.comparison.layout import Column, read_layout
    from fm_policy.evaluation.ranks import join

    def make_task(column: Column, sees_images: bool) -> tuple[EnvConfig, tuple[str, ...]]:
        seen = {"obs": "image"} if sees_images else {}
        task = make_env_config(column.env, **seen | dict(column.options))
        return task, SIMULATORS[task.type]

    layout = read_layout(describe(args))
    rank = join()
    cells = list(fill(layout, args.out / "cells", make_task, args.device, rank))
    if not rank.first:
        return
    columns = {column.name: [cell for cell in cells if cell.column is column] for column in layout.columns}
    bases = {cell.column.name: cell for cell in cells if cell.row is layout.base}
    table = writers.records(layout, [cell for own in columns.values() for cell in own])
    text = writers.as_markdown(table, layout.base.name)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    (args.out / "table.csv").write_text(writers.as_csv(table), encoding="utf-8")
    print(f"{text}\n{args.out}: table.md, table.csv", flush=True)
    # Last: pictures need matplotlib, and the numbers are there without it.
    drawn = {name: pictures.draw(own, bases.get(name)) for name, own in columns.items() if own}
    (args.out / "table.html").write_text(writers.as_html(table, layout.base.name, drawn), encoding="utf-8")
    print(f"{args.out}: table.html")


def main() -> None:
    args = parse()
    give_way()
    # Imported late, here and above: help and wrong arguments need not wait for torch.
    from fm_policy.evaluation.ranks import companions

    try:
        with companions(args.processes):
            make(args)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"table.py: {error}") from error


if __name__ == "__main__":
    main()
