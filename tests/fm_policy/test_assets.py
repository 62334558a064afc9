"""What ships is what its README says."""

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from env_configs import make_env_config
from fm_policy.assets import FOLDER, default_demos, default_policy, one_call_policy, pretrained_policy
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


SHIPPED = {
    # Folder: task, stage, network calls, episodes, their least mean score; an untrained one has below .3 in Push-T
    # and hardly anything elsewhere.
    default_policy(): ("pusht_b", "finetune", 16, 12, 0.93),
    pretrained_policy(): ("pusht_b", "pretrain", 16, 12, 0.93),
    one_call_policy(): ("pusht_b", "finetune", 1, 12, 0.93),
    FOLDER / "pusht_two_calls": ("pusht_b", "finetune", 2, 12, 0.93),
    FOLDER / "pusht_certified": ("pusht_b", "residual", 2, 12, 0.93),
    FOLDER / "pusht_unmirrored": ("pusht_b", "pretrain", 16, 12, 0.85),
    default_policy("kitchen"): ("kitchen", "pretrain", 4, 4, 0.75),
    default_policy("lift"): ("lift", "pretrain", 16, 4, 0.75),
    default_policy("transport"): ("transport", "finetune", 4, 2, 0.4),
}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_shipped_policies_do_their_task_with_the_calls_that_they_promise(folder):
    """How often they succeed is told by hundreds of episodes."""
    task, stage, calls, count, least = SHIPPED[folder]
    checkpoint = load_checkpoint(folder)
    config = checkpoint.policy.config
    assert (config.stage, config.nfe, config.use_ema, config.pretrained_path) == (stage, calls, False, None)
    parts = checkpoint.policy, checkpoint.preprocessor, checkpoint.postprocessor
    episodes = evaluate(*parts, make_env_config(task), range(30000, 30000 + count))
    assert np.mean([episode.max_reward for episode in episodes]) > least


def test_every_shipped_policy_is_tried_and_has_a_card():
    assert {config.parent for config in FOLDER.glob("*/config.json")} == {*SHIPPED}
    for folder in SHIPPED:
        assert "license: apache-2.0" in (folder / "README.md").read_text()


def test_both_forms_of_push_t_have_one_policy_and_a_task_without_is_named():
    assert default_policy("pusht_a") == default_policy("pusht_b") == default_policy()
    with pytest.raises(
        ValueError, match="no policy ships for the task 'handover', only for pusht, kitchen, lift, trans"
    ):
        default_policy("handover")
