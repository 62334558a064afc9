"""Certify the residual head of a policy: `python eval/certify.py --policy FOLDER --out FOLDER2`.

Writes `certificate.json`, which `eval/verify_certificate.py` checks with numpy alone, and `certificate.png`: pairs of
simulated trajectories under a common input, and the certified factor that none of them may exceed.
"""

import argparse
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fm_policy.residual.control_synth import ControlSynth
    from fm_policy.residual.record import Answer, Record

PAIRS, STEPS = 10_000, 12


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", type=Path, required=True, help="folder of a checkpoint of stage residual")
    add("--out", type=Path, help="folder for certificate and picture; that of the policy if not given")
    add("--method", help="semidefinite, full, diagonal or identity; by the size of the head if not given")
    add("--seed", type=int, default=0, help="of the simulated pairs")
    return parser.parse_args()


def main() -> None:
    args = parse()
    # Imported late: help and wrong arguments need not wait for torch.
    from fm_policy.evaluation.checkpoint import load_checkpoint
    from fm_policy.residual.certificate import Search, certify
    from fm_policy.residual.control_synth import ControlSynth
    from fm_policy.residual.record import to_json

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
    except ValueError as error:
        raise SystemExit(f"certify.py: {error}") from error
    out = args.out or args.policy
    out.mkdir(parents=True, exist_ok=True)
    (out / "certificate.json").write_text(to_json(record), encoding="utf-8")
    for name in ("contraction", "euler", "iss"):
        print(f"{name:12s} {describe(getattr(record, name))}")
    print(f"found in {seconds:.1f} s; {out / 'certificate.json'}")
    ratios = simulate(head, step, record, args.seed)
    certified = getattr(record.euler, "factor", None)
    print(f"{PAIRS} pairs, {STEPS} Euler steps: the worst grew by {ratios.max():.6f} in a step, certified: {certified}")
    draw(ratios, certified, out / "certificate.png")


def describe(answer: "Answer") -> str:
    from fm_policy.residual.record import Refusal

    if isinstance(answer, Refusal):
        return f"{answer.reason}: {answer.condition} is {answer.amount}"
    shown = {name: getattr(answer, name) for name in ("rate", "factor", "step", "phi") if hasattr(answer, name)}
    return "certified: " + ", ".join(f"{name} {value:.6g}" for name, value in shown.items()) + f" ({answer.method})"


def simulate(head: "ControlSynth", step: float, record: "Record", seed: int) -> np.ndarray:
    """Growth of the distance, in the certified norm, of pairs under common random inputs, `(STEPS, PAIRS)`."""
    import torch

    head = head.double()
    generator = torch.Generator().manual_seed(seed)
    n, p = head.n, np.asarray(getattr(record.euler, "p", np.eye(head.n)))
    root = torch.from_numpy(np.linalg.cholesky(p))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x - y).reshape(PAIRS, -1, n) @ root).norm(dim=-1)

    x, y = 3 * draw(PAIRS, *head.chunk_shape), 3 * draw(PAIRS, *head.chunk_shape)
    growth = []
    with torch.no_grad():
        for _ in range(STEPS):
            v = head.bind(draw(PAIRS, head.obs_dim))
            x_next, y_next = x + step * v(1.0, x), y + step * v(1.0, y)
            growth.append((distance(x_next, y_next) / distance(x, y)).max(dim=1).values.numpy())
            x, y = x_next, y_next
    return np.array(growth)


def draw(ratios: np.ndarray, certified: float | None, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.hist(ratios.ravel(), bins=200, color="tab:blue")
    if certified is not None:
        axes.axvline(certified, color="tab:red", label=f"certified factor {certified:.5f}")
        axes.legend()
    axes.set(xlabel="growth of the distance of a pair in one Euler step", ylabel="pairs and steps", yscale="log")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
