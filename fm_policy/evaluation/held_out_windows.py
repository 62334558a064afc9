"""The reconstruction error of checkpoints on the episodes that their training held out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import ACTION
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from fm_policy import window_store
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.evaluation.checkpoint import Checkpoint
from fm_policy.flow.losses import masked_mse
from fm_policy.flow.noise import sample_noise
from fm_policy.modeling_fm_ft import FlowMatchingPolicy


class HeldOutWindows:
    """Windows of the held-out episodes, each with its draws of noise: the same for every checkpoint.

    Attributes:
        rows: Which frames of the held-out episodes are the present of a window, `(windows,)`, evenly spaced.
        noise: x0 of every window, `(draws, windows, horizon, action_dim)`.
    """

    def __init__(self, config: TrainPipelineConfig, samples: int, draws: int, seed: int) -> None:
        """Split the run's data set as its training did.

        Args:
            config: What the run was trained with.
            samples: Most windows; if the held-out frames are no more, all of them.
            draws: Draws of noise for each window.
            seed: Decides the noise.

        Raises:
            ValueError: If a number is below 1, the run held nothing out, or its data set is not there.
        """
        for name, value in {"samples": samples, "draws": draws}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        policy = config.policy
        assert isinstance(policy, FlowMatchingConfig)  # the run's checkpoints are of this type
        self._dataset, self._batch_size = _held_out(config), config.batch_size
        if policy.window_store:  # LeRobot then loads single frames, and the preprocessor takes their windows from here
            window_store.attach(window_store.of_policy(self._dataset.meta, policy, policy.input_features or {}))
        frames = len(self._dataset)
        self.rows = np.linspace(0, frames - 1, min(samples, frames)).round().astype(int)
        shape = (draws, len(self.rows), policy.horizon, policy.action_feature.shape[0])
        self.noise = sample_noise(shape, torch.Generator().manual_seed(seed))

    @classmethod
    def of_dataset(
        cls,
        root: Path,
        policy: FlowMatchingConfig,
        samples: int,
        draws: int,
        seed: int,
        eval_split: float = 0.05,
        batch_size: int = 64,
    ) -> Self:
        """Windows of the last episodes of a data set, which the recipes hold out.

        Args:
            root: Folder of a LeRobotDataset.
            policy: What the windows shall hold; so few are loaded without a window store.
            samples: As in `__init__`, as are draws and seed.
            draws: See there.
            seed: See there.
            eval_split: Share of the episodes.
            batch_size: Windows at a time.

        Raises:
            ValueError: If there is no data set, or as `__init__`.
        """
        check_dataset(root)
        data = DatasetConfig(repo_id=f"local/{root.name}", root=str(root), eval_split=eval_split)
        policy = replace(policy, window_store=False)
        training = TrainPipelineConfig(dataset=data, policy=policy, batch_size=max(batch_size, 1))
        return cls(training, samples, draws, seed)

    @torch.no_grad()
    def errors(self, checkpoint: Checkpoint[FlowMatchingPolicy], progress: tqdm | None = None) -> NDArray[np.float64]:
        """Mean squared error of the chunks that the deployed solver makes, by held-out episode, `(episodes, draws)`.

        In normalised actions; the mean over all elements of an episode's windows that are no padding.

        Args:
            checkpoint: The policy; it takes its windows through its own preprocessor.
            progress: Counts the windows, if there is one.
        """
        chunks, actions, padding, episodes = [], [], [], []
        for batch, noise in zip(self.batches(), self.noise.split(self._batch_size, dim=1), strict=True):
            windows = checkpoint.preprocessor(batch)
            chunks.append(torch.stack([checkpoint.policy.reconstruct(windows, x0) for x0 in noise]).cpu())
            actions.append(windows[ACTION].cpu())
            padding.append(windows[f"{ACTION}_is_pad"].cpu())
            episodes.append(batch["episode_index"])
            if progress:
                progress.update(len(actions[-1]))
        chunk, action, is_pad, episode = torch.cat(chunks, 1), *map(torch.cat, (actions, padding, episodes))
        owned = [episode == index for index in episode.unique()]
        return np.array([[masked_mse(x1[own], action[own], is_pad[own]).item() for x1 in chunk] for own in owned])

    def batches(self) -> Iterator[dict[str, Any]]:
        """As LeRobot's trainer loads them for its `eval_loss`."""
        meta = self._dataset.meta
        collate = lerobot_collate_fn if meta.has_language_columns else None
        for batch in DataLoader(Subset(self._dataset, self.rows.tolist()), self._batch_size, collate_fn=collate):
            for camera in meta.camera_keys:
                if batch[camera].dtype == torch.uint8:
                    batch[camera] = batch[camera].float() / 255
            yield batch


def check_dataset(root: Path) -> None:
    """Check that a folder is a LeRobotDataset.

    Raises:
        ValueError: If it is not.
    """
    if not (root / "meta" / "info.json").is_file():
        raise ValueError(f"no LeRobotDataset: {root} holds no meta/info.json")


def _held_out(config: TrainPipelineConfig) -> LeRobotDataset:
    data = config.dataset
    if data.eval_split == 0:
        raise ValueError(
            "the run held no episodes out (dataset.eval_split is 0), so that there is nothing to measure its error on: "
            "choose --by coverage, or train with --dataset.eval_split=0.05"
        )
    if data.root is not None and not Path(data.root).is_dir():
        raise ValueError(f"the run's data set is not there: {data.root} (dataset.root) is no folder")
    _, held_out = make_train_eval_datasets(config)
    return held_out
