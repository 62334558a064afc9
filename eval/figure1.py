"""Figure 1 of arXiv 2510.02081 on two moons: `python eval/figure1.py --out docs/figure1.png`.

Four models carry the same noise to the same thin moons, in few Euler steps: flow matching (3); the reconstruction loss
(6) from scratch; the first, fine-tuned by (6) through the deployed steps; the first, frozen, with a contracting head
(7) behind it that learns by (6). Each is measured on its own grid and, as the differential equation that it also is,
on a fine one.

Nothing is observed here, so on independent pairs (6) has one minimiser, E[x1], a point between the moons: see
`--coupling independent`. The default is `nearest`: of k noises the one whose end lies nearest to the data, for the
model in training. From scratch this is IMLE (Li & Malik 2018). Where k is small, some of the average is left: with
`--k 8` the fine-tuned ends lie farther from the moons than the base's, with 16 nearer. `inverse` takes the noise that
the first model, finely solved, carries to the data: the pairs of a flow that is known already.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fm_policy.flow.coupling import COUPLINGS, independent, inverse, nearest
from fm_policy.flow.losses import cfm_loss, masked_mse
from fm_policy.flow.noise import sample_noise
from fm_policy.flow.path import interpolate
from fm_policy.flow.solvers import Velocity, euler_step
from fm_policy.repeatable import repeatable
from fm_policy.residual.certificate import contraction, euler
from fm_policy.residual.control_synth import ControlSynth

RADIUS, THICKNESS, CENTRES = 2.0, 0.06, ((-1.0, -0.5), (1.0, 0.5))
STEPS, FINE = 4, 64  # Euler steps that are deployed and trained through; those of the fine grid
SPAN, HEAD_STEPS, RATE = 0.25, 4, 0.02  # of the head, as in the recipes
BATCH, PAIRS = 256, 128  # of flow matching; of (6)
SCRATCH, SECOND = 0.3, 0.1  # steps of (6) from scratch, and behind flow matching, per step of flow matching
RATES = {"flow matching": 4e-3, "scratch": 1e-3, "fine-tuned": 5e-4, "head": 3e-3}  # decaying to 0 by a cosine
SAMPLES, DRAWN = 1000, 100  # measured; trajectories in the picture
CPU = torch.device("cpu")
NOTHING = torch.zeros(1, 1)  # the head's observation


def moons(count: int) -> Tensor:
    """Points of two interlocking half circles, `(count, 1, 2)`: chunks of one action."""
    lower = torch.randint(2, (count,))
    angle = math.pi * torch.rand(count)
    circle = torch.stack([angle.cos(), (1 - 2 * lower) * angle.sin()], dim=-1)
    points = torch.tensor(CENTRES)[lower] + RADIUS * circle + THICKNESS * torch.randn(count, 2)
    return points.unsqueeze(1)


def distance_to_moons(x: Tensor) -> Tensor:
    """From points `(B, 1, 2)` to the nearer half circle, `(B,)`."""
    distances = []
    for centre, up in zip(torch.tensor(CENTRES), (1, -1), strict=True):
        q = x.squeeze(1) - centre
        tips = torch.stack([(q - q.new_tensor([end, 0.0])).norm(dim=-1) for end in (-RADIUS, RADIUS)]).amin(0)
        distances.append(torch.where(up * q[:, 1] >= 0, (q.norm(dim=-1) - RADIUS).abs(), tips))
    return torch.minimum(*distances)


class Mlp(nn.Module):
    """v(t, x) of points `(B, 1, 2)`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (3, width, width, width)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        """See `Velocity`; t may be `(B,)` too."""
        time = torch.as_tensor(t, dtype=x.dtype).view(-1, 1, 1).expand(len(x), 1, 1)
        return self.layers(torch.cat([x, time], dim=-1))


@dataclass
class Model:
    """A flow from t = 0 to 1, and perhaps a head from 1 to 1 + T_r."""

    net: Mlp
    head: ControlSynth | None = None

    def moves(self, steps: int = STEPS) -> Iterator[tuple[Velocity, float, float]]:
        """Field, time and length of every Euler step, `steps` of them in the flow."""
        for n in range(steps):
            yield self.net, n / steps, 1 / steps
        if self.head is not None:
            field, h = self.head.bind(NOTHING), SPAN / HEAD_STEPS
            for n in range(HEAD_STEPS):
                yield field, 1 + n * h, h

    def solve(self, x: Tensor) -> Tensor:
        """From noise to the end, on the deployed grid, with gradients."""
        for v, t, h in self.moves():
            x = euler_step(v, t, h, x)
        return x

    @torch.no_grad()
    def trajectories(self, x0: Tensor, steps: int = STEPS) -> Tensor:
        """All states from noise to the end, `(moves + 1, B, 1, 2)`."""
        states = [x0]
        for v, t, h in self.moves(steps):
            states.append(euler_step(v, t, h, states[-1]))
        return torch.stack(states)


def fit(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], lr: float, steps: int, bar: tqdm) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.update()


def pair(coupling: str, k: int, x1: Tensor, model: Model, base: Mlp) -> Tensor:
    """Noise for the data x1, `(B, 1, 2)`."""
    if coupling == "nearest":
        return nearest(x1, k, model.solve)
    return inverse(x1, base) if coupling == "inverse" else independent(x1)


def train(coupling: str, k: int, steps: int, seed: int) -> dict[str, Model]:
    """The four models, by name; what each draws is a function of the seed."""
    scratch_steps, second_steps = (math.ceil(share * steps) for share in (SCRATCH, SECOND))
    bar = tqdm(total=steps + scratch_steps + 2 * second_steps, unit="step")

    def likelihood(model: Model) -> Callable[[], Tensor]:
        """Eq. (6) through the deployed steps."""

        def loss() -> Tensor:
            x1 = moons(PAIRS)
            return masked_mse(model.solve(pair(coupling, k, x1, model, base)), x1)

        return loss

    def matching() -> Tensor:
        """Eq. (3), on independent pairs."""
        x1 = moons(BATCH)
        return cfm_loss(base, independent(x1), x1)

    with bar:
        with repeatable((seed, 0), CPU):
            bar.set_description("flow matching")
            base = Mlp()
            fit(base.parameters(), matching, RATES["flow matching"], steps, bar)
        base.requires_grad_(False)
        with repeatable((seed, 1), CPU):
            bar.set_description("from scratch")
            scratch = Model(Mlp())
            fit(scratch.net.parameters(), likelihood(scratch), RATES["scratch"], scratch_steps, bar)
        with repeatable((seed, 2), CPU):
            bar.set_description("fine-tuning")
            tuned = Model(copy.deepcopy(base).requires_grad_())
            fit(tuned.net.parameters(), likelihood(tuned), RATES["fine-tuned"], second_steps, bar)
        with repeatable((seed, 3), CPU):
            bar.set_description("head")
            head = ControlSynth(action_dim=2, obs_dim=1, horizon=1, mode="constructed", rate=RATE)
            headed = Model(base, head)
            fit(head.parameters(), likelihood(headed), RATES["head"], second_steps, bar)
    names = ("flow matching", "MLE from scratch", "flow matching, then MLE", "flow matching + contracting head")
    return dict(zip(names, (Model(base), scratch, tuned, headed), strict=True))


def spectral_norms(v: Velocity, t: float, x: Tensor) -> Tensor:
    """Largest singular value of dv/dx at each point, `(B,)`: the local Lipschitz constant."""
    x = x.detach().requires_grad_()
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in v(t, x).unbind(-1)]
    return torch.linalg.matrix_norm(torch.cat(rows, dim=1), 2)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """sqrt(2 E|A - B| - E|A - A'| - E|B - B'|) of two samples; 0 for equal ones."""
    a, b = a.squeeze(1), b.squeeze(1)
    square = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    return square.clamp_min(0).sqrt().item()


def straightness(states: Tensor) -> float:
    """Mean over trajectories of distance over length: 1 where they are straight."""
    return ((states[-1] - states[0]).norm(dim=-1) / states.diff(dim=0).norm(dim=-1).sum(dim=0)).mean().item()


def measure(model: Model, x0: Tensor, data: Tensor, steps: int) -> dict[str, float]:
    """What the model does with the noise x0 on a grid of `steps` steps; data: another sample than it learned from."""
    states = model.trajectories(x0, steps)
    halfway = interpolate(torch.full((len(x0),), 0.5), x0.flip(0), data)  # flipped: independent of the states
    norms = torch.stack([spectral_norms(v, t, x) for (v, t, _), x in zip(model.moves(steps), states, strict=False)])
    return {
        "distance": distance_to_moons(states[-1]).mean().item(),
        "energy": energy_distance(states[-1], data),
        "halfway": energy_distance(states[steps // 2], halfway),
        "lipschitz": norms.max().item(),
        "straightness": straightness(states),
    }


@torch.no_grad()
def certificate(head: ControlSynth, states: Tensor) -> dict[str, float | None]:
    """What is proven of the head, None if it is not, and what pairs of states at t = 1, `(B, 1, 2)`, do in it.

    Returns:
        `rate` of its flow; `factor` of its Euler step; `worst_pair`, the largest growth of a distance in a step, in the
        norm of `factor`.
    """
    system, h = head.system(), SPAN / HEAD_STEPS
    flow, step = contraction(system), euler(system, h)
    root = torch.from_numpy(np.linalg.cholesky(getattr(step, "p", np.eye(head.n))))
    v, x, growth = copy.deepcopy(head).double().bind(NOTHING.double()), states.double(), []
    for n in range(HEAD_STEPS):
        y = euler_step(v, 1 + n * h, h, x)
        before, after = (((z - z.roll(1, 0)) @ root).norm(dim=-1) for z in (x, y))
        growth.append((after / before).max().item())
        x = y
    return {"rate": getattr(flow, "rate", None), "factor": getattr(step, "factor", None), "worst_pair": max(growth)}


def report(models: dict[str, Model], coupling: str, k: int, seed: int) -> dict[str, Any]:
    """All numbers; noise and data are not those of the training."""
    base, found = models["flow matching"].net, {}
    with repeatable((seed, 4), CPU):
        x0, data, others = sample_noise((SAMPLES, 1, 2)), moons(SAMPLES), moons(SAMPLES)
    for name, model in models.items():
        found[name] = {str(steps): measure(model, x0, data, steps) for steps in (STEPS, FINE)}
        with torch.no_grad(), repeatable((seed, 5), CPU):
            error = masked_mse(model.solve(pair(coupling, k, data, model, base)), data)
        found[name][str(STEPS)]["loss"] = error.item()
    floor = {"distance": distance_to_moons(others).mean().item(), "energy": energy_distance(others, data)}
    heads = {
        name: certificate(model.head, Model(model.net).trajectories(x0)[-1])
        for name, model in models.items()
        if model.head is not None
    }
    return {"data": floor, "models": found, "heads": heads}


def nfe(model: Model, steps: int = STEPS) -> str:
    """Network calls, the head's beside the flow's."""
    return f"{steps} + {HEAD_STEPS}" if model.head is not None else str(steps)


def as_table(models: dict[str, Model], numbers: dict[str, Any]) -> str:
    columns = ("distance", "energy", "halfway", "lipschitz", "straightness", "loss")
    lines = [f"{'':32s}{'NFE':>8s}" + "".join(f"{name:>14s}" for name in columns)]
    lines.append(f"{'the data themselves':40s}" + "".join(f"{value:14.3f}" for value in numbers["data"].values()))
    for name, model in models.items():
        for steps in (STEPS, FINE):
            row = numbers["models"][name][str(steps)]
            cells = "".join(f"{row[column]:14.3f}" for column in columns if column in row)
            lines.append(f"{name if steps == STEPS else '':32s}{nfe(model, steps):>8s}" + cells)
    return "\n".join([*lines, *(f"{name}: {head_text(head)}" for name, head in numbers["heads"].items())])


def head_text(head: dict[str, float | None]) -> str:
    rate, factor = ("not certified" if head[key] is None else f"{head[key]:.4f}" for key in ("rate", "factor"))
    return f"certified rate {rate}; certified factor of a step {factor}, worst pair {head['worst_pair']:.4f}"


def draw(models: dict[str, Model], numbers: dict[str, Any], seed: int, path: Path) -> None:
    """A panel for each model."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    with repeatable((seed, 6), CPU):
        x0, data = sample_noise((DRAWN, 1, 2)), moons(2 * SAMPLES).squeeze(1)
    figure = Figure(figsize=(12, 11), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for axis, (name, model) in zip(axes.flat, models.items(), strict=True):
        states = model.trajectories(x0).squeeze(2)
        axis.scatter(*data.T, s=4, color="0.8", zorder=1, label="data")
        moves = [np.stack(ends, axis=1) for ends in pairwise(states.numpy())]  # of each, (trajectories, 2 ends, 2)
        times = np.arange(1, STEPS + 1).repeat(DRAWN) / STEPS
        flow = LineCollection([*np.concatenate(moves[:STEPS])], array=times, linewidth=0.7, alpha=0.7, zorder=2)
        axis.add_collection(flow)
        for move in moves[STEPS:]:
            axis.add_collection(LineCollection([*move], color="tab:red", linewidth=1.5, zorder=3))
        axis.scatter(*x0.squeeze(1).T, s=3, color="tab:purple", zorder=3, label="noise, t = 0")
        axis.scatter(*states[-1].T, s=10, color="black", zorder=4, label="ends")
        if model.head is not None:
            axis.plot([], [], color="tab:red", label=f"head, t = 1 to {1 + SPAN:g}")
        axis.legend(loc="lower left", fontsize=8)
        axis.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
        axis.set_title(panel_title(name, model, numbers), fontsize=9)
    figure.colorbar(flow, ax=axes, label="time t at the end of an Euler step", shrink=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)


def panel_title(name: str, model: Model, numbers: dict[str, Any]) -> str:
    here, fine = (numbers["models"][name][str(steps)] for steps in (STEPS, FINE))
    lines = [
        f"{name}, NFE {nfe(model)}",
        f"ends {here['distance']:.3f} from the moons ({fine['distance']:.3f} with {FINE} steps)",
        f"energy distance to data {here['energy']:.3f}, halfway to the path's {here['halfway']:.3f}",
        f"largest Lipschitz constant {here['lipschitz']:.1f}, straightness {here['straightness']:.2f}, "
        f"loss (6) {here['loss']:.3f}",
    ]
    if model.head is not None:
        lines.append(head_text(numbers["heads"][name]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of everything that is drawn (0)")
    add("--steps", type=int, default=5000, help="of flow matching; the other trainings take their share (5000)")
    add("--coupling", choices=COUPLINGS, default="nearest", help="pairs of noise and data for (6) (nearest)")
    add("--k", type=int, default=16, help="noises per point for nearest (16)")
    add("--out", type=Path, default=Path("docs/figure1.png"), help="file for the picture (docs/figure1.png)")
    add("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for name in ("steps", "k"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(1)
    models = train(args.coupling, args.k, args.steps, args.seed)
    numbers = report(models, args.coupling, args.k, args.seed)
    print(as_table(models, numbers))
    draw(models, numbers, args.seed, args.out)
    if args.json:
        given = {name: getattr(args, name) for name in ("seed", "steps", "coupling", "k")}
        args.json.write_text(json.dumps(given | numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
