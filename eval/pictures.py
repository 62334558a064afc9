"""Draw the README's pictures from a checkpoint: `python eval/pictures.py --out docs`."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from lerobot.envs.utils import preprocess_observation
from PIL import Image

from env_configs import make_env_config
from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import Checkpoint, load_checkpoint
from fm_policy.flow.noise import sample_noise
from fm_policy.flow.solvers import SCHEMES

STEPS, SHOWN = 16, (0, 4, 8, 12, 16)


def observe(checkpoint: Checkpoint, observation: dict) -> dict:
    """One environment's observation as the policy wants it, with a batch of one."""
    return checkpoint.preprocessor(preprocess_observation(observation))


def rollout(checkpoint: Checkpoint, seed: int, noise_seed: int) -> tuple[list[np.ndarray], float]:
    """Pictures of an episode, and its largest reward."""
    env = make_env_config("pusht", render_size=160).make()
    generator = torch.Generator().manual_seed(noise_seed)
    observation, _ = env.reset(seed=seed)
    checkpoint.policy.reset()
    pictures, rewards, ended = [env.render()], [0.0], False
    while not ended:
        action = checkpoint.policy.select_action(observe(checkpoint, observation), generator=generator)
        observation, reward, terminated, truncated, _ = env.step(checkpoint.postprocessor(action)[0].numpy())
        pictures.append(env.render())
        rewards.append(reward)
        ended = terminated or truncated
    return pictures, max(rewards)


def flow(checkpoint: Checkpoint, seed: int, samples: int = 24) -> tuple[np.ndarray, list[np.ndarray]]:
    """The board at a start, and the chunks, in pixels, on their way from noise to data: `(samples, horizon, 2)`."""
    env = make_env_config("pusht", render_size=512).make()
    observation, _ = env.reset(seed=seed)
    net, config = checkpoint.policy.active_net, checkpoint.policy.config
    history = {
        name: v.unsqueeze(1) for name, v in observe(checkpoint, observation).items() if name in config.input_features
    }
    x = config.noise_scale * sample_noise((samples, config.horizon, 2), torch.Generator().manual_seed(0))
    states = [x]
    with torch.no_grad():
        o = net.encoder(history).expand(samples, -1)
        for n in range(STEPS):
            x = SCHEMES["euler"].step(lambda t, x: net.velocity(t, x, o), n / STEPS, 1 / STEPS, x)
            states.append(x)
    pixels = [checkpoint.postprocessor(state.flatten(0, 1)).view(samples, -1, 2).numpy() for state in states]
    return env.render(), pixels


def draw_flow(board: np.ndarray, states: list[np.ndarray], path: Path) -> None:
    """A row of boards, one for each shown time."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(3 * len(SHOWN), 3.3))
    for axis, n in zip(axes, SHOWN, strict=True):
        axis.imshow(board)
        for chunk in states[n]:
            axis.plot(*chunk.T, "-", color="0.4", linewidth=0.4)
            axis.scatter(*chunk.T, c=np.arange(len(chunk)), cmap="plasma", s=6, zorder=2)
        axis.set(xlim=(0, 512), ylim=(512, 0), xticks=[], yticks=[], title=f"t = {n / STEPS:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Write `rollout.gif` and `flow.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--policy", type=Path, default=default_policy(), help="folder of a checkpoint on states")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=1000, help="start of the first episode")
    parser.add_argument("--episodes", type=int, default=4, help="episodes in the GIF, side by side")
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error(f"--episodes must be at least 1, got {args.episodes}")
    try:
        checkpoint = load_checkpoint(args.policy)
    except ValueError as error:
        raise SystemExit(f"pictures.py: {error}") from error
    args.out.mkdir(parents=True, exist_ok=True)
    films, rewards = zip(*(rollout(checkpoint, args.seed + i, i) for i in range(args.episodes)), strict=True)
    length = max(map(len, films))
    rows = [np.concatenate([film[min(i, len(film) - 1)] for film in films], axis=1) for i in range(0, length, 2)]
    frames = [Image.fromarray(row).quantize(32) for row in rows]
    frames[0].save(args.out / "rollout.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    draw_flow(*flow(checkpoint, args.seed), args.out / "flow.png")
    print(f"{args.out}: {args.episodes} episodes, largest rewards {[round(r, 3) for r in rewards]}")


if __name__ == "__main__":
    main()
