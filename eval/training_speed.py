"""How fast LeRobot's trainer trains, end to end, beside its own diffusion policy: `python eval/training_speed.py`.

Every contender is `lerobot-train` itself, from states or pixels of Push-T, with the same data, batch and nets: our
recipe, the same without the window store, and LeRobot's `DiffusionPolicy` with several numbers of loader workers. The
limit is a bare loop of our policy over one ready batch. All in turns, each in a process of its own; what is read is the
trainer's own count of samples per second over the second half of its steps, so that start-up is left out.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS, OURS_PLAIN, PEER, BARE = "fm_ft", "fm_ft, LeRobot's loader", "diffusion, {} workers", "bare loop"
COUNT = re.compile(r"smp/s:(\d+)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=80, help="training steps of a turn; the second half is timed")
    add("--rounds", type=int, default=5, help="turns of each")
    add("--obs", choices=["state", "image"], default="state", help="what the policies see")
    add("--batch-size", type=int, default=128)
    add("--workers", type=int, nargs="*", default=[0, 2], help="loader workers of LeRobot's diffusion policy")
    add("--root", type=Path, help="a LeRobotDataset of Push-T; the shipped one, of states, if not given")
    add("--json", type=Path, help="file for the numbers")
    args = parser.parse_args()
    for name, least in {"steps": 4, "rounds": 1, "batch_size": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.obs == "image" and args.root is None:
        parser.error("--obs image needs --root, a data set with pixels: none ships with the package")
    return args


def recipe(obs: str) -> Path:
    """The recipe whose net, windows and data all contenders share."""
    from fm_policy.recipes import RecipeKey, available

    return available()[RecipeKey("pusht", obs)]


def contenders(obs: str, root: Path, workers: list[int]) -> dict[str, list[str]]:
    """The flags of `lerobot-train` by what they train."""
    data = ["--dataset.repo_id=local/pusht", f"--dataset.root={root}", "--dataset.video_backend=pyav"]
    ours = [f"--config_path={recipe(obs)}", *data, "--dataset.eval_split=0", "--eval_steps=0"]
    flags = {OURS: ours, OURS_PLAIN: [*ours, "--policy.window_store=false"]}
    for count in workers:
        loader = [f"--num_workers={count}", *(["--dataloader_multiprocessing_context=fork"] if count else [])]
        flags[PEER.format(count)] = [*_peer(obs), *data, *loader]
    return flags


def _peer(obs: str) -> list[str]:
    """LeRobot's diffusion policy with the recipe's shapes of nets and windows."""
    policy = json.loads(recipe(obs).read_text())["policy"]
    same = ["n_obs_steps", "horizon", "n_action_steps", "down_dims", "kernel_size", "n_groups", "normalization_mapping"]
    if obs == "image":
        same += ["crop_shape", "crop_is_random", "use_group_norm", "spatial_softmax_num_keypoints"]
    settings = {name: policy[name] for name in same} | {"diffusion_step_embed_dim": policy["time_embed_dim"]}
    settings["pretrained_backbone_weights"] = None
    flags = [f"--policy.{name}={json.dumps(value)}" for name, value in settings.items()]
    return ["--policy.type=diffusion", "--policy.push_to_hub=false", *flags]


def trained(flags: list[str], steps: int, batch_size: int) -> int:
    """Samples per second of a training, by the trainer's own count over the second half of its steps.

    Raises:
        RuntimeError: If the trainer fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = ["--save_checkpoint=false", "--env_eval_freq=0", "--policy.device=cpu", f"--output_dir={folder}/run"]
        length = [f"--steps={steps}", f"--log_freq={steps // 2}", f"--batch_size={batch_size}"]
        command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", *flags, *run, *length]
        told = subprocess.run(command, capture_output=True, text=True)
    counts = COUNT.findall(told.stdout + told.stderr)
    if told.returncode or len(counts) < 2:
        raise RuntimeError(f"lerobot-train {' '.join(flags)} ended with {told.returncode}:\n{told.stderr[-2000:]}")
    return int(counts[1])


def bare(obs: str, steps: int, batch_size: int) -> float:
    """Samples per second of a loop that does nothing but learn, from one ready batch."""
    import torch

    from fm_policy.configuration_fm_ft import FlowMatchingConfig
    from fm_policy.modeling_fm_ft import FlowMatchingPolicy

    with tempfile.TemporaryDirectory() as folder:
        settings = json.loads(recipe(obs).read_text())["policy"]
        (Path(folder) / "config.json").write_text(json.dumps(settings | {"device": "cpu"}))
        config = FlowMatchingConfig.from_pretrained(folder)
    policy = FlowMatchingPolicy(config).train()
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    shapes = {name: (config.n_obs_steps, *feature.shape) for name, feature in config.input_features.items()}
    shapes["action"] = (config.horizon, *config.action_feature.shape)
    batch = {name: torch.rand(batch_size, *shape) * 2 - 1 for name, shape in shapes.items()}
    batch["action_is_pad"] = torch.zeros(batch_size, config.horizon, dtype=torch.bool)
    for step in range(steps):
        if step == steps // 2:
            start = time.perf_counter()
        loss, _ = policy(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.get_optimizer_preset().grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        policy.update()
    return (steps - steps // 2) * batch_size / (time.perf_counter() - start)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Samples per second of every turn."""
    from tqdm import tqdm

    from fm_policy.assets import default_demos

    flags = contenders(args.obs, args.root or default_demos(), args.workers)
    rates: dict[str, list[float]] = {name: [] for name in (BARE, *flags)}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in tqdm(range(args.rounds), unit="round"):
            rates[BARE].append(pool.apply(bare, (args.obs, args.steps, args.batch_size)))
            for name, words in flags.items():
                rates[name].append(trained(words, args.steps, args.batch_size))
    return rates


def main() -> None:
    import torch

    args = parse()
    rates = measure(args)
    print(f"from {args.obs}s, batches of {args.batch_size}, {torch.get_num_threads()} threads")
    print(f"{'':26s}{'samples/s':>10s}{'share of ' + OURS:>17s}{'least':>7s}{'most':>7s}")
    for name, values in rates.items():
        shares = [value / ours for value, ours in zip(values, rates[OURS], strict=True)]
        median = statistics.median(shares)
        print(f"{name:26s}{statistics.median(values):10.0f}{median:17.2f}{min(shares):7.2f}{max(shares):7.2f}")
    if args.json:
        told = {"samples_per_second": rates, "obs": args.obs, "steps": args.steps, "batch_size": args.batch_size}
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
