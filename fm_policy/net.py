"""Everything that is trained: observation encoder, velocity net and head, made from a configuration."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fm_policy.encoders import ObservationEncoder
from fm_policy.flow.solvers import Velocity, call_times, integrate
from fm_policy.residual.control_synth import ControlSynth
from fm_policy.residual.unet import ResidualUnet
from fm_policy.velocity import Transformer, Unet1d, VelocityNet

if TYPE_CHECKING:
    from fm_policy.configuration_fm_ft import FlowMatchingConfig  # needs LeRobot, which the nets do not


class FlowMatchingNet(nn.Module):
    """An observation encoder, `o = encoder(batch)`, a velocity net, `velocity(t, x, o)`, and perhaps a head."""

    def __init__(self, config: "FlowMatchingConfig") -> None:
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
        self.head = _make_head(config, self.encoder.output_dim)

    def chunk(
        self, config: "FlowMatchingConfig", x0: Tensor, o: Tensor, v: Velocity | None = None, start: float = 0.0
    ) -> Tensor:
        """The map of the robot: from noise on the configured grid to t = 1, and through the head to 1 + T_r.

        Args:
            config: Names the grid, and whether its flow is trained; handed in, since evaluations change the grid.
            x0: Noise, `(B, horizon, action_dim)`.
            o: Observation features, `(B, obs_dim)`.
            v: The velocity for o, if somebody listens to it or changes it.
            start: Time of x0, if it is no longer noise: the grid's steps that begin before it are left out.

        Returns:
            Normalised chunks, `(B, horizon, action_dim)`.
        """
        return self.refined(config, self.flow(config, x0, o, v, start), o)

    def flow(
        self, config: "FlowMatchingConfig", x0: Tensor, o: Tensor, v: Velocity | None = None, start: float = 0.0
    ) -> Tensor:
        """The first part of `chunk`: from noise to x(1)."""
        checkpoint = config.checkpoint_solver and self.training
        with nullcontext() if config.trains_flow else torch.no_grad():
            v = self.bind(config, o) if v is None else v
            steps = max(1, round((1 - start) * config.num_solver_steps))
            return integrate(v, x0, config.solver, steps, start=start, checkpoint=checkpoint)

    def refined(self, config: "FlowMatchingConfig", x1: Tensor, o: Tensor) -> Tensor:
        """The second part of `chunk`: from x(1) to x(1 + T_r); x(1) itself where there is no head."""
        if self.head is None:
            return x1
        steps, end = config.head_steps, 1.0 + config.head_span
        head = self.head.bind(o, call_times("euler", steps, 1.0, end))
        return integrate(head, x1, "euler", steps, start=1.0, end=end)

    def bind(self, config: "FlowMatchingConfig", o: Tensor) -> Velocity:
        """The velocity of these observation features, `(B, obs_dim)`, to be asked on the configured grid."""
        return self.velocity.bind(o, call_times(config.solver, config.num_solver_steps))


def _make_velocity_net(config: "FlowMatchingConfig", obs_dim: int) -> VelocityNet:
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


def _make_head(config: "FlowMatchingConfig", obs_dim: int) -> VelocityNet | None:
    action_dim = config.action_feature.shape[0]
    if config.head == "unet":
        return ResidualUnet(action_dim, obs_dim)
    if config.head == "control_synth":
        return ControlSynth(
            action_dim,
            obs_dim,
            config.horizon,
            layout=config.head_layout,
            mode=config.head_mode,
            activations=config.head_activations,
            width=config.head_width,
            rate=config.head_rate,
        )
    return None
