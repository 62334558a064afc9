"""The head: eq. (7) in both layouts, near the identity at its start, its system, gradients, storage, refusals."""

import copy

import numpy as np
import pytest
import torch

from fm_policy.flow.solvers import integrate
from fm_policy.residual.control_synth import LAYOUTS, ControlSynth
from fm_policy.residual.matrices import PARAMETRISATIONS
from fm_policy.residual.unet import ResidualUnet

ALL = ("tanh", "leaky_relu", "prelu")
FUNCTIONS = {"tanh": lambda y, leak: np.tanh(y), "leaky_relu": lambda y, leak: np.where(y > 0, y, 0.1 * y)}
FUNCTIONS["prelu"] = lambda y, leak: np.where(y > 0, y, leak * y)

each_kind = pytest.mark.parametrize(
    ("layout", "mode"), [(layout, mode) for layout in LAYOUTS for mode in PARAMETRISATIONS]
)


@each_kind
def test_the_field_is_equation_7(make, layout, mode):
    """Written out with numpy, unit for unit: A0 x + sum_j A_j f_j(W_j x + b_j) + g, state by state."""
    head = make.head(std=0.7, layout=layout, mode=mode, activations=ALL)
    x, o = make.normal(2, make.HORIZON, make.ACTION_DIM), make.normal(2, make.OBS_DIM, seed=1)
    with torch.no_grad():
        got = head(1.1, x, o).numpy()
        bias = (head.bias + head.input_bias(o).unsqueeze(1)).numpy()
        g = head.drive(o).numpy().reshape(2, -1, head.n)
    system = head.system()
    states = x.numpy().reshape(2, -1, head.n)
    assert states.shape[1] == (make.HORIZON if layout == "shared" else 1)
    expected = np.empty_like(states)
    for row in range(2):
        for s, state in enumerate(states[row]):
            expected[row, s] = system.a0 @ state + g[row, s]
            for j, name in enumerate(ALL):
                b = bias[row, s, 6 * j : 6 * (j + 1)]
                leak = system.alpha[j]
                expected[row, s] += system.a[j] @ FUNCTIONS[name](system.w[j] @ state + b, leak)
    np.testing.assert_allclose(got, expected.reshape(got.shape), rtol=1e-12)


@each_kind
def test_an_untrained_head_is_nearly_the_identity(make, layout, mode):
    head = make.head(layout=layout, mode=mode, width=64).float()
    x = 2 * torch.rand(64, make.HORIZON, make.ACTION_DIM) - 1
    with torch.no_grad():
        moved = integrate(head.bind(torch.randn(64, make.OBS_DIM)), x, "euler", 4, start=1.0, end=1.25)
    assert 0 < (moved - x).abs().max() < 1e-2


def test_a_bound_head_is_the_head_and_sees_the_input_once(make):
    head = make.head(std=0.5)
    calls = []
    head.drive.register_forward_hook(lambda *_: calls.append(1))
    o, x = make.normal(3, make.OBS_DIM), make.normal(3, make.HORIZON, make.ACTION_DIM)
    v = head.bind(o)
    integrate(v, x, "rk4", 4, start=1.0, end=1.25)
    assert len(calls) == 1
    torch.testing.assert_close(v(1.0, x), head(torch.full((3,), 1.2), x, o), rtol=0, atol=0)


def test_in_the_shared_layout_time_steps_do_not_meet(make):
    """So what is certified of one action holds for the chunk."""
    head = make.head(std=0.5, layout="shared")
    jacobian = _jacobian(head, make.normal(1, make.HORIZON, make.ACTION_DIM), make.normal(1, make.OBS_DIM))
    for step in range(make.HORIZON):
        jacobian[step, :, step] = 0
    assert jacobian.abs().max() == 0
    whole = make.head(std=0.5, layout="chunk")
    jacobian = _jacobian(whole, make.normal(1, make.HORIZON, make.ACTION_DIM), make.normal(1, make.OBS_DIM))
    assert (jacobian.abs() > 1e-9).all()


@pytest.mark.parametrize("mode", list(PARAMETRISATIONS))
def test_the_system_and_the_velocity_at_zero_give_the_field(make, mode):
    """System + biases + input: v(x) - v(0) = A0 x + sum_j A_j (f_j(W_j x + b_j) - f_j(b_j))."""
    head = make.head(std=0.8, mode=mode, activations=("tanh",))
    o, x = make.normal(1, make.OBS_DIM), make.normal(1, make.HORIZON, make.ACTION_DIM)
    with torch.no_grad():
        v = head.bind(o)
        change = (v(1.0, x) - v(1.0, torch.zeros_like(x)))[0].numpy()
        bias = (head.bias + head.input_bias(o)).numpy()
    system = head.system()
    units = np.tanh(x[0].numpy() @ system.stacked_w.T + bias) - np.tanh(bias)
    np.testing.assert_allclose(change, x[0].numpy() @ system.a0.T + units @ system.stacked_a.T, rtol=1e-10)


def test_the_system_is_that_of_the_deployed_weights(make):
    """In double precision, from single-precision weights that stay as they are."""
    head = make.head(std=0.5, activations=ALL).float()
    before = copy.deepcopy(head.state_dict())
    system = head.system()
    assert all(tensor.dtype == torch.float32 for tensor in head.state_dict().values())
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())
    a0, a, w, alpha, beta = head.matrices()
    np.testing.assert_allclose(system.a0, a0.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip((system.a, system.w, system.alpha, system.beta), (a, w, alpha, beta), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other.detach(), rtol=1e-5, atol=1e-6)
    assert system.alpha[1][0] == 0.1


@each_kind
def test_every_parameter_learns(make, layout, mode):
    head = make.head(std=0.5, layout=layout, mode=mode, activations=ALL)
    o, x = make.normal(8, make.OBS_DIM), make.normal(8, make.HORIZON, make.ACTION_DIM)
    integrate(head.bind(o), x, "euler", 4, start=1.0, end=1.25, checkpoint=True).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("mode", list(PARAMETRISATIONS))
def test_a_few_steps_of_descent_reach_a_target(make, mode):
    """From its start, where half of the weights are zero, the head learns a shift that depends on o and x."""
    head = make.head(mode=mode, width=16)
    o, x = make.normal(64, make.OBS_DIM), make.normal(64, make.HORIZON, make.ACTION_DIM, seed=1)
    target = 0.9 * x + 0.2 * o[:, :1, None].tanh() - 0.05 * x.tanh()
    optimiser = torch.optim.Adam(head.parameters(), lr=0.02)

    def error() -> torch.Tensor:
        return (integrate(head.bind(o), x, "euler", 4, start=1.0, end=1.25) - target).square().mean()

    before = error().item()
    for _ in range(100):
        optimiser.zero_grad()
        error().backward()
        optimiser.step()
    assert error().item() < before / 30


@each_kind
def test_weights_survive_storage(make, layout, mode):
    head, other = (make.head(std=0.5, seed=seed, layout=layout, mode=mode, activations=ALL) for seed in (0, 1))
    o, x = make.normal(2, make.OBS_DIM), make.normal(2, make.HORIZON, make.ACTION_DIM)
    assert not torch.equal(head(1.0, x, o), other(1.0, x, o))
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(1.0, x, o), other(1.0, x, o))


def test_a_head_is_small():
    """Two actions, Push-T's 18 observation numbers, the default widths: a small fraction of the 4.2 M of its U-Net."""
    assert sum(p.numel() for p in ControlSynth(2, 18, 16).parameters()) < 20_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "flat"}, r"layout must be one of \['shared', 'chunk'\], got 'flat'"),
        ({"mode": "stable"}, "mode must be one of .*'constructed'.*got 'stable'"),
        ({"activations": ()}, "at least one nonlinearity, got none"),
        ({"activations": ("relu",)}, "got 'relu'"),
        ({"width": 0}, "at least 1 unit, got 0"),
        ({"input_width": 0}, "input_width must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive and finite, got 0.0"),
        ({"rate": float("nan")}, "rate must be positive and finite, got nan"),
    ],
)
def test_a_bad_head_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make.head(**changes)


def test_inputs_of_another_shape_are_refused(make):
    head = make.head()
    with pytest.raises(ValueError, match=r"observation features \(B, 5\), got \(2, 6\)"):
        head.bind(make.normal(2, 6))
    with pytest.raises(ValueError, match=r"chunks \(B, \*\(4, 3\)\), got \(2, 8, 3\)"):
        head.bind(make.normal(2, 5))(1.0, make.normal(2, 8, 3))


def test_the_unet_head_starts_as_the_zero_field_and_learns():
    torch.manual_seed(0)
    head = ResidualUnet(3, 5, (8, 16), kernel_size=3, n_groups=4, time_embed_dim=8)
    x, o = torch.randn(2, 4, 3), torch.randn(2, 5)
    v = head(1.25, x, o)
    assert v.shape == x.shape and v.abs().max() == 0
    (v - 1).square().sum().backward()
    assert head.out[-1].weight.grad.abs().max() > 0
    with torch.no_grad():
        head.out[-1].weight.normal_()
        assert not torch.allclose(head(1.0, x, o), head(1.25, x, o))  # it can tell the times of the head apart


def _jacobian(head: ControlSynth, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """d v / d x of one chunk, `(horizon, action_dim, horizon, action_dim)`."""
    v = head.bind(o)
    return torch.func.jacrev(lambda chunk: v(1.0, chunk[None])[0])(x[0]).detach()
