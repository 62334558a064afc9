"""Hold the error bounds (4) and (5) against flows that are known: `python eval/known_flows.py --fields 5000`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fm_policy.flow.error_bound import any_grid_bound, uniform_grid_bound, uniform_grid_bound_exponential
from fm_policy.flow.solvers import Velocity, euler_step

OMEGA = 3.0
STEPS = range(2, 33)
Time = float | Tensor


class LinearFields(NamedTuple):
    """Fields u(t, x) = a x + b sin(ωt), one per element, each with the start of one trajectory; L = |a|."""

    a: Tensor
    b: Tensor
    start: Tensor

    def velocity(self, t: Time, x: Tensor) -> Tensor:
        """The true field u."""
        return self.a * x + self.b * torch.sin(OMEGA * _double(t))

    def solution(self, t: Time) -> Tensor:
        """ψ_t by variation of constants; at t = 0 the start to the bit."""
        growth, angle = torch.exp(self.a * _double(t)), OMEGA * _double(t)
        forced = (OMEGA * (growth - torch.cos(angle)) - self.a * torch.sin(angle)) / (self.a**2 + OMEGA**2)
        return growth * self.start + self.b * forced

    def acceleration(self, t: Time) -> Tensor:
        """d²ψ_t / dt² = a dψ_t / dt + b ω cos(ωt)."""
        return self.a * self.velocity(t, self.solution(t)) + self.b * OMEGA * torch.cos(OMEGA * _double(t))

    def curvature(self, intervals: int = 512) -> Tensor:
        """M, never too small: the largest |ψ''| at the ends of intervals, plus half an interval times max |ψ'''|."""
        largest = torch.stack([self.acceleration(i / intervals).abs() for i in range(intervals + 1)]).amax(0)
        square = self.a**2 + OMEGA**2
        growing = self.a.abs() ** 3 * self.a.clamp_min(0).exp() * (self.start + self.b * OMEGA / square).abs()
        swinging = OMEGA**3 * self.b.abs() / square.sqrt()
        return largest + (growing + swinging) / (2 * intervals)


def _double(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def adversarial(fields: LinearFields, t: Time, x: Tensor) -> Tensor:
    """Away from the true trajectory; from a point on it, to the side to which Euler's rule leaves it."""
    gap = x - fields.solution(t)
    return torch.where(gap == 0, -fields.acceleration(t), gap).sign()


# v - u in units of δ: nowhere above 1.
PERTURBATIONS: dict[str, Callable[[LinearFields, Time, Tensor], Tensor]] = {
    "adversarial": adversarial,
    "sine": lambda _, t, x: torch.sin(5 * x + 9 * t),
    "constant": lambda _fields, _t, x: torch.ones_like(x),
}


def perturbed(fields: LinearFields, delta: Tensor, kind: str) -> Velocity:
    """A learned field v with |v - u| <= δ."""
    return lambda t, x: fields.velocity(t, x) + delta * PERTURBATIONS[kind](fields, t, x)


def draw_fields(count: int, seed: int) -> tuple[LinearFields, Tensor]:
    """Random fields with a, b and start in [-3, 3], and for each a δ in [1e-3, 1]."""
    u = torch.rand(4, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LinearFields(*(6 * u[:3] - 3)), 10 ** (-3 * u[3])


def uniform_grids() -> list[list[float]]:
    """Equal steps over [0, 1], a grid for each number in `STEPS`."""
    return [[1 / n] * n for n in STEPS]


def random_grids(seed: int, repeats: int = 3) -> list[list[float]]:
    """Steps over [0, 1] that differ by up to a factor of 1000, `repeats` grids for each number in `STEPS`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [10 ** (3 * torch.rand(n, generator=generator, dtype=torch.float64)) for n in STEPS for _ in range(repeats)]
    return [(size / size.sum()).tolist() for size in sizes]


def euler_errors(fields: LinearFields, delta: Tensor, kind: str, grids: list[list[float]]) -> Tensor:
    """|ψ - φ_N| at the end of each grid, `(grids, fields)`."""
    v, errors = perturbed(fields, delta, kind), []
    for steps in grids:
        t, x = 0.0, fields.start
        for h in steps:
            t, x = t + h, euler_step(v, t, h, x)
        errors.append((x - fields.solution(t)).abs())
    return torch.stack(errors)


def compare(fields: LinearFields, delta: Tensor, seed: int) -> dict[str, Tensor]:
    """Error / bound of every bound, `(perturbations, grids, fields)`."""
    sizes = fields.a.abs(), fields.curvature(), delta
    uniform, irregular = uniform_grids(), random_grids(seed)
    errors, random_errors = (
        torch.stack([euler_errors(fields, delta, kind, grids) for kind in PERTURBATIONS])
        for grids in (uniform, irregular)
    )
    return {
        "(4), random steps": random_errors / torch.stack([any_grid_bound(*sizes, steps) for steps in irregular]),
        "(4), equal steps": errors / torch.stack([any_grid_bound(*sizes, steps) for steps in uniform]),
        "(5) with (1 + L/N)^N": errors / torch.stack([uniform_grid_bound(*sizes, n) for n in STEPS]),
        "(5) with e^L": errors / torch.stack([uniform_grid_bound_exponential(*sizes, n) for n in STEPS]),
    }


def draw(path: Path) -> None:
    """Error and bounds against N for u = 1.5 x + 2 sin 3t from 1, δ = 0.1, log-log."""
    import matplotlib.pyplot as plt  # of the development environment; only the picture wants it

    fields, delta = LinearFields(*torch.tensor([[1.5], [2.0], [1.0]], dtype=torch.float64)), torch.tensor([0.1])
    numbers = [2**k for k in range(11)]
    grids = [[1 / n] * n for n in numbers]
    sizes = fields.a.abs(), fields.curvature(), delta
    figure, axis = plt.subplots(figsize=(7, 4.5))
    axis.loglog(numbers, torch.stack([any_grid_bound(*sizes, steps) for steps in grids]), "C3-", label="bound (4)")
    for bound, style, name in (
        (uniform_grid_bound_exponential, "C1-", "bound (5) with $e^L$"),
        (uniform_grid_bound, "C2-", "bound (5) with $(1 + L/N)^N$"),
    ):
        axis.loglog(numbers, torch.stack([bound(*sizes, n) for n in numbers]), style, label=name)
    for size, style, name in ((delta, "C0o-", "error, adversarial δ = 0.1"), (0 * delta, "C0o--", "error, δ = 0")):
        axis.loglog(numbers, euler_errors(fields, size, "adversarial", grids), style, label=name)
    floor = uniform_grid_bound_exponential(sizes[0], 0.0, delta, 1).item()
    axis.axhline(floor, color="0.5", linestyle=":", label=r"$\delta\,(e^L - 1) / L$, which no N removes")
    axis.set(xlabel="Euler steps N", ylabel="distance from the true flow at t = 1")
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--fields", type=int, default=5000, help="number of random fields")
    parser.add_argument("--seed", type=int, default=0, help="seed of fields and grids")
    parser.add_argument("--picture", type=Path, help="file for a picture of error and bounds against N")
    args = parser.parse_args()
    if args.fields < 1:
        parser.error(f"--fields must be at least 1, got {args.fields}")
    fields, delta = draw_fields(args.fields, args.seed)
    print(f"{args.fields} fields, {', '.join(PERTURBATIONS)} perturbation, {STEPS[0]} to {STEPS[-1]} Euler steps")
    print(f"{'bound':22}{'checks':>10}{'violated':>10}{'median error/bound':>20}{'largest':>9}")
    for name, ratio in compare(fields, delta, args.seed).items():
        print(f"{name:22}{ratio.numel():10}{(ratio > 1).sum():10}{ratio.median():20.3f}{ratio.max():9.4f}")
    print("u = 3 x from 0, v = u + 1:\n       N  error/(4)  error/(5) with e^L")
    rising = LinearFields(*torch.tensor([[3.0], [0.0], [0.0]], dtype=torch.float64))
    for n in (4, 16, 64, 1024):
        error = euler_errors(rising, torch.ones(1), "constant", [[1 / n] * n]).item()
        four, five = any_grid_bound(3.0, 0.0, 1.0, [1 / n] * n), uniform_grid_bound_exponential(3.0, 0.0, 1.0, n)
        print(f"{n:8}{error / four:11.3f}{error / five:20.3f}")
    if args.picture:
        draw(args.picture)


if __name__ == "__main__":
    main()
