"""Push-T from pixels on a rented accelerator that has torch, but no LeRobot: train there, bring the weights home.

    python eval/accelerator.py pack --root data/pusht_image --out pusht.safetensors             # at home
    PYTHONPATH=. python eval/accelerator.py train --data pusht.safetensors --out RUNS --method fm
    PYTHONPATH=. python eval/accelerator.py train --data pusht.safetensors --out RUNS --method ft --solver-steps 2
    PYTHONPATH=. python eval/accelerator.py home --run RUNS/ft_reflow_2 --out SHARDS
    python eval/accelerator.py assemble --shards SHARDS --out CHECKPOINT                        # at home again
    python eval/rollout.py --policy CHECKPOINT --option obs=image --episodes 500

`train` stops after `--minutes` with exit status 75; the same command goes on, to the same weights. Methods: `fm`, eq.
(3); `ft`, eq. (6), from the average of `fm`; `fm_continued`, its control of equal cost; `ddpm`. Encoder and U-Net are
the recipe's for all of them. `eval/accelerator.sh` runs everything, the most valuable first. `speed` measures.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from fm_policy.accelerator import data, shards, speed
from fm_policy.accelerator.net import parameter_count
from fm_policy.accelerator.plan import METHODS, TUNING_OF, control, first_stage, read_recipe, second_stage
from fm_policy.accelerator.training import Trainer, finished, flops, prepare
from fm_policy.files import write_json
from fm_policy.recipes import RecipeKey
from fm_policy.slices import Clock, TimeIsUpError

UNFINISHED = 75  # the exit status of sysexits.h for "try again later"
RECIPE = RecipeKey("pusht", "image")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="a LeRobotDataset with pixels to one file").add_argument
    pack("--root", type=Path, required=True, help="made by `python -m env_configs.demos pusht --obs image`")
    pack("--out", type=Path, required=True, help="the file, .safetensors")
    train = commands.add_parser("train", help="one net").add_argument
    train("--data", type=Path, required=True, help="file of `pack`")
    train("--out", type=Path, required=True, help="folder of all trainings; each gets one of its own in it")
    train("--method", choices=METHODS, required=True)
    train("--minutes", type=float, help="stop by then, with exit status 75 (never)")
    train("--coupling", choices=TUNING_OF, default="reflow", help="of ft, and of the ft that is controlled (reflow)")
    train("--solver-steps", type=int, help="likewise (the recipe's)")
    train("--tuning", type=Path, help="recipe of the second stage (one of the package's, by the coupling)")
    train("--steps", type=int, help="of the optimiser (the recipe's); with fm_continued, those of the ft it controls")
    train("--batch-size", type=int, help="windows per step (the recipe's)")
    train("--seed", type=int, help="(the recipe's)")
    train("--bf16", action="store_true", help="the nets compute in bfloat16")
    train("--compile", action="store_true", help="the nets are compiled")
    measure = commands.add_parser("speed", help="of training and inference").add_argument
    measure("--data", type=Path, help="file of `pack`; random pictures if not given")
    measure("--batch-size", type=int, default=64, help="windows per step (64)")
    measure("--rounds", type=int, default=30, help="training steps that are timed (30)")
    measure("--calls", type=int, default=200, help="chunks that are timed (200)")
    measure("--nfe", type=int, nargs="+", default=[1, 2, 4, 16], help="network calls of a chunk (1 2 4 16)")
    measure("--eager", action="store_true", help="leave out what must be compiled")
    measure("--json", type=Path, help="file for the numbers")
    for add in (train, measure):
        add("--recipe", type=Path, help="of the first stage (pusht_image.json)")
        add("--device", default="cuda", help="(cuda)")
    home = commands.add_parser("home", help="averaged weights to small files").add_argument
    home("--run", type=Path, required=True, help="folder of one training")
    home("--out", type=Path, required=True, help="folder for the files, absent or empty")
    join = commands.add_parser("assemble", help="a checkpoint of such files").add_argument
    join("--shards", type=Path, required=True, help="folder of `home`")
    join("--out", type=Path, required=True, help="the checkpoint, absent or empty")
    args = parser.parse_args()
    for name in ("minutes", "steps", "batch_size", "solver_steps", "rounds", "calls", "nfe"):
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number > 0:
                parser.error(f"--{name.replace('_', '-')} must be above 0, got {number}")
    return args


def train(args: argparse.Namespace) -> None:
    clock, device = Clock(args.minutes), prepare(args.device)
    recipe = read_recipe(args.recipe, RECIPE)
    changes = {"steps": args.steps, "batch": args.batch_size, "seed": args.seed}
    changes |= {"bf16": args.bf16, "compile": args.compile}
    demos, base = data.load(args.data), None
    if args.method in ("fm", "ddpm"):
        plan = first_stage(args.method, recipe, **changes)
        windows = data.Windows(demos, plan.policy, plan.held_out, device)
    else:
        tuning = read_recipe(args.tuning, TUNING_OF[args.coupling])
        plan = second_stage(recipe, tuning, args.coupling, args.solver_steps, **changes)
        base = finished(args.out / "fm", first_stage("fm", recipe, seed=args.seed)).to(device)
        windows = data.Windows(demos, plan.policy, plan.held_out, device)
        if args.method == "fm_continued":
            plan = control(plan, recipe, flops(plan, windows, base) / flops(first_stage("fm", recipe), windows))
    trainer = Trainer(plan, windows, args.out / plan.name, base, device)
    print(f"{args.out / plan.name}: {parameter_count(trainer.net)} parameters, {plan.steps} steps", flush=True)
    trainer.run(clock)


def measure(args: argparse.Namespace) -> None:
    device = prepare(args.device)
    plan = first_stage("fm", read_recipe(args.recipe, RECIPE), batch=args.batch_size)
    demos = data.load(args.data) if args.data else data.at_random(plan.policy)
    windows = data.Windows(demos, plan.policy, plan.held_out, device)
    told = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "batch": args.batch_size,
        "training": speed.training(plan, windows, args.rounds, device, args.eager),
        "inference": speed.inference(plan, windows, args.nfe, args.calls, args.eager),
    }
    print(f"{told['device']}, torch {told['torch']}, batch {told['batch']}\n{speed.as_text(told)}")
    if args.json:
        write_json(args.json, told)


def main() -> None:
    args = parse()
    try:
        match args.command:
            case "pack":
                # Nothing here needs torchcodec; LeRobot tells over a page when that finds no FFmpeg.
                logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
                data.pack(args.root).save(args.out)
            case "train":
                train(args)
            case "speed":
                measure(args)
            case "home":
                step, steps = shards.home(args.run, args.out)
                print(f"{args.out}: the average after {step} of {steps} steps")
            case "assemble":
                shards.assemble(args.shards, args.out)
    except TimeIsUpError:
        print("The time is up: the same command goes on from here.", file=sys.stderr)
        sys.exit(UNFINISHED)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
