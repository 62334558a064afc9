"""Processors of the policy: LeRobot's own steps, the window store in front in training, a check of what comes in."""

from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.lerobot_types import PolicyAction
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.factory import make_default_policy_processor_steps, make_policy_processor_pipelines
from torch import Tensor

from fm_policy.contract import ObservationCheckStep
from fm_policy.window_store import WindowStoreStep


def make_fm_ft_pre_post_processors(
    config: PreTrainedConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Build the pre- and the postprocessor.

    Before the policy: windows (for a training batch of single frames; nothing otherwise), rename, batch dimension,
    check, device, normalise. After it: unnormalise, to the CPU. LeRobot overrides its steps by their names when a
    checkpoint is loaded, so they stay as LeRobot knows them.

    Args:
        config: The policy's configuration, with its features.
        dataset_stats: Statistics of the training data; None leaves values as they are.
    """
    steps = make_default_policy_processor_steps(config, dataset_stats)
    check = ObservationCheckStep.of(config.input_features or {})  # on the CPU: an accelerator would wait for its answer
    return make_policy_processor_pipelines(
        input_steps=[
            WindowStoreStep(),
            *(steps.rename_observations, steps.add_batch_dim, check, steps.to_device, steps.normalize),
        ],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )
