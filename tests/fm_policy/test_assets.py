"""What ships is what its README says."""

import numpy as np
from lerobot.datasets import LeRobotDataset

from fm_policy.assets import default_demos


def test_every_shipped_demonstration_ends_in_its_only_success():
    dataset = LeRobotDataset("local/pusht_demos", root=default_demos())
    assert dataset.num_episodes == 200
    columns = dataset.hf_dataset.with_format("numpy")
    success, done, reward = (np.ravel(columns[f"next.{name}"][:]) for name in ("success", "done", "reward"))
    last = np.asarray(dataset.meta.episodes["dataset_to_index"]) - 1
    assert np.array_equal(np.flatnonzero(success), last)
    assert np.array_equal(np.flatnonzero(done), last)
    assert (reward[last] == 1).all()
