"""Processors of the diffusion baseline: those of the flow-matching policy."""

from typing import Any

from lerobot.lerobot_types import PolicyAction
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors


def make_dp_ema_pre_post_processors(
    config: DiffusionEmaConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Build the pre- and the postprocessor, see `make_fm_ft_pre_post_processors`."""
    return make_fm_ft_pre_post_processors(config, dataset_stats)
