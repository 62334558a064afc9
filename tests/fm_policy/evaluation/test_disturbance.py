"""Disturbances through policies, and through heads whose matrices are known."""

import pytest
import torch
from torch import Tensor

from fm_policy.assets import default_policy
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.evaluation.disturbance import Pieces, certified_factor, responses, spreads
from fm_policy.evaluation.inference import shift_observation
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

SIZES = [0.01, 0.1, 1.0]
ROWS, HORIZON = 6, 16
H, STEPS = 0.25 / 4, 4  # of a head, as configured if not told otherwise
WINDOW = {"observation.state": 2, "observation.environment_state": 16}


def inputs(n_obs_steps: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Observations and noise for `ROWS` windows."""
    draw = torch.Generator().manual_seed(3)
    observation = {name: torch.rand(ROWS, n_obs_steps, size, generator=draw) * 2 - 1 for name, size in WINDOW.items()}
    return observation, torch.randn(ROWS, HORIZON, 2, generator=draw)


@pytest.fixture(scope="module")
def residual(make_checkpoint):
    """Makes policies with a head."""

    def make(**fields) -> FlowMatchingPolicy:
        return make_checkpoint(**({"stage": "residual", "head": "control_synth"} | fields)).policy

    return make


@pytest.fixture(scope="module")
def linear_head(residual):
    """Makes a policy whose head is dx/dt = A0 x + g(o)."""

    def make(a0: Tensor, **fields) -> FlowMatchingPolicy:
        policy = residual(head_mode="free", **fields)
        head = policy.active_net.head
        with torch.no_grad():
            head.parts.a0.copy_(a0)
            for a in head.parts.a:
                a.zero_()
            for parameter in head.drive.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        return policy

    return make


@pytest.mark.parametrize(
    "fields", [{}, {"stage": "residual", "head": "control_synth", "n_obs_steps": 2, "noise_scale": 0.5}]
)
def test_pieces_make_the_map_of_the_robot(make_checkpoint, fields):
    policy = make_checkpoint(**fields).policy
    steps = policy.config.n_obs_steps
    observation, x0 = inputs(steps)
    pieces = Pieces(policy)
    with torch.no_grad():
        o = pieces.features(observation)
        chunk = pieces.head(pieces.flow(x0, o), o)
    assert torch.equal(chunk[:, steps - 1 :], policy.predict_action_chunk(observation, noise=x0))


# ---------------------------------------------------------------- heads that are known


def test_factor_of_a_head_that_shrinks_evenly(linear_head):
    """Each of 4 Euler steps of -2 x leaves 1 - 2 h, which is what the certificate says."""
    policy = linear_head(-2 * torch.eye(2))
    expected = (1 - 2 * H) ** STEPS
    for change, size in zip(responses(policy, *inputs(), SIZES, 0)["flow"], SIZES, strict=True):
        assert change / size == pytest.approx(torch.full((ROWS,), expected), rel=1e-4)
    certified = certified_factor(policy)
    assert (certified["norm"], certified["head_steps"]) == ("rms", STEPS)
    assert certified["step_factor"] == pytest.approx(1 - 2 * H, rel=1e-5)
    assert certified["factor"] == pytest.approx(expected, rel=1e-5)
    assert certified["factor"] >= expected


def test_factor_of_a_head_is_that_of_its_matrix(linear_head):
    """A0 shrinks x and y differently: between the two, and the certificate names the worse."""
    fates = (1 + H * torch.tensor([-0.5, -6.0])) ** STEPS
    policy = linear_head(torch.diag(torch.tensor([-0.5, -6.0])))
    factors = responses(policy, *inputs(), [0.5], 0)["flow"][0] / 0.5
    # A disturbance has equal shares of both dimensions on average over its directions.
    assert factors.square().mean().item() == pytest.approx(fates.square().mean().item(), rel=0.35)  # 5 standard errors
    assert (factors < fates.max()).all() and (factors > fates.min()).all()
    assert certified_factor(policy)["factor"] == pytest.approx(fates.max().item(), rel=1e-5)


def test_rms_bound_of_a_sheared_head_holds_where_its_own_norm_proves_more_than_the_rms(linear_head):
    a0 = torch.tensor([[-1.0, 2.5], [0.0, -1.0]])  # its symmetric part has the eigenvalue +0.25: no proof with P = I
    policy = linear_head(a0, head_steps=40, head_span=8.0)
    certified = certified_factor(policy)
    euler = torch.linalg.matrix_power(torch.eye(2) + 8.0 / 40 * a0, 40)
    assert certified["norm"] == "P"
    assert torch.linalg.matrix_norm(euler, 2) <= certified["factor"] < 1
    assert (responses(policy, *inputs(), SIZES, 0)["flow"] <= certified["factor"] * torch.tensor([SIZES]).T).all()


def test_no_disturbance_exceeds_the_factor_that_is_certified(residual):
    policy = residual(head_rate=1.0, head_activations=("tanh", "prelu"), head_width=8)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.active_net.head.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=draw)
    certified = certified_factor(policy)["factor"]
    factors = responses(policy, *inputs(), SIZES, 0)["flow"] / torch.tensor([SIZES]).T
    assert factors.max() <= certified < 1


def test_nothing_is_certified_of_an_expanding_head_of_a_unet_and_of_no_head(linear_head, residual, checkpoint):
    assert certified_factor(linear_head(0.1 * torch.eye(2))) is None
    assert certified_factor(residual(head="unet")) is None
    assert certified_factor(checkpoint.policy) is None


def test_spread_shrinks_by_the_factor_of_the_head(linear_head):
    observation, _ = inputs()
    noise = torch.randn(5, ROWS, HORIZON, 2, generator=torch.Generator().manual_seed(0))
    flow, chunk, changes = spreads(linear_head(-2 * torch.eye(2)), observation, noise)
    assert chunk / flow == pytest.approx(torch.full((ROWS,), (1 - 2 * H) ** STEPS), rel=1e-4)
    assert changes.shape == (5, ROWS)
    # A head that drives everything to one place leaves no spread.
    _, chunk, _ = spreads(linear_head(-1 / H * torch.eye(2)), observation, noise)
    assert chunk.max() < 1e-5


# ---------------------------------------------------------------- policies


def test_without_a_head_the_flows_chunk_is_the_chunk(checkpoint):
    observation, x0 = inputs()
    changes = responses(checkpoint.policy, observation, x0, SIZES, 0)["flow"]
    assert changes == pytest.approx(torch.tensor([SIZES]).T.expand(-1, ROWS), rel=1e-3)
    flow, chunk, changed = spreads(
        checkpoint.policy, observation, x0.repeat(3, 1, 1, 1) + torch.arange(3).view(3, 1, 1, 1)
    )
    assert torch.equal(flow, chunk)
    assert not changed.any()


def test_no_disturbance_changes_nothing_and_a_disturbance_the_shipped_policy():
    policy = load_checkpoint(default_policy(), nfe=2).policy
    observation, x0 = inputs()
    for changes in responses(policy, observation, x0, [0.0, 0.1], 0).values():
        assert changes[0].tolist() == [0.0] * ROWS
        assert (changes[1] > 0).all()


def test_policies_get_the_same_disturbances(make_checkpoint, residual):
    """A fresh U-Net head is the zero field: the policy answers as without it, to the bit, and otherwise by chance."""
    observation, x0 = inputs()
    base, behind = make_checkpoint(), residual(head="unet")
    behind.active_net.velocity.load_state_dict(base.policy.active_net.velocity.state_dict())
    behind.active_net.encoder.load_state_dict(base.policy.active_net.encoder.state_dict())
    first, second, other = (
        responses(policy, observation, x0, SIZES, seed)
        for policy, seed in ((base.policy, 0), (behind, 0), (base.policy, 1))
    )
    for place, changes in first.items():
        assert torch.equal(changes, second[place])
    assert not torch.equal(first["noise"], other["noise"])


def test_shift_lands_on_the_features_in_their_order():
    observation, _ = inputs(2)
    shift = torch.arange(18.0).expand(ROWS, 2, 18)
    moved = shift_observation({**observation, "task": "push"}, WINDOW, shift)
    assert torch.equal(moved["observation.state"], observation["observation.state"] + torch.tensor([0.0, 1.0]))
    name = "observation.environment_state"
    assert torch.equal(moved[name], observation[name] + torch.arange(2.0, 18.0))
    assert moved["task"] == "push"


def test_images_are_refused(make_checkpoint):
    policy = make_checkpoint(sees="observation.image", use_ema=False).policy
    with pytest.raises(ValueError, match=r"only.*numbers.*\['observation\.image'\]"):
        responses(policy, {}, torch.zeros(1, HORIZON, 2), SIZES, 0)
