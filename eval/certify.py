"""Certify the residual head of a policy: `python eval/certify.py --policy FOLDER --out FOLDER2`.

Writes `certificate.json`, which `eval/verify_certificate.py` checks with numpy alone, and `certificate.png`: simulated
pairs under a common input, and the certified numbers that none of them may exceed. Ends with status 0 if contraction,
Euler step and input-to-state stability are all certified; with 1 if one is refused, after writing down why; with 2 if
a simulated pair or trajectory contradicts its certificate, which would be an error of this package.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fm_policy.residual.record import Answer, Record
    from fm_policy.residual.simulation import Simulated

QUESTIONS = ("contraction", "euler", "iss")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, required=True, help="folder of a checkpoint of stage residual")
    add("--out", type=Path, help="folder for certificate and picture; that of the policy if not given")
    add("--method", help="semidefinite, full, diagonal or identity; by the size of the head if not given")
    add("--pairs", type=int, default=10_000, help="simulated pairs of states")
    add("--seed", type=int, default=0, help="of the simulated pairs")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {args.pairs}")
    return args


def main() -> None:
    args = parse()
    # Imported late: help and wrong arguments need not wait for torch.
    from fm_policy.evaluation.checkpoint import load_checkpoint
    from fm_policy.residual.certificate import Search, certify
    from fm_policy.residual.control_synth import ControlSynth
    from fm_policy.residual.record import Refusal, to_json
    from fm_policy.residual.simulation import simulate

    try:
        policy = load_checkpoint(args.policy).policy
        head = policy.active_net.head
        if not isinstance(head, ControlSynth):
            raise ValueError(f"{args.policy} has no head that could be certified (head={policy.config.head!r})")
        weights = hashlib.sha256((args.policy / "model.safetensors").read_bytes()).hexdigest()
        step = policy.config.head_span / policy.config.head_steps
        start = time.perf_counter()
        record = certify(head.system(), step, weights, Search(args.method))
        seconds = time.perf_counter() - start
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"certify.py: {error}") from error
    out = args.out or args.policy
    out.mkdir(parents=True, exist_ok=True)
    (out / "certificate.json").write_text(to_json(record), encoding="utf-8")
    for name in QUESTIONS:
        print(f"{name:12s} {describe(getattr(record, name))}")
    print(f"found in {seconds:.1f} s; {out / 'certificate.json'}")
    simulated = simulate(head, step, record, args.pairs, args.seed)
    tell(simulated, record)
    try:
        draw(simulated, record, out / "certificate.png")
    except ModuleNotFoundError as error:  # what it has to say does not depend on a picture
        print(f"certify.py: no certificate.png: {error}", file=sys.stderr)
    if violations := simulated.violations(record):
        print("certify.py: VIOLATED: " + "; ".join(violations), file=sys.stderr)
        raise SystemExit(2)
    if refused := [name for name in QUESTIONS if isinstance(getattr(record, name), Refusal)]:
        raise SystemExit(f"certify.py: not certified: {', '.join(refused)}")


def describe(answer: "Answer") -> str:
    from fm_policy.residual.record import Refusal

    if isinstance(answer, Refusal):
        return f"{answer.reason}: {answer.condition} {'' if answer.amount is None else f'{answer.amount:.6g}'}"
    shown = {name: getattr(answer, name) for name in ("rate", "factor", "step", "phi") if hasattr(answer, name)}
    return "certified: " + ", ".join(f"{name} {value:.6g}" for name, value in shown.items()) + f" ({answer.method})"


def tell(simulated: "Simulated", record: "Record") -> None:
    """A table of the worst pair of each kind against the certified numbers."""
    print(f"{'simulated pairs':20s}{'number':>8s}{'largest factor':>16s}{'least rate':>14s}")
    for kind, factor in simulated.factor.items():
        print(f"{kind:20s}{factor.shape[1]:8d}{factor.max():16.9f}{simulated.rate[kind].min():14.9f}")
    certified = getattr(record.euler, "factor", None), getattr(record.contraction, "rate", None)
    cells = ["refused" if number is None else f"{number:.9f}" for number in certified]
    print(f"{'certified':28s}{cells[0]:>16s}{cells[1]:>14s}")
    if simulated.reach is not None:
        reach = simulated.reach
        print(f"{reach.shape[1]} trajectories under bounded inputs: |x|² reached {reach.max():.3f} of its bound")


def draw(simulated: "Simulated", record: "Record", file: Path) -> None:
    """Histograms of the pairs by kind, and lines where the certificates end them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    panels = (
        (left, simulated.factor, getattr(record.euler, "factor", None), "$|x - y|_P$ after an Euler step / before it"),
        (right, simulated.rate, getattr(record.contraction, "rate", None), "rate of approach in the flow, 1 / time"),
    )
    for axes, numbers, certified, label in panels:
        edges = np.histogram_bin_edges(np.concatenate([part.ravel() for part in numbers.values()]), bins=150)
        for kind, part in numbers.items():
            axes.hist(part.ravel(), bins=edges, histtype="step", label=f"{kind} pairs")
        if certified is not None:
            axes.axvline(certified, color="tab:red", label=f"certified: {certified:.5g}")
        axes.set(xlabel=label, yscale="log")
        axes.legend()
    left.set_ylabel("pairs and steps")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
