"""Record Push-T episodes of a policy as demonstrations: `python eval/record.py --root DIR`.

Successful ones alone, as the set that ships with the package was made; or all of them (`--failures`), for a policy that
shall be distilled on the states that it comes to. The starts are none of those that results are reported on.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, preprocess_observation

from env_configs import make_env_config
from env_configs.demos.dataset import Episode, write_dataset
from env_configs.demos.pusht_zarr import features
from env_configs.pusht import FPS, TASK_DESCRIPTION
from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import Checkpoint, load_checkpoint

BATCH = 64


def episodes_of(checkpoint: Checkpoint, first_seed: int, failures: bool) -> Iterator[Episode]:
    """Episodes, without end, up to the step that succeeds; starts of `first_seed` and those after it.

    Args:
        checkpoint: The policy.
        first_seed: Of the first start.
        failures: Whether episodes without success are among them, at their full length.

    Raises:
        ValueError: A whole batch of starts brought no success, and only those were wanted: there would be no end.
    """
    env = make_env_config("pusht").create_envs(BATCH)["fm_pusht"][0]
    generator = torch.Generator().manual_seed(first_seed)
    while True:
        seeds = list(range(first_seed, first_seed + BATCH))
        first_seed += BATCH
        frames, solved_at = roll_batch(checkpoint, env, seeds, generator)
        if not (failures or solved_at.any()):
            raise ValueError(f"the policy succeeds in none of the starts {seeds[0]}-{seeds[-1]}: nothing to record")
        for row in range(BATCH) if failures else np.flatnonzero(solved_at):
            columns = {name: values[: solved_at[row] or None, row].copy() for name, values in frames.items()}
            columns["next.done"][-1] = True
            yield Episode(columns, TASK_DESCRIPTION)


def roll_batch(
    checkpoint: Checkpoint, env: VectorEnv, seeds: list[int], generator: torch.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Run a batch to its end: columns `(T, BATCH, ...)`, and for each row the steps to success, 0 without."""
    checkpoint.policy.reset()
    observation, _ = env.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True})  # type: ignore[arg-type]
    steps, solved_at, ended = [], np.zeros(BATCH, dtype=int), np.zeros(BATCH, dtype=bool)
    while not ended.all():
        action = checkpoint.policy.select_action(
            checkpoint.preprocessor(preprocess_observation(observation)), generator=generator
        )
        action = checkpoint.postprocessor(action).numpy()
        seen = {"observation.state": "agent_pos", "observation.environment_state": "environment_state"}
        frame = {name: observation[key].astype(np.float32) for name, key in seen.items()}
        observation, reward, terminated, truncated, info = env.step(action)
        success = info["is_success"]
        outcome = {"next.reward": reward.astype(np.float32), "next.done": success & False, "next.success": success}
        steps.append(frame | {"action": action} | {name: value[:, None] for name, value in outcome.items()})
        solved_at[success & (solved_at == 0) & ~ended] = len(steps)
        ended |= terminated | truncated
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}, solved_at


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set to write; must not exist")
    parser.add_argument("--policy", type=Path, default=default_policy(), help="folder of a checkpoint on states")
    parser.add_argument("--episodes", type=int, default=200, help="episodes to keep")
    parser.add_argument("--failures", action="store_true", help="keep those without success, too")
    parser.add_argument("--seed", type=int, default=50000, help="first start")
    args = parser.parse_args()
    try:
        recorded = episodes_of(load_checkpoint(args.policy), args.seed, args.failures)
        kept = islice(recorded, max(args.episodes, 0))
        episodes, frames = write_dataset(args.root, FPS, features("state"), kept, total=args.episodes)
    except (ValueError, FileExistsError) as error:
        raise SystemExit(f"record.py: {error}") from error
    print(f"{args.root}: {episodes} episodes, {frames} frames")


if __name__ == "__main__":
    main()
