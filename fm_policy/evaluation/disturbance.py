"""How disturbances of a size travel through a policy, and what its head does to them. Needs no simulator."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fm_policy.evaluation.inference import observed_numbers, shift_observation
from fm_policy.flow.diagnostics import mode_changes, spread
from fm_policy.flow.response import directions, response
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.residual.certificate import Search, euler
from fm_policy.residual.control_synth import ControlSynth
from fm_policy.residual.record import EulerContraction, region_factor

PLACES = ("noise", "observation", "flow")
"""Where disturbances enter: x0; the normalised observation; the flow's chunk x(1), before the head."""

Observation = Mapping[str, Tensor]
"""Preprocessed, each feature `(B, n_obs_steps, *shape)`."""


class Pieces:
    """The map of the robot, cut where disturbances enter: head(flow(x0, o), o) with o = features(observation)."""

    def __init__(self, policy: FlowMatchingPolicy) -> None:
        self._net, self._config = policy.active_net, policy.config

    def features(self, observation: Observation) -> Tensor:
        """`(B, obs_dim)`."""
        return self._net.encoder(dict(observation))

    def flow(self, x0: Tensor, o: Tensor) -> Tensor:
        """From noise, standard normal, to x(1) on the configured grid."""
        return self._net.flow(self._config, self._config.noise_scale * x0, o)

    def head(self, x1: Tensor, o: Tensor) -> Tensor:
        """From x(1) to x(1 + T_r); the identity where there is no head."""
        return self._net.refined(self._config, x1, o)


@torch.no_grad()
def responses(
    policy: FlowMatchingPolicy, observation: Observation, x0: Tensor, sizes: Sequence[float], seed: int
) -> dict[str, Tensor]:
    """RMS change of the chunk, in normalised actions, for disturbances at each of `PLACES`.

    Args:
        policy: In evaluation mode.
        observation: Of B windows.
        x0: Noise, `(B, horizon, action_dim)`.
        sizes: Of the disturbances: RMS per number, in normalised units.
        seed: Decides their directions, one for each row and place: the same for every policy of these shapes.

    Returns:
        By place `(len(sizes), B)`.

    Raises:
        ValueError: If the policy sees images.
    """
    numbers, pieces = observed_numbers(policy.config), Pieces(policy)
    generator = torch.Generator().manual_seed(seed)
    observed = directions((len(x0), policy.config.n_obs_steps, sum(numbers.values())), generator)
    noise, chunk = (directions(x0.shape, generator).to(x0) for _ in range(2))
    o = pieces.features(observation)
    x1 = pieces.flow(x0, o)

    def from_observation(size: float) -> Tensor:
        features = pieces.features(shift_observation(observation, numbers, size * observed))
        return pieces.head(pieces.flow(x0, features), features)

    return {
        "noise": response(lambda size: pieces.head(pieces.flow(x0 + size * noise, o), o), sizes),
        "observation": response(from_observation, sizes),
        "flow": response(lambda size: pieces.head(x1 + size * chunk, o), sizes),
    }


class Spreads(NamedTuple):
    """Of the chunks that one observation gets from K noises, see `flow.diagnostics`."""

    flow: Tensor
    """Spread at t = 1, `(B,)`."""
    chunk: Tensor
    """Spread after the head, `(B,)`."""
    mode_changes: Tensor
    """Whether the head sends a chunk to another mode, `(K, B)` boolean."""


@torch.no_grad()
def spreads(policy: FlowMatchingPolicy, observation: Observation, noise: Tensor) -> Spreads:
    """Of K noises, `(K, B, horizon, action_dim)`, for each of B observations."""
    pieces = Pieces(policy)
    o = pieces.features(observation)
    before = torch.stack([pieces.flow(x0, o) for x0 in noise])
    after = torch.stack([pieces.head(x1, o) for x1 in before])
    return Spreads(spread(before), spread(after), mode_changes(before, after))


def certified_factor(policy: FlowMatchingPolicy) -> dict[str, Any] | None:
    """A proven bound of the factor by which the head, in all its Euler steps, lets an RMS disturbance of x(1) through.

    An Euler step shrinks |x - y|_P to `step_factor` of it (`inequalities.euler`), so that head_steps of them bring the
    RMS to step_factor^head_steps sqrt(lambda_max(P) / lambda_min(P)) at most. Of P a multiple of I, where the root is
    1, and of P as the certificate chooses it, the one that proves more.

    Returns:
        `factor`, `step_factor`, `head_steps` and `norm` ("rms" where P is a multiple of I, else "P"); None where there
        is no head that could be certified, or no proof was found.
    """
    head, config = policy.active_net.head, policy.config
    if not isinstance(head, ControlSynth):
        return None
    system, step = head.system(), config.head_span / config.head_steps
    answers = {norm: euler(system, step, search) for norm, search in {"rms": Search("identity"), "P": Search()}.items()}
    proven: list[dict[str, Any]] = [
        {
            "factor": answer.factor**config.head_steps / region_factor(answer.p),
            "step_factor": answer.factor,
            "head_steps": config.head_steps,
            "norm": norm,
        }
        for norm, answer in answers.items()
        if isinstance(answer, EulerContraction)
    ]
    return min(proven, key=lambda entry: entry["factor"], default=None)
