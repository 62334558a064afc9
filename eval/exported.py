"""An exported folder beside the policy that it was made of, in a simulator: `python eval/exported.py --folder DIR`.

Each plays the same starts with the same noise. Printed is each one's score (the mean over episodes of the largest
reward) and success; how far the exported actions lie from the policy's own where both see what the policy sees; and
what the exported runners counted: their safety envelope is on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="what `python -m fm_policy.deploy export` wrote")
    add("--policy", type=Path, help="folder of its checkpoint; the one that ships with the package if not given")
    add("--env", default="pusht_b", help="task")
    add("--episodes", type=int, default=20, help="number of seeds, each one a start")
    add("--seed", type=int, default=1000, help="first seed")
    return parser.parse_args()


def main() -> None:
    args = parse()
    # Imported late: help and wrong arguments need not wait for torch.
    import torch

    from env_configs import make_env_config
    from fm_policy.assets import default_policy
    from fm_policy.deploy.runner import Runner, load
    from fm_policy.evaluation.checkpoint import load_checkpoint
    from fm_policy.evaluation.episodes import EpisodeKey
    from fm_policy.evaluation.inference import episode_noise
    from fm_policy.flow.noise import sample_noise

    noises: dict[str, torch.Generator] = {}

    def exported_runner(name: str) -> Runner:
        return load(args.folder, deadline=None, noise=lambda shape: sample_noise(shape, noises[name]).numpy())

    try:
        runner, shadow = exported_runner("runner"), exported_runner("shadow")
        made = runner.settings["policy"]
        checkpoint = load_checkpoint(args.policy or default_policy(), solver=made["solver"], nfe=made["nfe"])
        if checkpoint.fingerprint != made["fingerprint"]:
            raise ValueError(f"{args.folder} was made of another checkpoint than {checkpoint.path}")
        task = make_env_config(args.env, **({"obs": "image"} if checkpoint.policy.config.image_features else {}))
    except (ValueError, ModuleNotFoundError) as error:
        raise SystemExit(f"exported.py: {error}") from error
    env = next(iter(next(iter(task.create_envs(1, False).values())).values()))
    policy, preprocess, postprocess = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor

    def by(runner: Runner, frame: dict[str, Any]) -> np.ndarray:
        action = runner.act({name: as_robot(frame[name]) for name in runner.settings["observations"]})
        assert action is not None
        return action

    def own(frame: dict[str, Any]) -> np.ndarray:
        with torch.inference_mode():
            action = policy.select_action(preprocess(frame), generator=noises["policy"])
            action = postprocess(action)[0].numpy()
        apart.append(np.abs(action - by(shadow, frame)).max())
        return action

    rows = []
    for seed in range(args.seed, args.seed + args.episodes):
        noises |= {name: episode_noise(EpisodeKey(seed, 0)) for name in ("policy", "shadow", "runner")}
        apart: list[float] = []
        for part in (policy, shadow, runner):
            part.reset()
        row = [*play(env, task, seed, own), *play(env, task, seed, lambda frame: by(runner, frame))]
        rows.append([*row, max(apart)])
        print(f"seed {seed}: rewards {row[0]:.4f} {row[2]:.4f}, actions apart {max(apart):.1e}", flush=True)
    means = np.mean(rows, axis=0)
    print(f"{args.episodes} episodes     policy  exported")
    print(f"score          {means[0]:7.4f}   {means[2]:7.4f}")
    print(f"success        {means[1]:7.3f}   {means[3]:7.3f}")
    print(f"actions apart at most {max(row[4] for row in rows):.1e}")
    print(f"events of the runners: {dict(runner.events + shadow.events)}")


def play(env: Any, task: Any, seed: int, act: Callable[[dict[str, Any]], np.ndarray]) -> tuple[float, bool]:
    """An episode: its largest reward, and whether it succeeded."""
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION, preprocess_observation

    to_policy, _ = task.get_env_processors()
    observation, _ = env.reset(seed=[seed], options={NEW_ROLLOUT_OPTION: True})
    words, limit = list(env.call("task_description")), env.call("_max_episode_steps")[0]
    rewards: list[float] = []
    success = False
    while len(rewards) < limit:
        action = act(to_policy(preprocess_observation(observation) | {"task": words}))
        observation, reward, terminated, truncated, info = env.step(action[None].astype(np.float32))
        rewards.append(float(reward[0]))
        success |= bool(info["is_success"][0])
        if terminated[0] or truncated[0]:
            break
    return max(rewards), success


def as_robot(value: Any) -> np.ndarray:
    """A feature of LeRobot's observation, `(1, ...)`, as a robot gives it: numbers, or a uint8 picture."""
    array = value[0].numpy()
    return array if array.ndim == 1 else np.round(255 * np.moveaxis(array, 0, -1)).astype(np.uint8)


if __name__ == "__main__":
    main()
