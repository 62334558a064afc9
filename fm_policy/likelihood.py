"""The stages after pre-training: maximum likelihood of the chunks that the robot's own map makes, eq. (6)."""

import copy
import math
from functools import partial

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.flow.coupling import independent, inverse, nearest, reflow
from fm_policy.flow.losses import HUBER_SCALE, Reduction, gaussian_nll, masked_mse, pseudo_huber
from fm_policy.flow.solvers import call_times
from fm_policy.net import FlowMatchingNet
from fm_policy.residual.control_synth import ControlSynth
from fm_policy.residual.stability import PENALTIES

# A learned variance must follow the error, which falls within hundreds of steps; in the net's steps of 5e-6 it stood.
VARIANCE_LR = 1e-2
INITIAL_SIGMA = 0.1

type Logs = dict[str, float]


def pairs(
    config: FlowMatchingConfig, net: FlowMatchingNet, base: FlowMatchingNet | None, batch: dict[str, Tensor], o: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise, the chunk that it shall become, and the chunk's padding, by the configured coupling.

    The noise is what the robot draws, `noise_scale` included, but for `inverse`, which finds it from the data.

    Args:
        config: The policy's.
        net: The net in training.
        base: The frozen one that it started from, which makes the pairs of `inverse` and `reflow`.
        batch: Preprocessed windows.
        o: Their features by `net`, `(B, obs_dim)`.

    Returns:
        x0 and x1, `(B, horizon, action_dim)`, and `(B, horizon)` or None.

    Raises:
        ValueError: If the pairs need a base and there is none.
    """
    x1, is_pad, scale = batch[ACTION], batch.get(f"{ACTION}_is_pad"), config.noise_scale
    if config.coupling == "nearest":
        coarse = copy.copy(config)
        coarse.num_solver_steps = config.nearest_steps or config.num_solver_steps
        solve = partial(net.chunk, coarse, o=o.detach().repeat(config.nearest_k, 1))
        return nearest(x1, config.nearest_k, solve, is_pad, scale=scale), x1, is_pad
    if config.coupling == "independent":
        return independent(x1, scale=scale), x1, is_pad
    if base is None:
        raise ValueError(
            "the policy holds no copy of its base, which is made where a data set is handed in: "
            "FlowMatchingPolicy.from_pretrained(..., dataset_meta=dataset.meta)"
        )
    with torch.no_grad():
        features = base.encoder(batch)
    if config.coupling == "inverse":
        return inverse(x1, base.velocity.bind(features)), x1, is_pad
    # The base acts beyond an episode's end, too: nothing of its chunk is padding.
    v = base.velocity.bind(features, call_times("euler", config.reflow_steps))
    return *reflow(x1, v, config.reflow_steps, scale=scale), None


def reconstruction_loss(
    config: FlowMatchingConfig,
    chunk: Tensor,
    x1: Tensor,
    is_pad: Tensor | None,
    log_variance: Tensor | None,
    reduction: Reduction,
) -> tuple[Tensor, Logs]:
    """Negative log-likelihood of the data around the policy's chunks, eq. (6), or (B.6) where they have a variance.

    Towards a base's chunks (`reflow`) it is the pseudo-Huber distance instead, whose optimum is the same.

    Args:
        config: The policy's.
        chunk: What the solver made of the noise, `(B, horizon, action_dim)`.
        x1: What it should have become.
        is_pad: True where that lies beyond its episode, `(B, horizon)`.
        log_variance: Log sigma^2 of each element, `(horizon, action_dim)`; None: a scalar.
        reduction: "mean" for a scalar, "none" for one loss per sample.

    Returns:
        The loss, and what to log.
    """
    loss = error = masked_mse(chunk, x1, is_pad, reduction)
    logs = {"distillation_error" if config.coupling == "reflow" else "reconstruction_error": error.mean().item()}
    if config.coupling == "reflow":
        loss = pseudo_huber(chunk, x1, HUBER_SCALE, reduction)
    if log_variance is not None:
        loss = gaussian_nll(chunk, x1, log_variance, is_pad, reduction)
        logs["sigma"] = (0.5 * log_variance).exp().mean().item()
    return loss, logs


def head_penalty(config: FlowMatchingConfig, net: FlowMatchingNet) -> tuple[Tensor | float, Logs]:
    """What drives a head of mode `penalty` towards stability, weighted, and what to log of it; of any other 0."""
    if not (isinstance(net.head, ControlSynth) and config.head_mode == "penalty"):
        return 0.0, {}
    penalty = PENALTIES[config.head_penalty](net.head.matrices(), config.head_penalty_margin)
    return config.head_penalty_weight * penalty, {"head_penalty": penalty.item()}


def initial_log_variance(config: FlowMatchingConfig) -> Tensor:
    """Log sigma^2 of each element of a chunk, `(horizon, action_dim)`, as configured."""
    shape = config.noise_shape
    sigma = torch.tensor(config.sigma or [INITIAL_SIGMA], dtype=torch.float32)
    return 2 * (sigma.view(shape) if len(sigma) == math.prod(shape) else sigma.expand(shape)).log()
