"""Real-time chunking: a chunk that goes on where the last one, which the robot is still executing, leaves off.

While a chunk is computed, the robot executes `delay` more actions of the last one. The new chunk should begin with
these and stay near what was planned for a while, or the robot jerks where the two meet. After Black, Galliker and
Levine 2025 ("Real-Time Execution of Action Chunking Flow Policies", arXiv 2506.07339), whose equations are cited; time
runs from 0 (noise) to 1 (data), as in the paper and against LeRobot's helper.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch import Tensor

from fm_policy.flow.solvers import Velocity

if TYPE_CHECKING:
    from fm_policy.configuration_fm_ft import FlowMatchingConfig

METHODS = ("direct", "gradient", "warm_start")
"""How a chunk goes on: `guided` without the gradient or with it, or from a `warm_start`."""

SCHEDULES = ("EXP", "LINEAR", "ONES", "ZEROS")


def prefix_weights(delay: int, end: int, length: int, schedule: str = "EXP") -> Tensor:
    """How much each action of a new chunk shall be as planned before, eq. (5).

    Args:
        delay: Actions that will be executed before the new chunk is there; weight 1.
        end: Where the influence of the last chunk ends; weight 0 from there on. (The paper's H - s.)
        length: Actions of a chunk.
        schedule: Between the two, c = (end - i) / (end - delay + 1) for action i: "EXP" is the paper's
            c (e^c - 1) / (e - 1), "LINEAR" is c, "ONES" is 1, "ZEROS" is 0.

    Returns:
        Weights, `(length,)`, in [0, 1].

    Raises:
        ValueError: If the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    end = max(0, min(end, length))
    delay = max(0, min(delay, end))
    c = (end - torch.arange(delay, end, dtype=torch.float32)) / (end - delay + 1)
    between = {"EXP": c * torch.expm1(c) / math.expm1(1), "LINEAR": c, "ONES": c**0, "ZEROS": 0 * c}[schedule]
    return torch.cat([torch.ones(delay), between, torch.zeros(length - end)])


def guidance_weight(t: float | Tensor, largest: float) -> float:
    """The factor of the correction in eq. (2), min(largest, (1 - t) / (t r^2)), r^2 = (1 - t)^2 / (t^2 + (1 - t)^2)."""
    t = float(t)
    beside = t * (1 - t)
    return largest if beside <= 0 else min(largest, (t**2 + (1 - t) ** 2) / beside)


def guided(v: Velocity, planned: Tensor, weights: Tensor, largest: float, *, direct: bool = False) -> Velocity:
    """A velocity that carries noise to a chunk like `planned` where the weights are large, eqs. (2) to (4).

    At every time the chunk is estimated as A(x) = x + (1 - t) v(t, x), and the velocity is corrected along the gradient
    of -|planned - A(x)|^2 / 2 weighted, that is by (planned - A)^T diag(weights) dA/dx: one backward pass of v. Where
    the policy is sure of itself dA/dx is small, and the chunk gives way little, the less the fewer the steps.

    Args:
        v: The velocity, differentiable in x.
        planned: `(B, horizon, action_dim)`; where the weight is 0 it does not matter.
        weights: `(horizon,)`.
        largest: Bound of the correction's factor (the paper's beta). A solver's step of length h moves the prefix by h
            times this share of its error: more than 1 / h overshoots.
        direct: Takes dA/dx as the identity: no backward pass, and what was planned is kept to whatever the policy makes
            of the observation; actions of weight 0 follow only through v. (What LeRobot's helper computes.)

    Raises:
        ValueError: In torch's inference mode, which keeps no gradients, unless `direct`.
    """
    weights = weights.to(planned)[:, None]

    def velocity(t: float | Tensor, x: Tensor) -> Tensor:
        if direct:
            slope = v(t, x)
            correction = (planned - x - (1 - t) * slope) * weights
        else:
            slope, correction = _by_gradient(v, t, x, planned, weights)
        return slope + guidance_weight(t, largest) * correction

    return velocity


def _by_gradient(v: Velocity, t: float | Tensor, x: Tensor, planned: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_inference_mode_enabled():
        raise ValueError("real-time chunking needs gradients: call the policy under no_grad, not inference_mode")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = v(t, x)
        estimate = x + (1 - t) * slope
        error = (planned - estimate).detach() * weights
        (correction,) = torch.autograd.grad(estimate, x, error)
    return slope.detach(), correction


def aligned(left_over: Tensor, horizon: int, before: int) -> tuple[Tensor, int]:
    """What is left of the last chunk, in the places of a new one.

    LeRobot's engine cuts what is left to its `execution_horizon`, or fills it up with rows of zeros. Such rows at the
    end are no plan: they are not counted.

    Args:
        left_over: Normalised actions, `(T, action_dim)` or `(B, T, action_dim)`.
        horizon: Length of a chunk as the flow knows it.
        before: Its actions before the first one that is left.

    Returns:
        `(B, horizon, action_dim)`, with the first action before and the last after what is left; and the number of
        actions left, at most `horizon - before`.
    """
    rows = (left_over if left_over.ndim == 3 else left_over[None])[:, : horizon - before]
    planned = (rows != 0).any(dim=2).any(dim=0).nonzero()
    known = int(planned[-1]) + 1 if len(planned) else 0
    index = torch.arange(horizon, device=rows.device) - before
    return rows[:, index.clamp(0, max(known - 1, 0))] if known else rows.new_zeros(
        len(rows), horizon, rows.shape[2]
    ), known


def warm_start(noise: Tensor, planned: Tensor, t: float) -> Tensor:
    """Where the flow's straight path from noise to what was planned is at time t: (1 - t) noise + t planned."""
    return (1 - t) * noise + t * planned


def continued(
    config: "FlowMatchingConfig", x0: Tensor, v: Velocity, left_over: Tensor, delay: int
) -> tuple[Tensor, Velocity, float]:
    """Start, velocity and starting time of a chunk that goes on from what is left of the last one.

    Args:
        config: The policy's; LeRobot's engine has put its settings into it as `rtc_config`.
        x0: Noise, `(B, horizon, action_dim)`.
        v: The policy's velocity.
        left_over: As for `aligned`.
        delay: Actions of the last chunk that are executed while this one is computed.

    Raises:
        ValueError: If a `warm_start` finds no later step in the solver's grid to enter at.
    """
    settings = getattr(config, "rtc_config", None) or RTCConfig()
    # LeRobot's loop sends an observation's own action before its engine looks at what is left, so that this begins
    # with the second action of the new chunk, and one of the `delay` actions that it comes too late for is gone.
    before = config.n_obs_steps
    planned, known = aligned(left_over, config.horizon, before)
    end = min(settings.execution_horizon, known)
    if not settings.enabled or end < 1:
        return x0, v, 0.0
    if config.rtc_method == "warm_start":
        start = _entry(config)
        return warm_start(x0, planned, start), v, start
    weights = prefix_weights(delay - 1, end, config.horizon - before, settings.prefix_attention_schedule.value)
    largest = min(settings.max_guidance_weight, config.num_solver_steps)  # see `guided`
    direct = config.rtc_method == "direct"
    return x0, guided(v, planned, F.pad(weights, (before, 0)), largest, direct=direct), 0.0


def _entry(config: "FlowMatchingConfig") -> float:
    """The time of the solver's grid at which a warm start enters it."""
    grid = config.num_solver_steps
    if config.nfe is None or grid < 2:
        raise ValueError(
            f"rtc_method='warm_start' enters a grid at a later step, and {config.solver!r} in {grid} has none: "
            "choose a fixed grid of at least 2 steps, or another rtc_method"
        )
    return min(max(1, round(config.rtc_warm_start * grid)), grid - 1) / grid
