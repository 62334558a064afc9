"""Table 1 of arXiv 2510.02081 on images: `python eval/images.py --data digits --out outputs/images`.

Unconditional flow matching with independent pairs (I-CFM) and with mini-batch optimal transport (OT-CFM); each
fine-tuned by the reconstruction loss (6); heads behind them (ResFT); and, as controls, flow matching continued for the
compute of the fine-tuning. Quality is Fréchet's distance in the features of a small classifier that is trained on the
same images (`--features inception`: FID, where torchmetrics and its weights are installed), so numbers
of two data sets, or of the paper, do not compare.

Pairs of (6): nothing is observed, so on independent pairs its minimiser is the mean image, and nearly so on pairs of
optimal transport in a batch, since distances between noise and images hardly depend on the image. The default is
`inverse`, the noise that the frozen base, finely solved, carries to the image: nothing is averaged, and what there is
to learn is the error of few solver steps, for 32 calls of the net. `nearest`, of k noises the one whose image comes
nearest, works on moons in the plane, but among so many pixels 8 noises are too few to choose from.

Every model is a safetensors file and every cell of the table a JSON file in `--out`; the same command goes on where
it was stopped. With `--minutes` it stops by itself, with exit status 75, e.g. for an accelerator lent in slices:
`while python eval/images.py --data cifar10 --root DIR --device cuda --minutes 9; [ $? -eq 75 ]; do :; done`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from fm_policy.files import digest, read_tensors, write_json, write_tensors
from fm_policy.images.data import READERS, Images
from fm_policy.images.quality import (
    Classifier,
    Extractor,
    accuracy,
    frechet_distance,
    inception,
    moments,
    real_pictures,
    train_classifier,
)
from fm_policy.images.recipes import DEFAULT_ROWS, PLANS, Plan, Row, rows
from fm_policy.images.report import Cells, as_json, as_markdown, draw_curves, draw_same_noise
from fm_policy.images.sampling import GRIDS, Cell, Grid, Measure
from fm_policy.images.training import Trained, Trainer
from fm_policy.slices import Clock, TimeIsUpError, check_settings

CURVE_POINTS = 8
UNFINISHED = 75  # the exit status of sysexits.h for "try again later"


class Table:
    """Models and cells, made where they are not there yet."""

    def __init__(self, images: Images, plan: Plan, measure: Measure, folder: Path, clock: Clock) -> None:
        self.images, self.plan, self.measure, self.folder, self.clock = images, plan, measure, folder, clock
        self.rows: dict[str, Row] = rows(plan)
        self.grid = Grid(f"Euler {plan.tuned.solver_steps}", "euler", plan.tuned.solver_steps)  # which (6) goes through
        self._trained: dict[tuple[str, int], Trained] = {}

    def model(self, key: str, seed: int) -> Trained:
        """A row's model, after the one that it starts from."""
        if (key, seed) not in self._trained:
            title, recipe = self.rows[key]
            start = self.model(recipe.start, seed).model if recipe.start else None
            trainer = Trainer(self.images, self.plan.shape, recipe, seed, start, self.measure.device)
            self._trained[key, seed] = trainer.run(
                self.folder / "models" / f"{key}-{seed}.safetensors",
                self.clock,
                lambda model: self.measure.distance(model, self.grid, seed),
                CURVE_POINTS if start else 0,
                f"{title}, seed {seed}",
            )
        return self._trained[key, seed]

    def cell(self, key: str, seed: int, column: str) -> Cell:
        """A cell of one seed."""
        file = self.folder / "cells" / f"{key}-{seed}-{column}.json"
        trained = self.model(key, seed)
        return self.measure.cell(trained.model, GRIDS[column], seed, file, trained.settings, self.clock)


def classifier(images: Images, steps: int, file: Path, device: torch.device) -> tuple[Extractor, str, str]:
    """Features of a small classifier, the name of this very one, and what to say of them."""
    settings = {"image": images.shape, "data": images.fingerprint(), "steps": steps}
    if file.is_file():
        tensors, metadata = read_tensors(file)
        check_settings(file, metadata["settings"], settings)
        net = Classifier(images.shape[2], images.classes).to(device)
        net.load_state_dict(tensors)
    else:
        with tqdm(total=steps, desc="classifier", unit="step", mininterval=5) as bar:
            net = train_classifier(images, steps, device, bar.update)
        write_tensors(file, net.state_dict(), {"settings": settings})
    found = 100 * accuracy(net, images, images.held_out)
    name = f"classifier {digest(net.state_dict().values())}"
    return net.features, name, f"Features of a classifier of the same images, {found:.1f} % right on held-out ones"


def planned(args: argparse.Namespace) -> Plan:
    """The data set's plan with what the command changes in it."""
    plan = PLANS[args.data]
    base = {"steps": args.steps, "batch": args.batch}
    tuned = {
        "steps": args.tuning_steps,
        "batch": args.batch,
        "lr": args.tuning_lr,
        "solver_steps": args.solver_steps,
        "k": args.k,
    }
    return replace(
        plan,
        base=replace(plan.base, **{name: value for name, value in base.items() if value is not None}),
        tuned=replace(plan.tuned, **{name: value for name, value in tuned.items() if value is not None}),
        shape=replace(plan.shape, channels=tuple(args.channels)) if args.channels else plan.shape,
        samples=args.samples or plan.samples,
        classifier_steps=args.classifier_steps or plan.classifier_steps,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=READERS, default="digits", help="(digits)")
    add("--root", type=Path, help="folder of fashion's or cifar10's files")
    add("--out", type=Path, help="folder for models, cells, tables and pictures (outputs/images/DATA)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (0 1 2)")
    add("--rows", nargs="+", default=DEFAULT_ROWS, help="of the table, by key, e.g. ot-cfm-ft-independent")
    add("--columns", nargs="+", choices=GRIDS, default=[*GRIDS], help="of the table (all)")
    add("--features", choices=("classifier", "inception"), default="classifier", help="(classifier)")
    add("--device", default="cpu", help="(cpu)")
    add("--minutes", type=float, help="stop by then, with exit status 75 (never)")
    change = parser.add_argument_group("changes to the data set's plan, fm_policy/images/recipes.py").add_argument
    numbers = ("steps", "tuning-steps", "solver-steps", "k", "batch", "samples", "classifier-steps")
    for name in numbers:
        change(f"--{name}", type=int)
    change("--tuning-lr", type=float)
    change("--channels", type=int, nargs="+")
    args = parser.parse_args()
    for name in (*numbers, "tuning-lr", "minutes"):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not value > 0:
            parser.error(f"--{name} must be above 0, got {value}")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds must differ, got {args.seeds}")
    known = rows(PLANS[args.data])
    for key in args.rows:
        if key not in known:
            parser.error(f"--rows must be among {', '.join(known)}, got {key!r}")
    args.out = args.out or Path("outputs/images") / args.data
    return args


def main() -> None:
    args = parse()
    clock, device = Clock(args.minutes), torch.device(args.device)
    torch.set_num_threads(1)
    try:
        images, plan = READERS[args.data](args.root), planned(args)
        if args.features == "inception":
            extract, features, said = inception(device), "inception", "Features of Inception v3 as in FID"
        else:
            file = args.out / "models" / "classifier.safetensors"
            extract, features, said = classifier(images, plan.classifier_steps, file, device)
        splits = (images.train, images.held_out)
        train, held_out = (moments(extract, real_pictures(images, split, device)) for split in splits)
        floor = frechet_distance(train, held_out)
        print(f"{said}; held-out images lie {floor:.2f} from the training images", flush=True)
        measure = Measure(images, extract, (train, held_out), plan.samples, plan.batch, device, features)
        table = Table(images, plan, measure, args.out, clock)
        cells: Cells = {}
        for seed in args.seeds:
            for key in args.rows:
                for column in args.columns:
                    cells[key, seed, column] = table.cell(key, seed, column)
                    print(f"{key}, seed {seed}, {column}: {cells[key, seed, column].distance:.2f}", flush=True)
    except TimeIsUpError:
        print("The time is up: the same command goes on from here.", file=sys.stderr)
        sys.exit(UNFINISHED)
    except ValueError as error:
        sys.exit(f"error: {error}")
    about = {"data": args.data, "features": said, "floor": floor, "held_out": len(images.held_out.labels)}
    numbers = as_json(cells, table.rows, args.seeds, about)
    write_json(args.out / "table.json", numbers)
    text = as_markdown(numbers, args.columns)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(table, args, floor)


def draw(table: Table, args: argparse.Namespace, floor: float) -> None:
    """Figures 2a and E.2."""
    behind = [key for key in args.rows if table.rows[key].recipe.start]
    if behind:
        curves = {table.rows[key].title: [table.model(key, seed).curve for seed in args.seeds] for key in behind}
        draw_curves(curves, table.grid, floor, args.out / "curves.png")
    first = args.seeds[0]
    shown = [(table.rows[key].title, table.model(key, first).model, table.grid) for key in args.rows]
    if "euler100" in args.columns:
        shown.insert(0, (shown[0][0], shown[0][1], GRIDS["euler100"]))
    draw_same_noise(shown, table.images, first, args.out / "same_noise.png")


if __name__ == "__main__":
    main()
