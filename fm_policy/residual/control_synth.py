"""The head as a ControlSynth ODE, eq. (7) of arXiv 2510.02081, whose stability can be certified."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fm_policy.flow.solvers import Velocity
from fm_policy.residual.matrices import PARAMETRISATIONS, Matrices
from fm_policy.residual.nonlinearities import make_nonlinearity
from fm_policy.residual.system import System
from fm_policy.velocity.interface import VelocityNet

LAYOUTS = ("shared", "chunk")


class ControlSynth(VelocityNet):
    """dx/dt = A0 x + sum_j A_j f_j(W_j x + b_j(o)) + g(o), eq. (7) with biases b_j that depend on the input too.

    The biases leave every certificate untouched: f_j(y + b_j) - f_j(b_j) has the slopes of f_j, and A_j f_j(b_j)
    counts as a part of g. The whole input of the certified system is thus the velocity at x = 0.

    The field does not depend on time. It starts near zero: |x| shrinks by e^(-rate T_r), and the rest is smaller.

    Args:
        action_dim: Numbers per action.
        obs_dim: Observation features.
        horizon: Actions per chunk.
        layout: `shared`: x is one action, and every time step of a chunk follows the same system under its own
            biases and g; n = action_dim. `chunk`: x is the flattened chunk; n = horizon * action_dim.
        mode: How the matrices are parametrised, one of `PARAMETRISATIONS`: `constructed` contracts at `rate`, always;
            `free` and `penalty` only start there.
        activations: The nonlinearities f_j, names of `NONLINEARITIES`.
        width: k_j, the units of each.
        rate: Rate of contraction, per unit of time.
        input_width: Width of the hidden layer between o and the biases, and between o and g.

    Raises:
        ValueError: If a name is unknown, a size below 1, there is no nonlinearity, or the rate is not positive.
    """

    def __init__(
        self,
        action_dim: int,
        obs_dim: int,
        horizon: int,
        *,
        layout: str = "shared",
        mode: str = "constructed",
        activations: Sequence[str] = ("tanh", "leaky_relu"),
        width: int = 64,
        rate: float = 0.02,
        input_width: int = 64,
    ) -> None:
        super().__init__()
        _check_one_of("layout", layout, LAYOUTS)
        _check_one_of("mode", mode, tuple(PARAMETRISATIONS))
        sizes = {"action_dim": action_dim, "obs_dim": obs_dim, "horizon": horizon, "input_width": input_width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not activations:
            raise ValueError("activations needs at least one nonlinearity, got none")
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate must be positive and finite, got {rate}")

        self.obs_dim = obs_dim
        self.chunk_shape = (horizon, action_dim)
        self.states = horizon if layout == "shared" else 1
        self.n = horizon * action_dim // self.states
        self.nonlinearities = nn.ModuleList(make_nonlinearity(name, width) for name in activations)
        self.widths = [width] * len(activations)
        self.parts = PARAMETRISATIONS[mode](self.n, self.widths, rate)
        units = sum(self.widths)
        bound = self.n**-0.5  # as nn.Linear's biases, and alike for all time steps of a chunk
        self.bias = nn.Parameter(torch.empty(1, units).uniform_(-bound, bound).repeat(self.states, 1))
        self.input_bias = _mlp(obs_dim, input_width, units)
        self.drive = _mlp(obs_dim, input_width, self.states * self.n)
        for parameter in self.drive[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, t: float | Tensor, x: Tensor, o: Tensor) -> Tensor:
        """See `VelocityNet.forward`; t, from 1 to 1 + T_r, changes nothing."""
        return self.bind(o)(t, x)

    def bind(self, o: Tensor, times: Sequence[float] = ()) -> Velocity:
        """The velocity v(t, x) of these observations, `(B, obs_dim)`; what depends on o alone is computed here, once.

        Raises:
            ValueError: If o, or a chunk handed to v, has another shape than the head was made for.
        """
        if o.ndim != 2 or o.shape[1] != self.obs_dim:
            raise ValueError(f"the head expects observation features (B, {self.obs_dim}), got {tuple(o.shape)}")
        a0, a, w = self.parts()
        biases = (self.bias + self.input_bias(o).unsqueeze(1)).split(self.widths, dim=-1)  # (B, states, k_j)
        g = self.drive(o).view(-1, self.states, self.n)
        terms = list(zip(a, self.nonlinearities, w, biases, strict=True))

        def v(_t: float | Tensor, x: Tensor) -> Tensor:
            if x.shape[1:] != self.chunk_shape:
                raise ValueError(f"the head expects chunks (B, *{self.chunk_shape}), got {tuple(x.shape)}")
            state = x.reshape(-1, self.states, self.n)
            velocity = state @ a0.T + g
            for a_j, f_j, w_j, b_j in terms:
                velocity = velocity + f_j(state @ w_j.T + b_j) @ a_j.T
            return velocity.view(x.shape)

        return v

    def matrices(self) -> Matrices:
        """The matrices and slopes of the present weights, with gradients: what `stability` judges."""
        a0, a, w = self.parts()
        alpha, beta = zip(*(f.slopes(a0) for f in self.nonlinearities), strict=True)  # type: ignore[operator]
        return Matrices(a0, a, w, alpha, beta)

    @torch.no_grad()
    def system(self) -> System:
        """The system of the present weights, in double precision: rounding must not cost a construction its proof."""
        matrices = copy.deepcopy(self).double().matrices()
        a0, *parts = matrices
        return System(a0.numpy(force=True), *(tuple(tensor.numpy(force=True) for tensor in part) for part in parts))


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.Mish(), nn.Linear(width, outputs))


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
