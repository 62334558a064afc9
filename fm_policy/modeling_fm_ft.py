"""The flow-matching policy: LeRobot's contract around `flow`, `velocity` and `encoders`, and nothing else.

Data contract
    observations  (B, n_obs_steps, *shape)   normalised; what the robot sees, oldest first
    o             (B, obs_dim)               their features, computed once per chunk
    x             (B, horizon, action_dim)   normalised to [-1, 1]
    t             scalar or (B,)             0 is noise, 1 is data (openpi and LeRobot's RTC count the other way)
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import ACTION
from safetensors import safe_open
from torch import Tensor, nn

from fm_policy import model_card, window_store
from fm_policy.configuration_fm_ft import FlowMatchingConfig
from fm_policy.ema import ema_decay, ema_update
from fm_policy.encoders import ObservationEncoder
from fm_policy.flow.coupling import COUPLINGS
from fm_policy.flow.losses import Reduction, masked_mse
from fm_policy.flow.noise import sample_noise
from fm_policy.flow.path import interpolate, path_velocity
from fm_policy.flow.solvers import CountedVelocity, integrate
from fm_policy.velocity import Transformer, Unet1d, VelocityNet


class FlowMatchingNet(nn.Module):
    """Everything that is trained: the observation encoder and the velocity net."""

    def __init__(self, config: FlowMatchingConfig) -> None:
        super().__init__()
        features = config.input_features or {}
        cameras = list(config.image_features)
        self.encoder = ObservationEncoder(
            numbers={name: ft.shape[0] for name, ft in features.items() if name not in cameras},
            cameras=cameras,
            n_obs_steps=config.n_obs_steps,
            separate=config.use_separate_rgb_encoder_per_camera,
            backbone=config.vision_backbone,
            group_norm=config.use_group_norm,
            keypoints=config.spatial_softmax_num_keypoints,
            resize_shape=config.resize_shape,
            crop_shape=config.crop_shape,
            crop_is_random=config.crop_is_random,
        )
        self.velocity = _make_velocity_net(config, self.encoder.output_dim)


class FlowMatchingPolicy(PreTrainedPolicy):
    """A policy that carries noise to a chunk of actions along a learned velocity field.

    Args:
        config: The configuration, with its input and output features.
        dataset_meta: The data set to train on, handed in by LeRobot's trainer; opens the window store.
        **kwargs: What else LeRobot hands in, unused.
    """

    config_class = FlowMatchingConfig
    name = "fm_ft"
    _action_queue_attrs = ("_queues",)

    def __init__(self, config: FlowMatchingConfig, dataset_meta: Any = None, **kwargs: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.config: FlowMatchingConfig = config
        self.net = FlowMatchingNet(config)
        if config.use_ema:
            self.ema_net = copy.deepcopy(self.net).requires_grad_(False)
            self.register_buffer("ema_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64))  # see `_repeatable`
        self.nfe = config.nfe or 0
        if config.window_store and dataset_meta is not None:
            window_store.attach(window_store.open_store(dataset_meta, config.observation_window, config.action_window))
        self.reset()

    @property
    def active_net(self) -> FlowMatchingNet:
        """The net in training, or its moving average whenever the policy is not training."""
        return self.ema_net if self.config.use_ema and not self.training else self.net

    # ------------------------------------------------------------------ training

    def get_optim_params(self) -> list[nn.Parameter]:
        """The parameters to train; the moving average is none of them."""
        return list(self.net.parameters())

    def forward(self, batch: dict[str, Tensor], reduction: Reduction = "mean") -> tuple[Tensor, dict[str, float]]:
        """Conditional flow-matching loss, eq. (3).

        Args:
            batch: Preprocessed windows: observations `(B, n_obs_steps, *shape)`, `action`
                `(B, horizon, action_dim)`, and optionally `action_is_pad` `(B, horizon)`.
            reduction: "mean" for a scalar, "none" for one loss per sample, `(B,)`.

        Returns:
            The loss, and what to log: `cfm_loss`, and in evaluation mode `reconstruction_error`, the mean
            squared error of the chunk that the deployed solver produces from the same noise.

        Raises:
            ValueError: If the windows do not have the shapes above.
        """
        self._check_windows(batch)
        with self._repeatable() if self.training else nullcontext():
            o = self.active_net.encoder(batch)
            x1, is_pad = batch[ACTION], batch.get(f"{ACTION}_is_pad")
            x0 = COUPLINGS[self.config.coupling](x1)
            t = torch.rand(len(x1), device=x1.device, dtype=x1.dtype)
            v = self.active_net.velocity(t, interpolate(t, x0, x1), o)
        loss = masked_mse(v, path_velocity(x0, x1), is_pad, reduction)
        logs = {"cfm_loss": loss.mean().item()}
        if not self.training:
            logs["reconstruction_error"] = masked_mse(self._solve(x0, o), x1, is_pad).item()
        return loss, logs

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Make the randomness of a training step (noise, times, crops, dropout) a function of seed and step alone.

        LeRobot restores torch's generator when it resumes, but its loader draws from it once more than the unbroken
        run did. With its own count of the steps, kept in the checkpoint, the policy repeats that run to the bit.
        The seed is the one that torch was last seeded with, `--seed` in LeRobot.
        """
        self.training_steps += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        key = torch.initial_seed(), int(self.training_steps), rank
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)
        device = self.training_steps.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(seed[0]))
            yield

    def update(self) -> None:
        """Move the average of the weights; LeRobot's trainer calls this after every optimiser step."""
        if self.config.use_ema:
            self.ema_updates += 1
            decay = ema_decay(int(self.ema_updates), self.config.ema_power, self.config.ema_max_decay)
            ema_update(self.ema_net, self.net, decay)

    # ------------------------------------------------------------------ inference

    def reset(self) -> None:
        """Forget the history and the queued actions; to be called when an episode starts."""
        self._queues: dict[str, deque[Tensor]] = {
            name: deque(maxlen=self.config.n_obs_steps) for name in self.config.input_features or {}
        }
        self._queues[ACTION] = deque(maxlen=self.config.n_action_steps)

    @torch.no_grad()
    def select_action(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The action to execute now; computes a chunk whenever the last one is used up.

        Args:
            batch: Preprocessed present observation, each feature `(B, *shape)`.
            noise: x0 of a chunk, if one is computed now, `(B, horizon, action_dim)`.
            generator: Source of that noise, if it is not given.

        Returns:
            Normalised action, `(B, action_dim)`.
        """
        observation = self._observation(batch)
        self._check_batch_size(observation)
        populate_queues(self._queues, observation)
        if not self._queues[ACTION]:
            history = {name: torch.stack(list(self._queues[name]), dim=1) for name in observation}
            chunk = self.predict_action_chunk(history, noise, generator)
            self._queues[ACTION].extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._queues[ACTION].popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The chunk for an observation, from noise through the solver. Keeps and needs no history of its own.

        Args:
            batch: Preprocessed observations: a history, each feature `(B, n_obs_steps, *shape)`, or one raw
                frame, `(B, *shape)`, which then stands for the whole history.
            noise: x0, `(B, horizon, action_dim)`; drawn if not given.
            generator: Source of x0, if it is not given.

        Returns:
            Normalised actions from the present on, `(B, horizon - n_obs_steps + 1, action_dim)`.

        Raises:
            ValueError: If an observation is missing, misshapen or not finite, or the noise misshapen.
        """
        history = self._history(self._observation(batch))
        o = self.active_net.encoder(history)
        shape = (len(o), self.config.horizon, self._action_dim)
        if noise is None:
            noise = sample_noise(shape, generator, device=o.device, dtype=o.dtype)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise must have the shape {shape}, got {tuple(noise.shape)}")
        return self._solve(noise.to(o), o)[:, self.config.n_obs_steps - 1 :]

    def _solve(self, x0: Tensor, o: Tensor) -> Tensor:
        net = self.active_net
        v = CountedVelocity(lambda t, x: net.velocity(t, x, o))
        x1 = integrate(v, x0, self.config.solver, self.config.num_solver_steps)
        self.nfe = v.calls
        return x1

    @property
    def _action_dim(self) -> int:
        return self.config.action_feature.shape[0]

    # ------------------------------------------------------------------ checks

    def _observation(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The policy's own features of a batch, in order; LeRobot adds others, `action: None` among them."""
        missing = [name for name in self._features if batch.get(name) is None]
        if missing:
            present = sorted(name for name, value in batch.items() if isinstance(value, Tensor))
            raise ValueError(f"the observation lacks {missing}; it has {present}")
        return {name: batch[name] for name in self._features}

    @property
    def _features(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(ft.shape) for name, ft in (self.config.input_features or {}).items()}

    def _history(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check every feature, and repeat a raw frame along time."""
        return {name: self._feature_history(name, value) for name, value in observation.items()}

    def _feature_history(self, name: str, value: Tensor) -> Tensor:
        shape, steps = self._features[name], self.config.n_obs_steps
        if value.ndim == len(shape) + 1:
            value = value.unsqueeze(1).expand(-1, steps, *value.shape[1:])
        got = tuple(value.shape[1:])
        resized = bool(self.config.resize_shape) and name in self.config.image_features
        if got[:2] != (steps, shape[0]) if resized else got != (steps, *shape):
            raise ValueError(
                f"'{name}' must have the shape (B, {steps}, {shape}) or (B, {shape}), got {tuple(value.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"'{name}' holds NaN or infinity")
        return value

    def _check_batch_size(self, observation: dict[str, Tensor]) -> None:
        name, value = next(iter(observation.items()))
        queue = self._queues[name]
        if queue and len(queue[-1]) != len(value):
            raise ValueError(
                f"the batch size went from {len(queue[-1])} to {len(value)} within an episode: call reset() first"
            )

    def _check_windows(self, batch: Mapping[str, Tensor]) -> None:
        expected: dict[str, tuple[int, ...]] = {ACTION: (self.config.horizon, self._action_dim)}
        expected |= {name: (self.config.n_obs_steps, *shape) for name, shape in self._features.items()}
        for name, shape in expected.items():
            if name not in batch:
                raise ValueError(f"the training batch lacks '{name}'")
            got = tuple(batch[name].shape[1:])
            if got != shape:
                raise ValueError(
                    f"'{name}' must be a window (B, {', '.join(map(str, shape))}), got {tuple(batch[name].shape)}; "
                    "with window_store=true the preprocessor makes the windows"
                )

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def _load_as_safetensor(
        cls, model: "FlowMatchingPolicy", model_file: str, map_location: str, strict: bool
    ) -> "FlowMatchingPolicy":
        """Load weights; unlike LeRobot's, refuse a file that does not fit.

        A file of EMA weights only (see `ema_only`) starts a new average where `use_ema` is on.

        Raises:
            ValueError: Naming every missing, unexpected or wrongly shaped weight.
        """
        with safe_open(model_file, framework="pt", device=str(map_location)) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if model.config.use_ema and not any(name.startswith("ema_") for name in weights):
            weights |= {f"ema_{name}": weight.clone() for name, weight in weights.items() if name.startswith("net.")}
            weights["ema_updates"] = torch.zeros((), dtype=torch.int64)
        _check_weights(model.state_dict(), weights, model_file)
        model.load_state_dict(weights)
        return model

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        super()._save_pretrained(save_directory, **kwargs)
        model_card.write(self.config, save_directory)

    def ema_only(self) -> "FlowMatchingPolicy":
        """A copy that holds the averaged weights alone, as its own: what deployment needs, half the size."""
        config = copy.copy(self.config)
        config.use_ema = False
        policy = FlowMatchingPolicy(config)
        policy.net.load_state_dict((self.ema_net if self.config.use_ema else self.net).state_dict())
        policy.training_steps.copy_(self.training_steps)
        return policy.eval()


def _make_velocity_net(config: FlowMatchingConfig, obs_dim: int) -> VelocityNet:
    action_dim = config.action_feature.shape[0]
    if config.velocity_net == "unet":
        return Unet1d(action_dim, obs_dim, config.down_dims, config.kernel_size, config.n_groups, config.time_embed_dim)
    return Transformer(
        action_dim,
        obs_dim,
        config.horizon,
        config.transformer_dim,
        config.transformer_layers,
        config.transformer_heads,
        config.transformer_dropout,
    )


def _check_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: str) -> None:
    problems = [f"missing: {name}" for name in expected.keys() - weights.keys()]
    problems += [f"unexpected: {name}" for name in weights.keys() - expected.keys()]
    problems += [
        f"wrong shape: {name} is {tuple(weights[name].shape)}, the configuration makes it {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        raise ValueError(f"{file} does not fit its configuration, {len(problems)} weights differ:\n  {shown}")
