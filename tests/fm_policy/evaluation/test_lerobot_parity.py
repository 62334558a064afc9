"""The engine against LeRobot's own evaluation, with the same noise for the same episode and chunk."""

import pytest
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.scripts.lerobot_eval import eval_policy

from env_configs import make_env_config
from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import Checkpoint, load_checkpoint
from fm_policy.evaluation.episodes import EpisodeKey
from fm_policy.evaluation.inference import episode_noise
from fm_policy.evaluation.rollouts import evaluate
from fm_policy.flow.noise import sample_noise
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

BATCH = 16
START = 1000


class SeededPolicy(FlowMatchingPolicy):
    """Draws the engine's noise: row i of LeRobot's n-th batch is the episode of seed START + n BATCH + i."""

    batches = -1  # the constructor resets once before the first batch

    def reset(self) -> None:
        """A new batch starts."""
        super().reset()
        self.batches += 1
        first = START + (self.batches - 1) * BATCH
        self.noise = [episode_noise(EpisodeKey(max(first, 0) + row, 0)) for row in range(BATCH)]

    def predict_action_chunk(self, batch, noise=None, generator=None):
        """As ever, from that noise."""
        noise = torch.stack([sample_noise((self.config.horizon, 2), draw) for draw in self.noise])
        return super().predict_action_chunk(batch, noise, generator)


def lerobot_rows(checkpoint: Checkpoint, env_config: EnvConfig, episodes: int) -> list[tuple[int, float, bool]]:
    policy = SeededPolicy(checkpoint.policy.config)
    policy.load_state_dict(checkpoint.policy.state_dict())
    env = env_config.create_envs(BATCH)[env_config.type][0]
    processors = (*env_config.get_env_processors(), checkpoint.preprocessor, checkpoint.postprocessor)
    result = eval_policy(env, policy, *processors, n_episodes=episodes, start_seed=START)
    env.close()
    return [(row["seed"], row["max_reward"], row["success"]) for row in result["per_episode"]]


def our_rows(checkpoint: Checkpoint, env_config: EnvConfig, episodes: int) -> list[tuple[int, float, bool]]:
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    rows = evaluate(*parts, env_config, range(START, START + episodes))
    return [(row.seed, row.max_reward, row.success) for row in rows]


@pytest.mark.parametrize("fields", [{}, {"n_obs_steps": 3, "horizon": 16, "n_action_steps": 5}])
def test_rows_are_those_of_lerobot(make_checkpoint, short_pusht, fields):
    checkpoint = make_checkpoint(**fields)
    assert our_rows(checkpoint, short_pusht, 20) == lerobot_rows(checkpoint, short_pusht, 20)


def test_rows_of_the_shipped_policy_are_those_of_lerobot():
    """Whole episodes of a policy that can push: some succeed, and end early."""
    checkpoint, task = load_checkpoint(default_policy(), nfe=2), make_env_config("pusht_a", starts="random_state")
    rows = our_rows(checkpoint, task, 16)
    assert rows == lerobot_rows(checkpoint, task, 16)
    assert {success for _, _, success in rows} == {True, False}
