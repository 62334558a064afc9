"""Settings that contradict themselves or one another: refused by name before anything is built."""

import math
from typing import TYPE_CHECKING

from lerobot.utils.constants import ACTION

from fm_policy.deploy.rtc import METHODS
from fm_policy.ema import check_schedule
from fm_policy.flow.coupling import COUPLINGS, REFUSED
from fm_policy.flow.losses import SIGMA_RANGE
from fm_policy.flow.noise import check_noise_scale
from fm_policy.flow.solvers import SOLVER_CALLS
from fm_policy.residual.control_synth import LAYOUTS
from fm_policy.residual.matrices import PARAMETRISATIONS
from fm_policy.residual.nonlinearities import NONLINEARITIES
from fm_policy.residual.stability import PENALTIES

if TYPE_CHECKING:
    from fm_policy.configuration_fm_ft import FlowMatchingConfig

CHOICES = {
    "stage": ("pretrain", "finetune", "residual"),
    "coupling": tuple(COUPLINGS),
    "variance": ("scalar", "diagonal", "learned"),
    "head": (None, "control_synth", "unet"),
    "head_mode": tuple(PARAMETRISATIONS),
    "head_layout": LAYOUTS,
    "head_penalty": tuple(PENALTIES),
    "solver": tuple(SOLVER_CALLS),
    "velocity_net": ("unet", "transformer"),
    "vision_backbone": ("resnet18", "resnet34"),
    "rtc_method": METHODS,
}


AT_LEAST_ONE = (
    *("n_obs_steps", "horizon", "n_action_steps", "num_solver_steps", "nearest_k", "reflow_steps"),
    *("head_width", "head_steps", "kernel_size", "n_groups"),
    *("transformer_dim", "transformer_layers", "transformer_heads"),
)
NOT_NEGATIVE = (
    *("drop_n_last_frames", "nearest_steps", "observation_noise", "cfm_weight"),
    *("finetune_lr", "optimizer_lr", "head_lr"),
    *("head_penalty_weight", "head_penalty_margin", "spatial_softmax_num_keypoints"),
)
POSITIVE = ("head_rate", "head_span")


def check(config: "FlowMatchingConfig") -> None:
    """Check what a configuration says of itself.

    Raises:
        ValueError: Naming the setting, its value and what was expected.
    """
    _check_choices(config)
    _check_numbers(config)
    _check_time(config)
    _check_finetuning(config)
    _check_head(config)
    _check_nets(config)
    _check_images(config)
    _check_normalization(config)


def check_features(config: "FlowMatchingConfig") -> None:
    """Check a configuration against the features that it was given.

    Raises:
        ValueError: If there is nothing to observe, not one action to predict, an image smaller than the crop, or
            another number of `sigma` than an action or a chunk has.
    """
    if config.action_feature is None:
        raise ValueError(f"the policy needs the output feature '{ACTION}', got {list(config.output_features or {})}")
    if not (config.image_features or config.robot_state_feature or config.env_state_feature):
        raise ValueError(
            "the policy needs an image, 'observation.state' or 'observation.environment_state' to observe, "
            f"got {list(config.input_features or {})}"
        )
    elements = config.horizon * config.action_feature.shape[0]
    if len(config.sigma) not in (0, elements // config.horizon, elements):
        raise ValueError(
            f"sigma needs {elements // config.horizon} numbers (one per action dimension) or {elements} (one per "
            f"element of a chunk), got {len(config.sigma)}"
        )
    for name, feature in config.image_features.items():
        height_width = config.resize_shape or feature.shape[1:]
        if config.crop_shape and any(c > s for c, s in zip(config.crop_shape, height_width, strict=True)):
            raise ValueError(f"crop_shape={config.crop_shape} is larger than '{name}' of {tuple(height_width)}")


def _check_choices(config: "FlowMatchingConfig") -> None:
    if config.coupling in REFUSED:
        raise ValueError(f"coupling={config.coupling!r} is not for a policy: {REFUSED[config.coupling]}")
    for name, known in CHOICES.items():
        value = getattr(config, name)
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")


def _check_numbers(config: "FlowMatchingConfig") -> None:
    for name in AT_LEAST_ONE:
        if not 1 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and 0 or more, got {getattr(config, name)}")
    for name in POSITIVE:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and positive, got {getattr(config, name)}")
    check_noise_scale(config.noise_scale)
    check_schedule(config.ema_power, config.ema_max_decay)


def _check_time(config: "FlowMatchingConfig") -> None:
    if not 0 < config.rtc_warm_start < 1:
        raise ValueError(f"rtc_warm_start must be a time in (0, 1), got {config.rtc_warm_start}")
    if config.n_action_steps > config.chunk_length:
        raise ValueError(
            f"n_action_steps={config.n_action_steps} exceeds the {config.chunk_length} actions from the present "
            f"on that a chunk holds (horizon={config.horizon} - n_obs_steps={config.n_obs_steps} + 1)"
        )


def _check_finetuning(config: "FlowMatchingConfig") -> None:
    low, high = SIGMA_RANGE
    if not all(low <= sigma <= high for sigma in config.sigma):
        raise ValueError(f"every sigma must be between {low:.3g} and {high:.3g}, got {list(config.sigma)}")
    if config.variance == "diagonal" and not config.sigma:
        raise ValueError("variance='diagonal' needs sigma: one number per action dimension, or per element")
    if config.stage == "pretrain" and config.coupling != "independent":
        raise ValueError(
            f"coupling={config.coupling!r} is for stage 'finetune': flow matching needs 'independent' pairs"
        )
    if config.stage == "pretrain" and not config.train_encoder:
        raise ValueError("train_encoder=False is for stage 'finetune': pre-training starts from random weights")


def _check_head(config: "FlowMatchingConfig") -> None:
    if (config.stage == "residual") != (config.head is not None):
        wanted = "needs a head: 'control_synth' or 'unet'" if config.head is None else "has no head"
        raise ValueError(f"stage {config.stage!r} {wanted}, got head={config.head!r}")
    unknown = set(config.head_activations) - set(NONLINEARITIES)
    if unknown or not config.head_activations:
        raise ValueError(
            f"head_activations must be some of {list(NONLINEARITIES)}, on the command line as '[\"tanh\"]', "
            f"got {list(config.head_activations)}"
        )
    if config.stage == "residual" and config.cfm_weight and not config.train_base:
        raise ValueError(f"cfm_weight={config.cfm_weight} is a loss of the base, which train_base=False leaves alone")


def _check_nets(config: "FlowMatchingConfig") -> None:
    if config.velocity_net == "unet":
        _check_unet(config)
    elif config.transformer_dim % config.transformer_heads:
        raise ValueError(
            f"transformer_dim={config.transformer_dim} must be a multiple of "
            f"transformer_heads={config.transformer_heads}"
        )
    if not 0 <= config.transformer_dropout < 1:
        raise ValueError(f"transformer_dropout must be in [0, 1), got {config.transformer_dropout}")


def _check_unet(config: "FlowMatchingConfig") -> None:
    if not config.down_dims or min(config.down_dims) < 1:
        raise ValueError(f"down_dims needs at least one level, each at least 1 wide, got {tuple(config.down_dims)}")
    shrink = 2 ** (len(config.down_dims) - 1)
    if config.horizon % shrink:
        raise ValueError(
            f"horizon={config.horizon} must be a multiple of {shrink}: a U-Net of {len(config.down_dims)} levels "
            f"(down_dims={tuple(config.down_dims)}) halves it {len(config.down_dims) - 1} times"
        )
    if config.kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {config.kernel_size}")
    uneven = [dim for dim in config.down_dims if dim % config.n_groups]
    if uneven:
        raise ValueError(f"n_groups={config.n_groups} must divide every entry of down_dims, not {uneven}")


def _check_images(config: "FlowMatchingConfig") -> None:
    for name in ("resize_shape", "crop_shape"):
        shape = getattr(config, name)
        if shape is not None and (len(shape) != 2 or min(shape) < 1):
            raise ValueError(f"{name} must be a height and a width, each at least 1, got {shape}")
    if config.crop_shape and config.resize_shape:
        larger = [c > r for c, r in zip(config.crop_shape, config.resize_shape, strict=True)]
        if any(larger):
            raise ValueError(f"crop_shape={config.crop_shape} must fit into resize_shape={config.resize_shape}")


def _check_normalization(config: "FlowMatchingConfig") -> None:
    # LeRobot leaves a kind that is not named here unnormalised, without a word.
    missing = {"VISUAL", "STATE", "ENV", "ACTION"} - set(config.normalization_mapping)
    if missing:
        raise ValueError(f"normalization_mapping lacks {sorted(missing)}: name every kind of feature")
