"""What can be certified of random heads: `python eval/certify_random.py --sizes 2 9 20 --seeds 3`.

A head follows one action of n numbers, or with n = horizon * action_dim a whole chunk (layout `chunk`). Its matrices
are drawn at random, far from the start of training: contracting by construction; free; or free and then optimised
until a penalty of training is zero, `row` (rows of A0, A_j and W_j) or `linear` (the paper's, rows of A0 alone). Asked
for are contraction, one Euler step and input-to-state stability; simulated pairs are held against the answers. Ends
with status 1 if one contradicts a certificate, or a head of `constructed` or `row` does not contract within --limit.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_policy.residual.control_synth import ControlSynth

KINDS = ("constructed", "row", "linear", "free")
EXPECTED = ("constructed", "row")
QUESTIONS = {"contraction": "rate", "euler": "factor", "iss": "phi"}
STEP, MARGIN, OPTIMISATION, OBS_DIM = 0.0625, 0.02, 2000, 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[2, 9, 20], help="n, numbers in the state")
    add("--kinds", nargs="+", default=KINDS, choices=KINDS)
    add("--seeds", type=int, default=3, help="heads of each kind and size, seeds 0, 1, ...")
    add("--method", help="semidefinite, full, diagonal or identity; by the size of the head if not given")
    add("--spread", type=float, default=1.0, help="size of the drawn matrices; 1: row sums near 1")
    add("--pairs", type=int, default=10_000, help="simulated pairs of states")
    add("--limit", type=float, default=60.0, help="seconds for the three questions to one head")
    add("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for name, value in {"seeds": args.seeds, "pairs": args.pairs, "sizes": min(args.sizes)}.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return args


def draw_head(kind: str, n: int, seed: int, spread: float) -> "ControlSynth":
    """A head of 64 tanh units and 64 leaky ReLUs with random matrices, biases and input nets, in double precision."""
    import torch

    from fm_policy.residual.control_synth import ControlSynth
    from fm_policy.residual.stability import PENALTIES

    torch.manual_seed(seed)
    head = ControlSynth(n, OBS_DIM, 1, mode="constructed" if kind == "constructed" else "free", rate=MARGIN).double()
    with torch.no_grad():
        for name, parameter in head.parts.named_parameters():
            if name.startswith("gains"):
                parameter.normal_()  # softplus: D_j of about 0.8 times n / K
            else:
                parameter.normal_(std=spread * n**-0.5)
        for parameter in head.drive[-1].parameters():
            parameter.normal_(std=0.1)
    if kind in PENALTIES:
        optimizer = torch.optim.Adam(head.parts.parameters(), lr=1e-2)
        for _ in range(OPTIMISATION):
            penalty = PENALTIES[kind](head.matrices(), MARGIN)
            if penalty.item() == 0:
                break
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
    return head


def examine(head: "ControlSynth", method: str | None, pairs: int) -> dict[str, Any]:
    """The answers for one head, the seconds that they took, and what simulated pairs say to them."""
    from fm_policy.residual.certificate import Search, certify
    from fm_policy.residual.record import Refusal
    from fm_policy.residual.simulation import simulate

    wall, own = time.perf_counter(), time.process_time()
    record = certify(head.system(), STEP, "", Search(method))
    row: dict[str, Any] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - own}
    for name, number in QUESTIONS.items():
        answer = getattr(record, name)
        if isinstance(answer, Refusal):
            said = {"answer": answer.reason, "condition": answer.condition, "amount": answer.amount}
        else:
            said = {"answer": "certified", number: getattr(answer, number)}
        row[name] = said | {"method": answer.method}
    simulated = simulate(head, STEP, record, pairs)
    row["worst_factor"] = max(float(part.max()) for part in simulated.factor.values())
    row["worst_rate"] = min(float(part.min()) for part in simulated.rate.values())
    row["reach"] = None if simulated.reach is None else float(simulated.reach.max())
    return row | {"violations": simulated.violations(record)}


def cell(rows: list[dict[str, Any]], name: str) -> str:
    """How many heads are certified, and by which worst number; else what the others are called."""
    number, answers = QUESTIONS[name], [row[name] for row in rows]
    numbers = [answer[number] for answer in answers if number in answer]
    if not numbers:
        return f"0/{len(rows)} " + "/".join(sorted({answer["answer"] for answer in answers}))
    return f"{len(numbers)}/{len(rows)} {(min if number == 'rate' else max)(numbers):.4g}"


def tell(n: int, kind: str, rows: list[dict[str, Any]]) -> None:
    """A line of the table."""
    seconds, cpu = ([row[key] for row in rows] for key in ("seconds", "cpu_seconds"))
    cells = "".join(f"{cell(rows, name):>25s}" for name in QUESTIONS)
    worst = max(row["worst_factor"] for row in rows)
    methods = "/".join(sorted({row[name]["method"] for row in rows for name in QUESTIONS}))
    times = f"{statistics.median(seconds):8.1f}{max(seconds):8.1f}{statistics.median(cpu):8.1f}"
    print(f"{n:4d} {kind:12s}{cells}{worst:10.5f}{times}  {methods}", flush=True)


def failures(rows: list[dict[str, Any]], limit: float) -> list[str]:
    """What should not be, in words."""
    found = []
    for row in rows:
        name = f"n={row['n']} {row['kind']} seed {row['seed']}"
        found += [f"{name}: VIOLATED, {violation}" for violation in row["violations"]]
        answer = row["contraction"]["answer"]
        if row["kind"] in EXPECTED and (answer != "certified" or row["seconds"] > limit):
            found.append(f"{name}: contraction {answer}, {row['seconds']:.0f} s")
    return found


def main() -> None:
    args = parse()
    from tqdm import tqdm

    print(f"{'':17s}{'certified heads, and their worst number':>75s}{'worst':>10s}{'wall seconds':>16s}{'CPU':>8s}")
    titles = "".join(f"{name + ', ' + number:>25s}" for name, number in QUESTIONS.items())
    print(f"{'n':>4s} {'matrices':12s}{titles}{'pair':>10s}{'median':>8s}{'max':>8s}{'median':>8s}  method")
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(args.sizes) * len(args.kinds) * args.seeds, unit="head", disable=None) as bar:
        for n in args.sizes:
            for kind in args.kinds:
                for seed in range(args.seeds):
                    examined = examine(draw_head(kind, n, seed, args.spread), args.method, args.pairs)
                    rows.append({"n": n, "kind": kind, "seed": seed} | examined)
                    bar.update()
                with tqdm.external_write_mode():
                    tell(n, kind, rows[-args.seeds :])
    if args.json:
        settings = {"spread": args.spread, "step": STEP, "pairs": args.pairs}
        args.json.write_text(json.dumps(settings | {"heads": rows}, indent=1) + "\n", encoding="utf-8")
    if found := failures(rows, args.limit):
        print("\n".join(found), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
