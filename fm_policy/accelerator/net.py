"""The net of every method: a picture's encoder and a U-Net, with the names of the policy's own weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fm_policy.encoders import ObservationEncoder
from fm_policy.flow.solvers import call_times, integrate
from fm_policy.velocity import Unet1d

MOST_PARAMETERS = 30_000_000


class PixelNet(nn.Module):
    """`FlowMatchingNet` without a head, whose own module needs LeRobot: o = encoder(batch), velocity(t, x, o).

    Args:
        policy: Fields of a configuration as a recipe has them.

    Raises:
        ValueError: If the velocity net is no U-Net, or the whole has more than 30 M parameters.
    """

    def __init__(self, policy: Mapping[str, Any]) -> None:
        super().__init__()
        if policy["velocity_net"] != "unet":
            raise ValueError(f"velocity_net must be 'unet', got {policy['velocity_net']!r}")
        features = policy["input_features"]
        cameras = [name for name, feature in features.items() if feature["type"] == "VISUAL"]
        self.encoder = ObservationEncoder(
            numbers={name: feature["shape"][0] for name, feature in features.items() if name not in cameras},
            cameras=cameras,
            n_obs_steps=policy["n_obs_steps"],
            separate=policy["use_separate_rgb_encoder_per_camera"],
            backbone=policy["vision_backbone"],
            group_norm=policy["use_group_norm"],
            keypoints=policy["spatial_softmax_num_keypoints"],
            resize_shape=policy["resize_shape"],
            crop_shape=policy["crop_shape"],
            crop_is_random=policy["crop_is_random"],
        )
        (action,) = policy["output_features"].values()
        size = (policy["down_dims"], policy["kernel_size"], policy["n_groups"], policy["time_embed_dim"])
        self.velocity = Unet1d(action["shape"][0], self.encoder.output_dim, *size)
        if self.parameter_count() > MOST_PARAMETERS:
            raise ValueError(f"a net has at most {MOST_PARAMETERS} parameters, this one {self.parameter_count()}")

    def parameter_count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def chunk(self, x0: Tensor, o: Tensor, policy: Mapping[str, Any]) -> Tensor:
        """The map that is deployed, and that fine-tuning goes through: from noise on the policy's grid to t = 1.

        Args:
            x0: Noise, `(B, horizon, action_dim)`.
            o: Observation features, `(B, obs_dim)`.
            policy: Names the grid, `solver` and `num_solver_steps`, and `checkpoint_solver`.
        """
        solver, steps = policy["solver"], policy["num_solver_steps"]
        v = self.velocity.bind(o, call_times(solver, steps))
        return integrate(v, x0, solver, steps, checkpoint=policy["checkpoint_solver"] and self.training)
