"""Real-time chunking: the weights, the guidance and its gradient, and what they make of real chunks."""

import math

import pytest
import torch
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc import RTCConfig, RTCProcessor
from torch import Tensor

from env_configs.fm_sim.motors import make_env, readings
from fm_policy.assets import pretrained_policy
from fm_policy.deploy.as_motors import as_motors
from fm_policy.deploy.rtc import METHODS, SCHEDULES, aligned, guidance_weight, guided, prefix_weights, warm_start
from fm_policy.evaluation.checkpoint import load_checkpoint
from fm_policy.flow.solvers import integrate


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The weights


def test_the_weights_are_those_of_the_paper():
    """Eq. (5) with H = 8, d = 2, s = 3."""
    c = [(8 - 3 - i) / (8 - 3 - 2 + 1) for i in range(8)]
    between = [c[i] * (math.exp(c[i]) - 1) / (math.e - 1) for i in (2, 3, 4)]
    assert prefix_weights(2, 5, 8).tolist() == pytest.approx([1, 1, *between, 0, 0, 0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("delay", "end", "length"), [(0, 10, 16), (3, 10, 16), (12, 10, 16), (4, 4, 8), (2, 20, 16)])
def test_the_weights_are_lerobots(schedule, delay, end, length):
    theirs = RTCProcessor(RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[schedule]))
    wanted = theirs.get_prefix_weights(delay, min(end, length), length)
    torch.testing.assert_close(prefix_weights(delay, end, length, schedule), wanted)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="one of EXP, LINEAR, ONES, ZEROS, got 'exp'"):
        prefix_weights(0, 1, 2, "exp")


@pytest.mark.parametrize("t", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
def test_the_factor_is_that_of_the_paper_and_bounded(t):
    """Eqs. (2) and (4)."""
    squared = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
    wanted = 5.0 if t in (0, 1) else min(5.0, (1 - t) / (t * squared))
    assert guidance_weight(t, 5.0) == pytest.approx(wanted)
    assert guidance_weight(torch.tensor(t), 5.0) == pytest.approx(wanted, rel=1e-5)


# The guided velocity


def bent(t: float, x: Tensor) -> Tensor:
    """A velocity that mixes all actions of a chunk."""
    return torch.sin(2 * x.roll(1, dims=1) + t) - 0.5 * x * x.flip(2)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_the_correction_is_the_gradient_by_finite_differences(t):
    planned, x = normal(1, 4, 2, seed=1, dtype=torch.float64), normal(1, 4, 2, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    correction = (guided(bent, planned, weights, 3.0)(t, x) - bent(t, x)) / guidance_weight(t, 3.0)

    def misfit(x: Tensor) -> Tensor:
        return 0.5 * (weights[:, None] * (planned - x - (1 - t) * bent(t, x)) ** 2).sum()

    step = 1e-6
    wanted = torch.zeros_like(x)
    for index in range(x.numel()):
        nudge = torch.zeros_like(x).flatten()
        nudge[index] = step
        nudge = nudge.view_as(x)
        wanted.view(-1)[index] = -(misfit(x + nudge) - misfit(x - nudge)) / (2 * step)
    torch.testing.assert_close(correction, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_with_a_constant_velocity_it_is_lerobots_guidance_backwards(time, direct):
    """LeRobot's time runs from 1 to 0, and its velocity the other way; it leaves dv/dx out, which is 0 here."""
    planned, x, slope = normal(1, 12, 2, seed=1), normal(1, 12, 2), normal(1, 12, 2, seed=2)
    settings = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.EXP, max_guidance_weight=4.0)
    theirs = RTCProcessor(settings).denoise_step(
        x, planned[:, :8], inference_delay=3, time=time, original_denoise_step_partial=lambda _: -slope
    )
    ours = guided(lambda t, x: slope, planned, prefix_weights(3, 8, 12), 4.0, direct=direct)(1 - time, x)
    torch.testing.assert_close(ours, -theirs)


@pytest.mark.parametrize("direct", [False, True])
def test_without_weight_it_is_the_plain_velocity(direct):
    x = normal(1, 4, 2)
    field = guided(bent, normal(1, 4, 2, seed=1), torch.zeros(4), 5.0, direct=direct)
    assert torch.equal(field(0.5, x), bent(0.5, x))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("solver", "steps"), [("euler", 16), ("euler", 4), ("heun", 8), ("rk4", 4)])
def test_a_guided_flow_ends_at_what_was_planned(solver, steps, direct):
    """Of a field that can reach it, v = x, with as large a weight as the steps allow."""
    planned = normal(2, 6, 2, seed=3)
    field = guided(lambda t, x: x, planned, prefix_weights(3, 3, 6), float(steps), direct=direct)
    chunk = integrate(field, normal(2, 6, 2), solver, steps)
    plain = integrate(lambda t, x: x, normal(2, 6, 2), solver, steps)
    assert (chunk - planned)[:, :3].abs().max() < 0.15 * (plain - planned)[:, :3].abs().max()
    torch.testing.assert_close(chunk[:, 3:], plain[:, 3:])


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="not inference_mode"):
        guided(bent, torch.zeros(1, 4, 2), torch.ones(4), 1.0)(0.5, torch.zeros(1, 4, 2))


# Where the last chunk lies in a new one


def test_what_is_left_takes_its_places():
    left = torch.arange(1.0, 7.0).view(3, 2)
    planned, known = aligned(left, horizon=6, before=1)
    assert known == 3
    assert planned[0].tolist() == [[1, 2], [1, 2], [3, 4], [5, 6], [5, 6], [5, 6]]


def test_lerobots_padding_is_no_plan():
    left = torch.cat([torch.ones(2, 2), torch.zeros(3, 2)])
    assert aligned(left, horizon=8, before=0)[1] == 2
    assert aligned(torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]), horizon=8, before=0)[1] == 2
    planned, known = aligned(torch.zeros(5, 2), horizon=8, before=0)
    assert (known, planned.shape) == (0, (1, 8, 2))


def test_a_plan_longer_than_a_chunk_is_cut():
    assert aligned(torch.ones(20, 2), horizon=8, before=2)[1] == 6


def test_a_warm_start_lies_on_the_straight_path():
    noise, planned = normal(1, 4, 2), normal(1, 4, 2, seed=1)
    torch.testing.assert_close(warm_start(noise, planned, 0.25), noise + 0.25 * (planned - noise))


# The policy


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The pre-trained one: a tuned one is bound to its grid, and here several are asked for."""
    folder = tmp_path_factory.mktemp("pretrained") / "motors"
    as_motors(pretrained_policy(), folder)
    return load_checkpoint(folder)


@pytest.fixture
def policy(shipped):
    """The shipped policy, whose inference may be changed."""
    own = dict(vars(shipped.policy.config))
    yield shipped.policy
    vars(shipped.policy.config).clear()
    vars(shipped.policy.config).update(own)


@pytest.fixture(scope="module")
def moments(shipped):
    """Moments of Push-T: what is observed, and what is left of the chunk when the present action has been sent too."""
    env, found = make_env("pusht", False), []
    for seed in range(12):  # 4 of them leave the mean of `nearness` uncertain by a fifth
        seen = readings(*env.reset(seed=seed))
        for executed in (8, 8, 3):
            observed = shipped.preprocessor({"observation.state": torch.tensor(seen, dtype=torch.float32)})
            chunk = shipped.policy.predict_action_chunk(observed, normal(1, 16, 2, seed=seed + executed))[0]
            for action in chunk[:executed]:
                observation, *_, info = env.step(shipped.postprocessor(action[None])[0].numpy())
                seen = readings(observation, info)
        observed = shipped.preprocessor({"observation.state": torch.tensor(seen, dtype=torch.float32)})
        found.append((observed, chunk[executed + 1 :]))
    return found


def nearness(policy, moments, delay: int = 5) -> Tensor:
    """How much nearer to what is left a chunk is that goes on from it than one that stands alone: 0 at it, (12,)."""
    continued, alone = [], []
    for observed, left in moments:
        noise = normal(1, 16, 2, seed=99)
        with torch.enable_grad():  # as LeRobot's thread calls it
            chunk = policy.predict_action_chunk(observed, noise, inference_delay=delay, prev_chunk_left_over=left)
        assert chunk.shape == (1, 16, 2) and not chunk.requires_grad
        plain = policy.predict_action_chunk(observed, noise)
        continued.append((chunk[0, 1:13] - left).norm(dim=1))
        alone.append((plain[0, 1:13] - left).norm(dim=1))
    return torch.stack(continued).mean(dim=0) / torch.stack(alone).mean(dim=0)


@pytest.fixture
def settings(policy):
    """Sets LeRobot's settings of real-time chunking, as its engine does."""

    def choose(schedule: str = "EXP", **fields):
        policy.config.rtc_config = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[schedule], **fields)

    return choose


@pytest.mark.parametrize("method", METHODS)
def test_without_a_last_chunk_it_is_the_plain_chunk_bit_for_bit(policy, moments, method):
    policy.config.rtc_method, (observed, _), noise = method, moments[0], normal(1, 16, 2)
    plain = policy.predict_action_chunk(observed, noise)
    assert torch.equal(
        plain, policy.predict_action_chunk(observed, noise, inference_delay=4, prev_chunk_left_over=None)
    )
    for nothing in (torch.zeros(0, 2), torch.zeros(10, 2)):
        again = policy.predict_action_chunk(observed, noise, inference_delay=0, prev_chunk_left_over=nothing)
        assert torch.equal(plain, again)
    assert policy.supports_rtc()


def test_with_real_time_chunking_switched_off_it_is_the_plain_chunk(policy, moments, settings):
    settings(enabled=False)
    (observed, left), noise = moments[0], normal(1, 16, 2)
    chunk = policy.predict_action_chunk(observed, noise, inference_delay=2, prev_chunk_left_over=left)
    assert torch.equal(chunk, policy.predict_action_chunk(observed, noise))


def test_the_gradient_leads_to_what_is_left(policy, moments, settings):
    settings("ONES", max_guidance_weight=100.0, execution_horizon=12)
    policy.config.rtc_method = "gradient"
    assert nearness(policy, moments)[:4].mean() < 0.35
    assert policy.nfe == 16


@pytest.mark.parametrize("steps", [16, 4, 2])
def test_without_the_gradient_what_is_left_is_kept_to_with_any_number_of_steps(policy, moments, settings, steps):
    settings("ONES", max_guidance_weight=100.0, execution_horizon=12)
    policy.config.rtc_method, policy.config.num_solver_steps = "direct", steps
    assert nearness(policy, moments)[:4].mean() < 0.15


@pytest.mark.parametrize("method", ["gradient", "direct"])
def test_guidance_fades_along_the_chunk(policy, moments, settings, method):
    settings(execution_horizon=8)
    policy.config.rtc_method = method
    near = nearness(policy, moments, delay=4)
    assert near[:3].mean() < near[3:8].mean() < near[8:].mean()


def test_a_warm_start_stays_nearer_and_costs_fewer_calls(policy, moments):
    policy.config.rtc_method, policy.config.rtc_warm_start = "warm_start", 0.75
    observed, left = moments[0]
    policy.predict_action_chunk(observed, inference_delay=2, prev_chunk_left_over=left)
    assert policy.nfe == 4
    assert nearness(policy, moments)[:4].mean() < 0.9


@pytest.mark.parametrize(("solver", "steps"), [("euler", 1), ("dopri5", 16)])
def test_a_warm_start_without_a_later_step_is_refused(policy, moments, solver, steps):
    policy.config.rtc_method, policy.config.solver, policy.config.num_solver_steps = "warm_start", solver, steps
    observed, left = moments[0]
    with pytest.raises(ValueError, match=f"'{solver}' in {steps} has none: choose a fixed grid of at least 2 steps"):
        policy.predict_action_chunk(observed, inference_delay=2, prev_chunk_left_over=left)


@pytest.mark.parametrize(
    ("left", "delay", "words"),
    [
        (torch.ones(4, 3), 0, r"must be \(T, 2\), got \(4, 3\)"),
        (torch.ones(2, 4, 2), 0, r"must be \(T, 2\), got \(2, 4, 2\)"),
        (torch.full((4, 2), float("nan")), 0, "NaN or infinity"),
        (torch.ones(4, 2), -1, "0 or more steps, got -1"),
    ],
)
def test_a_misshapen_rest_is_refused(policy, moments, left, delay, words):
    with pytest.raises(ValueError, match=words):
        policy.predict_action_chunk(moments[0][0], inference_delay=delay, prev_chunk_left_over=left)


def test_a_history_keeps_its_places(tiny):
    """With two observations a chunk begins one action before the present; what is left begins one after it."""
    policy = tiny.policy(n_obs_steps=2, num_solver_steps=16, rtc_method="direct").eval()
    policy.config.rtc_config = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.ONES, max_guidance_weight=100.0)
    observed, left = tiny.frame(policy.config, size=1), normal(10, 3, seed=4)
    given = {"inference_delay": 11, "prev_chunk_left_over": left}
    chunk = policy.predict_action_chunk(observed, normal(1, 16, 3), **given)
    assert chunk.shape == (1, 15, 3)
    torch.testing.assert_close(chunk[0, 1:11], left, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"rtc_method": "inpainting"}, {"rtc_warm_start": 1.0}, {"rtc_warm_start": 0.0}],
)
def test_a_wrong_field_is_named_with_its_value(tiny, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        tiny.config(**wrong)
