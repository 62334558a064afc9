"""What a runner has to know of a policy, as the content of `settings.json`."""

from typing import Any

import numpy as np
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.utils.constants import ACTION

from fm_policy.contract import ObservationCheckStep
from fm_policy.deploy.certified import certified
from fm_policy.deploy.envelope import Limits
from fm_policy.deploy.graph import Policy, only_step
from fm_policy.deploy.runner import FORMAT
from fm_policy.evaluation.provenance import PACKAGES, versions
from fm_policy.window_store import WindowStoreStep

MARGIN = 0.1
"""Of the data's range, on both sides, that actions may use beyond it."""
STEP = 0.5
"""Of the data's range, that an action may differ from the last one."""

KNOWN_STEPS = (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    ObservationCheckStep,  # a runner has its own, the envelope's
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
    WindowStoreStep,
)


def settings_of(checkpoint: Policy) -> dict[str, Any]:
    """The settings of a checkpoint, without those of a graph.

    Raises:
        ValueError: If a runner could not do what the policy does: no fixed grid, processors that it does not know, no
            statistics, weights that are not finite; or if a certificate lies beside the checkpoint that is not its own.
    """
    config = checkpoint.policy.config
    if config.nfe is None:
        raise ValueError(
            f"solver={config.solver!r} chooses its steps as it runs and has no grid to export: "
            "choose another one, as by --solver euler --nfe 16"
        )
    _check_processors(checkpoint)
    _check_weights(checkpoint)
    names = ("type", "stage", "velocity_net", "solver", "num_solver_steps", "head")
    policy = {name: getattr(config, name) for name in names}
    policy |= {"nfe": config.nfe, "head_nfe": config.head_nfe, "fingerprint": checkpoint.fingerprint}
    low, high = _action_range(checkpoint)
    return {
        "format": FORMAT,
        "policy": policy,
        "observations": _observations(checkpoint),
        "action": {"names": config.action_feature_names, "data_min": low.tolist(), "data_max": high.tolist()},
        "noise_shape": list(config.noise_shape),
        "n_obs_steps": config.n_obs_steps,
        "chunk_length": config.chunk_length,
        "n_action_steps": config.n_action_steps,
        "limits": _limits(low, high),
        "certificate": certified(checkpoint),
        "versions": versions([*PACKAGES, "onnx", "onnxruntime", "onnxscript"]),
    }


def _observations(checkpoint: Policy) -> dict[str, dict[str, Any]]:
    config = checkpoint.policy.config
    features: dict[str, dict[str, Any]] = {}
    for name, feature in (config.input_features or {}).items():
        channels, *size = feature.shape
        image = {"kind": "image", "shape": [*size, channels]}
        features[name] = image if name in config.image_features else {"kind": "numbers", "shape": list(feature.shape)}
    return features


def _limits(low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    span = high - low
    lists = [numbers.tolist() for numbers in (low - MARGIN * span, high + MARGIN * span, STEP * span)]
    return vars(Limits(*lists))


def _action_range(checkpoint: Policy) -> tuple[np.ndarray, np.ndarray]:
    stats = only_step(checkpoint.postprocessor.steps, UnnormalizerProcessorStep).state_dict()
    missing = [name for name in ("min", "max") if f"{ACTION}.{name}" not in stats]
    if missing:
        raise ValueError(f"the checkpoint's postprocessor lacks the action's {missing}, which limit the robot")
    low, high = (stats[f"{ACTION}.{name}"].double().numpy() for name in ("min", "max"))
    return low, high


def _check_processors(checkpoint: Policy) -> None:
    steps = [*checkpoint.preprocessor.steps, *checkpoint.postprocessor.steps]
    unknown = [type(step).__name__ for step in steps if not isinstance(step, KNOWN_STEPS)]
    if unknown:
        raise ValueError(f"the checkpoint's processors hold {unknown}, which the exported graph would leave out")
    renames = [
        step.rename_map for step in steps if isinstance(step, RenameObservationsProcessorStep) and step.rename_map
    ]
    if renames:
        raise ValueError(f"the checkpoint's preprocessor renames observations, {renames[0]}: export one without")


def _check_weights(checkpoint: Policy) -> None:
    weights = checkpoint.policy.active_net.state_dict()
    infinite = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if infinite:
        raise ValueError(f"{len(infinite)} weights hold NaN or infinity, {infinite[0]} among them")
