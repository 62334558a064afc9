"""What ships is what its README says."""

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from env_configs import make_env_config
from fm_policy.assets import default_demos, default_policy, one_call_policy
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.rollouts import evaluate


def test_every_shipped_demonstration_ends_in_its_only_success():
    dataset = LeRobotDataset("local/pusht_demos", root=default_demos())
    assert dataset.num_episodes == 200
    columns = dataset.hf_dataset.with_format("numpy")
    success, done, reward = (np.ravel(columns[f"next.{name}"][:]) for name in ("success", "done", "reward"))
    last = np.asarray(dataset.meta.episodes["dataset_to_index"]) - 1
    assert np.array_equal(np.flatnonzero(success), last)
    assert np.array_equal(np.flatnonzero(done), last)
    assert (reward[last] == 1).all()


@pytest.mark.parametrize(
    ("folder", "stage", "calls"), [(default_policy, "pretrain", 16), (one_call_policy, "finetune", 1)]
)
def test_the_shipped_policies_push_the_block_home_with_the_calls_that_they_promise(folder, stage, calls):
    """A policy that has learned nothing scores below .3; how often they succeed is told by hundreds of episodes."""
    checkpoint = load_checkpoint(folder())
    config = checkpoint.policy.config
    assert (config.stage, config.nfe, config.use_ema) == (stage, calls, False)
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    episodes = evaluate(*parts, make_env_config("pusht_b"), range(30000, 30012))
    assert np.mean([episode.max_reward for episode in episodes]) > 0.85
