"""What a batch must look like before the policy touches it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from lerobot.configs import FeatureType, PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import ACTION
from torch import Tensor

from fm_policy.configuration_fm_ft import FlowMatchingConfig


def observation(config: FlowMatchingConfig, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The policy's own features of a batch, in order; LeRobot adds others, `action: None` among them.

    Raises:
        ValueError: If one is missing.
    """
    features = config.input_features or {}
    missing = [name for name in features if batch.get(name) is None]
    if missing:
        present = sorted(name for name, value in batch.items() if isinstance(value, Tensor))
        raise ValueError(f"the observation lacks {missing}; it has {present}")
    return {name: batch[name] for name in features}


def history(config: FlowMatchingConfig, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Observations as a history, `(B, n_obs_steps, *shape)` each; a raw frame `(B, *shape)` is repeated along time.

    Raises:
        ValueError: If a feature is misshapen or not finite.
    """
    return {name: _feature_history(config, name, value) for name, value in observation.items()}


def check_frames(config: FlowMatchingConfig, observation: Mapping[str, Tensor]) -> None:
    """Check single frames, `(B, *shape)` each, before they become part of a history.

    Raises:
        ValueError: If a feature is misshapen or not finite.
    """
    for name, value in observation.items():
        _check_feature(config, name, value, ())


def _feature_history(config: FlowMatchingConfig, name: str, value: Tensor) -> Tensor:
    steps = (config.n_obs_steps,)
    single = value.ndim == len((config.input_features or {})[name].shape) + 1
    _check_feature(config, name, value, () if single else steps)
    return value.unsqueeze(1).expand(-1, *steps, *value.shape[1:]) if single else value


def _check_feature(config: FlowMatchingConfig, name: str, value: Tensor, steps: tuple[int, ...]) -> None:
    """Check a feature, `(B, *steps, *shape)`; a picture that will be resized may have any size."""
    shape = tuple((config.input_features or {})[name].shape)
    got, known = tuple(value.shape[1:]), (*steps, *shape)
    if config.resize_shape and name in config.image_features and len(got) == len(known):
        got, known = got[: len(steps) + 1], known[: len(steps) + 1]
    if got != known:
        raise ValueError(
            f"'{name}' must have the shape (B, {config.n_obs_steps}, {shape}) or (B, {shape}), got {tuple(value.shape)}"
        )
    if not _is_finite(value):
        raise ValueError(f"'{name}' holds NaN or infinity")


def _is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite: by its extremes, a twentieth of what a mask of a picture takes."""
    return value.numel() == 0 or all(math.isfinite(end) for end in value.aminmax())


def check_windows(config: FlowMatchingConfig, batch: Mapping[str, Tensor]) -> None:
    """Check a training batch: observations `(B, n_obs_steps, *shape)`, action `(B, horizon, action_dim)`.

    Raises:
        ValueError: If a window is missing or misshapen.
    """
    expected: dict[str, tuple[int, ...]] = {ACTION: (config.horizon, *config.action_feature.shape)}
    features = config.input_features or {}
    expected |= {name: (config.n_obs_steps, *feature.shape) for name, feature in features.items()}
    for name, shape in expected.items():
        if name not in batch:
            raise ValueError(f"the training batch lacks '{name}'")
        got = tuple(batch[name].shape[1:])
        if got != shape:
            raise ValueError(
                f"'{name}' must be a window (B, {', '.join(map(str, shape))}), got {tuple(batch[name].shape)}; "
                "with window_store=true the preprocessor makes the windows"
            )


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Check a given x0.

    Raises:
        ValueError: If it does not have the shape.
    """
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have the shape {shape}, got {tuple(noise.shape)}")


def check_left_over(left_over: Tensor, action_dim: int, inference_delay: int | None) -> None:
    """Check what is left of the last chunk, and how long the new one will take.

    Raises:
        ValueError: If they are not finite actions `(T, action_dim)` or `(1, T, action_dim)`, and a delay of 0 or more.
    """
    if left_over.ndim not in (2, 3) or left_over.shape[-1] != action_dim or left_over.shape[:-2] not in ((), (1,)):
        raise ValueError(f"prev_chunk_left_over must be (T, {action_dim}), got {tuple(left_over.shape)}")
    if not _is_finite(left_over):
        raise ValueError("prev_chunk_left_over holds NaN or infinity")
    if inference_delay is not None and inference_delay < 0:
        raise ValueError(f"inference_delay must be 0 or more steps, got {inference_delay}")


@ProcessorStepRegistry.register("fm_ft_observation_check")
@dataclass
class ObservationCheckStep(ProcessorStep):
    """Refuses an observation that is not of the policy's robot, or not finite; every other one passes untouched.

    It stands before LeRobot's normaliser, which meets an observation before the policy does, and fails on one of
    another robot with torch's words about sizes.

    Args:
        shapes: The shape of each of the policy's features; None where any length will do.
    """

    shapes: Mapping[str, Sequence[int | None]]

    @classmethod
    def of(cls, features: Mapping[str, PolicyFeature]) -> Self:
        """The step for a policy's input features; the size of pictures is the policy's to judge: it may resize them."""
        pictures = {name: (ft.shape[0], None, None) for name, ft in features.items() if ft.type is FeatureType.VISUAL}
        return cls({name: ft.shape for name, ft in features.items()} | pictures)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Check the observation, `(B, *shape)` or `(B, n_obs_steps, *shape)` for each feature.

        Raises:
            ValueError: Naming the features that are missing or of another shape, or that are not finite.
        """
        observation = transition.get(TransitionKey.OBSERVATION) or {}
        given = {name: torch.as_tensor(observation[name]) for name in self.shapes if observation.get(name) is not None}
        if misfits := [text for name in self.shapes if (text := self._misfit(name, given.get(name)))]:
            wanted = ", ".join(f"'{name}' {_text(shape)}" for name, shape in self.shapes.items())
            raise ValueError(
                f"the observation does not fit the policy: {'; '.join(misfits)}. The policy observes {wanted}: "
                "this is a checkpoint of another robot or task, or a sensor is missing"
            )
        if infinite := [name for name, value in given.items() if not _is_finite(value)]:
            raise ValueError(f"the observation holds NaN or infinity in {infinite}")
        return transition

    def _misfit(self, name: str, value: Tensor | None) -> str:
        shape = self.shapes[name]
        if value is None:
            return f"'{name}' is missing"
        got = tuple(value.shape[-len(shape) :])
        fits = len(got) == len(shape) and all(want in (None, n) for want, n in zip(shape, got, strict=True))
        return "" if fits else f"'{name}' has the shape {tuple(value.shape)}, which must end in {_text(shape)}"

    def get_config(self) -> dict[str, Any]:
        """What is saved with a checkpoint: the shapes."""
        return {"shapes": {name: list(shape) for name, shape in self.shapes.items()}}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """Features stay what they are."""
        return features


def _text(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if length is None else str(length) for length in shape)}{',' * (len(shape) == 1)})"
