"""The policy's own nets, made of a recipe: LeRobot's configuration, which they are made of elsewhere, is not there."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fm_policy.net import FlowMatchingNet

if TYPE_CHECKING:
    from fm_policy.configuration_fm_ft import FlowMatchingConfig

MOST_PARAMETERS = 30_000_000


def settings(policy: Mapping[str, Any]) -> "FlowMatchingConfig":
    """What `FlowMatchingNet` asks of a configuration.

    Args:
        policy: Fields of a configuration as a recipe has them; of the first two stages, which train all of the net.
    """
    features = {name: SimpleNamespace(**feature) for name, feature in policy["input_features"].items()}
    (action,) = policy["output_features"].values()
    made = {
        "input_features": features,
        "image_features": {name: feature for name, feature in features.items() if feature.type == "VISUAL"},
        "action_feature": SimpleNamespace(**action),
        "trains_flow": True,
    }
    return cast("FlowMatchingConfig", SimpleNamespace(**{**policy, **made}))


def make_net(policy: Mapping[str, Any]) -> FlowMatchingNet:
    """Encoder and velocity net of a recipe.

    Raises:
        ValueError: If they have more than 30 M parameters.
    """
    net = FlowMatchingNet(settings(policy))
    if parameter_count(net) > MOST_PARAMETERS:
        raise ValueError(f"a net has at most {MOST_PARAMETERS} parameters, this one {parameter_count(net)}")
    return net


def parameter_count(net: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in net.parameters())
