"""Stage residual: a head behind the flow, and a base that stays as it is unless told otherwise."""

import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from torch import Tensor, nn

from fm_policy.likelihood import VARIANCE_LR
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.residual.control_synth import LAYOUTS
from fm_policy.residual.matrices import PARAMETRISATIONS

SYNTHS = {
    f"{mode}-{layout}": {"head": "control_synth", "head_mode": mode, "head_layout": layout}
    for mode in PARAMETRISATIONS
    for layout in LAYOUTS
}
HEADS = SYNTHS | {"unet": {"head": "unet"}}
# At this rate of learning, the `row` penalty of 48 rows is thrown off by the first steps.
HEADS["penalty-chunk"]["head_penalty"] = "certificate"
RATE, SPAN = 0.02, 0.25  # the configuration's own
# Without a window store, all that counts of a data set's description is that it is there: it makes the frozen base.
DATA_SET = SimpleNamespace()
PARTS = ("encoder", "velocity")


def each_head() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("head", HEADS)


def jolt(module: nn.Module, scale: float, seed: int = 0) -> None:
    """Move every parameter: what is new is zero in places, where gradients are zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def start(tiny, folder: Path, **changes) -> FlowMatchingPolicy:
    """A residual policy as training loads it from its base, or from its own checkpoint."""
    torch.manual_seed(0)
    config = tiny.config(**{"stage": "residual", "num_solver_steps": 2, **changes})
    return FlowMatchingPolicy.from_pretrained(folder, config=config, dataset_meta=DATA_SET)


def fit(policy: FlowMatchingPolicy, batch: dict[str, Tensor], steps: int) -> list[float]:
    """Losses of so many steps on one batch and one draw of noise, by a rate of 1e-3 for the head."""
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    losses = []
    for _ in range(steps):
        policy.training_steps.zero_()  # a step's noise is a function of seed and step
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.update()
        losses.append(loss.item())
    return losses


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def weights(policy: FlowMatchingPolicy, *roles: str, parts: tuple[str, ...] = PARTS) -> dict[str, Tensor]:
    """Copies of the weights of these parts in each role, `net`, `ema_net` or `base_net`."""
    chosen = tuple(f"{role}.{part}." for role in roles for part in parts)
    return {name: value.clone() for name, value in policy.state_dict().items() if name.startswith(chosen)}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def average(folder: Path) -> dict[str, Tensor]:
    """The averaged encoder and velocity of a checkpoint."""
    return renamed(weights(FlowMatchingPolicy.from_pretrained(folder), "ema_net"), "ema_net")


def renamed(chosen: dict[str, Tensor], role: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{role}."): value for name, value in chosen.items()}


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """A pre-trained policy whose weights are far from their average."""
    policy = tiny.policy(num_solver_steps=2)
    jolt(policy.net, 0.1)
    policy.save_pretrained(folder := tmp_path_factory.mktemp("base"))
    return folder


@pytest.fixture(scope="module")
def tuned(tiny, base, tmp_path_factory) -> Path:
    """The same after stage `finetune`; it holds its own base besides."""
    policy = start(tiny, base, stage="finetune")
    jolt(policy.ema_net, 0.1)
    policy.save_pretrained(folder := tmp_path_factory.mktemp("tuned"))
    return folder


@pytest.fixture(scope="module")
def trained(tiny, base) -> Callable[[str], SimpleNamespace]:
    """A head after 30 steps on one batch, once for each: `policy`, `batch`, `losses` and the first `weights`."""

    @cache
    def train(head: str) -> SimpleNamespace:
        policy = start(tiny, base, **HEADS[head])
        batch, before = tiny.windows(policy.config), policy.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        losses = fit(policy, batch, 30)
        return SimpleNamespace(policy=policy.eval(), batch=batch, losses=losses, weights=before)

    return train


# ---------------------------------------------------------------- the head


@each_head()
def test_a_fresh_head_leaves_the_chunks_of_its_base_nearly_as_they_are(head, tiny, base):
    policy = start(tiny, base, **HEADS[head])
    frame, noise = tiny.frame(policy.config), normal(4, 16, 3).clamp(-2, 2)  # as large as the chunks of a trained base
    before = FlowMatchingPolicy.from_pretrained(base).predict_action_chunk(frame, noise=noise)
    shift = (policy.predict_action_chunk(frame, noise=noise) - before).abs().max()
    if head == "unet":
        assert shift == 0
    else:
        assert 0 < shift < 0.02


@each_head()
def test_thirty_steps_lower_the_loss(head, trained):
    losses = trained(head).losses
    assert losses[-1] < 0.95 * losses[0]


@each_head()
def test_the_base_does_not_move_and_the_head_does(head, trained):
    policy, before = trained(head).policy, trained(head).weights
    after = policy.state_dict()
    heads = [name for name in after if ".head." in name]
    assert {name.split(".head.")[0] for name in heads} == {"net", "ema_net"}
    assert any(not torch.equal(after[name], before[name]) for name in heads)
    assert_equal(*({name: w for name, w in state.items() if ".encoder." in name} for state in (after, before)))
    assert_equal(*({name: w for name, w in state.items() if ".velocity." in name} for state in (after, before)))
    assert (after["training_steps"], after["ema_updates"]) == (1, 30)


@each_head()
def test_only_the_head_gets_a_gradient(head, tiny, trained):
    policy = copy.deepcopy(trained(head).policy).train()
    policy.zero_grad()
    policy.forward(trained(head).batch)[0].backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.named_parameters() if name.startswith("net.head.")
    }
    assert all(p.grad.abs().sum() > 0 for p in policy.net.head.parameters())
    assert policy.get_optim_params() == list(policy.net.head.parameters())


def test_the_base_is_trained_along_at_its_own_rate(tiny, base):
    policy = start(tiny, base, head="control_synth", train_base=True, variance="learned", head_lr=3e-3, cfm_weight=0.1)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, policy.config.finetune_lr, VARIANCE_LR]
    groups = [set(map(id, group["params"])) for group in optimizer.param_groups]
    flow = [p for part in PARTS for p in getattr(policy.net, part).parameters()]
    assert groups == [set(map(id, own)) for own in (policy.net.head.parameters(), flow, [policy.log_variance])]

    before = weights(policy, "net", "base_net")
    fit(policy, tiny.windows(policy.config), 3)
    assert_equal(weights(policy, "base_net"), {n: w for n, w in before.items() if n.startswith("base_net")})
    moved = [(w - before[name]).abs().max() for name, w in weights(policy, "net").items()]
    # No step of Adam is much larger than its rate; that of weight decay is smaller by far.
    assert 0 < max(moved) < 3 * 1.1 * policy.config.finetune_lr
    assert sum(m > 0 for m in moved) > 0.9 * len(moved)


def test_an_encoder_of_images_is_trained_along_or_left_alone(tiny, tmp_path):
    sees = {"input_features": {**tiny.VECTORS, **tiny.CAMERAS}, "crop_shape": (28, 28)}
    tiny.policy(**sees).save_pretrained(tmp_path)
    for changes, encoder_moves in (({}, False), ({"train_base": True}, True)):
        policy = start(tiny, tmp_path, head="control_synth", **sees, **changes)
        before, batch = weights(policy, "net", parts=("encoder",)), tiny.windows(policy.config, size=2)
        fit(policy, batch, 1)
        after = weights(policy, "net", parts=("encoder",))
        assert all(torch.equal(after[name], w) for name, w in before.items()) == (not encoder_moves)
        # An encoder that is not trained crops in the middle, as the deployed one.
        chunks = [policy.train().reconstruct(batch, normal(2, 16, 3)) for _ in range(2)]
        assert torch.equal(*chunks) == (not encoder_moves)


# ---------------------------------------------------------------- its loss


@pytest.mark.parametrize(("penalty", "rows"), [("linear", 3), ("row", 3), ("certificate", 1)])
def test_the_penalty_is_logged_and_pulls_at_a0(penalty, rows, tiny, base):
    """At A0 = -rate I and A_j = 0, each violated row, or the one worst direction, wants a smaller trace of A0."""
    margin, gradients = 1.0, []
    for weight in (0.0, 0.5):
        penalised = {"head_mode": "penalty", "head_penalty": penalty, "head_penalty_margin": margin}
        policy = start(tiny, base, head="control_synth", **penalised, head_penalty_weight=weight).train()
        loss, logs = policy.forward(tiny.windows(policy.config))
        assert logs["head_penalty"] == pytest.approx(rows * (margin - RATE), abs=1e-4)
        assert loss.item() == pytest.approx(logs["reconstruction_error"] + weight * logs["head_penalty"], rel=1e-5)
        gradients.append(torch.autograd.grad(loss, policy.net.head.parts.a0)[0])
    assert (gradients[1] - gradients[0]).trace().item() == pytest.approx(0.5 * rows, abs=1e-5)
    batch = tiny.windows(policy.config)
    per_sample, _ = policy.eval().forward(batch, reduction="none")
    torch.testing.assert_close(per_sample.mean(), policy.forward(batch)[0])


def test_other_modes_have_no_penalty(tiny, base):
    for mode in ("constructed", "free"):
        policy = start(tiny, base, head="control_synth", head_mode=mode, head_penalty_margin=1.0).train()
        loss, logs = policy.forward(tiny.windows(policy.config))
        assert "head_penalty" not in logs
        assert loss.item() == pytest.approx(logs["reconstruction_error"], rel=1e-6)


def scaling(tiny, base: Path, factor: float, **changes) -> FlowMatchingPolicy:
    """A head of one Euler step that multiplies every chunk by a factor."""
    alone = {"head": "control_synth", "head_mode": "free", "head_steps": 1}
    policy = start(tiny, base, **alone, **changes)
    for net in (policy.net, policy.ema_net):
        net.head.parts.a0.data = (factor - 1) / SPAN * torch.eye(3)
    return policy


def test_nearest_noise_is_that_of_the_chunk_behind_the_head(tiny, base):
    """Behind a head that turns chunks over, the noise whose flow ends nearest to the data is the worst choice."""
    policy = scaling(tiny, base, -1.0, coupling="nearest", nearest_k=8).train()
    batch = tiny.windows(policy.config, size=16)
    errors = {}
    for coupling in ("nearest", "independent"):
        policy.config.coupling = coupling
        errors[coupling] = policy.forward(batch)[1]["reconstruction_error"]
    assert errors["nearest"] < 0.9 * errors["independent"]


GRADIENTS = {
    "constructed": {**SYNTHS["constructed-chunk"], "head_activations": ("tanh", "prelu")},
    "penalty": {**SYNTHS["penalty-shared"], "head_penalty_margin": 1.0},
    "unet": {**HEADS["unet"], "variance": "learned"},
    "base": {**SYNTHS["free-shared"], "train_base": True, "cfm_weight": 0.3, "checkpoint_solver": True},
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_gradient_equals_finite_differences(kind, tiny, base):
    """Central differences of the whole of `forward`, in double precision, along random directions."""
    policy = start(tiny, base, **GRADIENTS[kind]).double().train()
    jolt(policy.net.head, 0.1)
    batch = tiny.windows(policy.config)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    batch["action_is_pad"][0, 10:] = True
    groups = torch.optim.SGD(policy.get_optim_params(), lr=0.0).param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]

    def loss() -> Tensor:
        policy.training_steps.zero_()
        return policy.forward(batch)[0]

    gradient = torch.autograd.grad(loss(), parameters)
    generator, h = torch.Generator().manual_seed(2), 1e-5
    for _ in range(2):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        length = math.sqrt(sum(d.square().sum() for d in direction))
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item() / length
        ends = []
        with torch.no_grad():
            for step in (h, -2 * h, h):
                torch._foreach_add_(parameters, direction, alpha=step / length)
                ends.append(loss().item())
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-8)
        assert abs(along) > 1e-5  # a slope that could be missed


@pytest.mark.parametrize("head", ["constructed-shared", "unet"])
@pytest.mark.parametrize("train_base", [False, True])
def test_checkpointing_the_solver_changes_no_bit(head, train_base, tiny, base):
    results = []
    for checkpoint in (False, True):
        changes = {"checkpoint_solver": checkpoint, "train_base": train_base}
        policy = start(tiny, base, **HEADS[head], **changes).train()
        jolt(policy.net.head, 0.1)
        loss = policy.forward(tiny.windows(policy.config))[0]
        learning = [parameter for parameter in policy.net.parameters() if parameter.requires_grad]
        results.append([loss, *torch.autograd.grad(loss, learning)])
    assert len(results[0]) > 1
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


# ---------------------------------------------------------------- what is measured of it


@each_head()
def test_held_out_numbers_are_of_the_head_against_the_base_without_it(head, trained):
    policy, batch = trained(head).policy, trained(head).batch
    logs = policy.forward(batch)[1]
    assert {"reconstruction_error", "spread", "mode_changes"} <= logs.keys()
    assert ("certified_rate" in logs) == (head in SYNTHS)
    assert policy.base_net.head is None
    if head.startswith("constructed"):
        assert logs["certified_rate"] >= RATE - 1e-5
    means = copy.deepcopy(policy).train().forward(batch)[1]  # LeRobot shows what training steps log
    assert means["held_out_mode_changes"] == logs["mode_changes"]


def test_mode_changes_count_the_chunks_that_the_head_sends_elsewhere(tiny, tmp_path):
    """A new Transformer is the zero field: the chunks of the base are their noise, here of three numbers each."""
    noise = {"velocity_net": "transformer", "horizon": 1, "n_action_steps": 1}
    tiny.policy(**noise).save_pretrained(tmp_path)
    shares = {}
    for factor in (1.0, -0.5):
        policy = scaling(tiny, tmp_path, factor, **noise)
        shares[factor] = policy.forward(tiny.windows(policy.config, size=16))[1]["mode_changes"]
    assert shares[1.0] == 0
    assert shares[-0.5] > 0.2  # .36 of many


def test_the_deployed_chunks_of_one_observation_approach_each_other(tiny, trained):
    """By exp(-rate T_r) along the flow of a constructed head, and its Euler steps are short enough to keep it."""
    policy = trained("constructed-shared").policy
    bare = copy.deepcopy(policy)
    bare.ema_net.head = None
    frame = {name: value[:1].expand(32, -1) for name, value in tiny.frame(policy.config).items() if value is not None}
    noise = normal(32, 16, 3)
    before, after = (p.predict_action_chunk(frame, noise=noise) for p in (bare, policy))
    ratio = (after[1:] - after[:-1]).norm(dim=2) / (before[1:] - before[:-1]).norm(dim=2)
    assert ratio.max() < math.exp(-RATE * SPAN)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("head", ["constructed-shared", "free-chunk", "unet"])
def test_calls_of_the_net_and_of_the_head_are_counted_apart(head, steps, tiny, base):
    policy = start(tiny, base, **HEADS[head], solver="heun", head_steps=steps)
    net, calls = policy.ema_net, {"velocity": 0, "head": 0}

    def count(part: str) -> Callable[..., None]:
        def hook(*_) -> None:
            calls[part] += 1

        return hook

    net.velocity.register_forward_hook(count("velocity"))
    # A bound ControlSynth calls each of its nonlinearities once, and not itself.
    (net.head if head == "unet" else net.head.nonlinearities[0]).register_forward_hook(count("head"))
    policy.predict_action_chunk(tiny.frame(policy.config))
    assert calls == {"velocity": 4, "head": steps}
    assert policy.nfe == policy.config.nfe == 4
    assert policy.config.head_nfe == steps


def test_a_policy_without_a_head_calls_none(tiny):
    assert tiny.config().head_nfe == 0


# ---------------------------------------------------------------- its checkpoints


@pytest.mark.parametrize("head", ["constructed-shared", "free-chunk", "unet"])
def test_actions_are_bitwise_equal_after_save_and_load(head, tiny, trained, tmp_path):
    policy = trained(head).policy
    frame, noise = tiny.frame(policy.config), normal(4, 16, 3)
    expected = policy.predict_action_chunk(frame, noise=noise)
    for name, saved in {"whole": policy, "average": policy.ema_only()}.items():
        saved.save_pretrained(tmp_path / name)
        loaded = FlowMatchingPolicy.from_pretrained(tmp_path / name)
        assert loaded.config == saved.config
        assert not hasattr(loaded, "base_net")
        assert torch.equal(loaded.predict_action_chunk(frame, noise=noise), expected)
    assert {name.split(".")[0] for name in loaded.state_dict()} == {"net", "training_steps"}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_it_starts_from_the_average_of_either_stage(stage, tiny, base, tuned):
    folder = {"pretrain": base, "finetune": tuned}[stage]
    policy, expected = start(tiny, folder, head="control_synth"), average(folder)
    for role in ("net", "ema_net", "base_net"):
        assert_equal(renamed(weights(policy, role), role), expected)
    assert_equal(policy.net.head.state_dict(), policy.ema_net.head.state_dict())
    assert policy.training_steps == policy.ema_updates == 0


def test_another_grid_than_the_tuned_one_is_mentioned(tiny, tuned, caplog):
    start(tiny, tuned, head="unet", num_solver_steps=3)
    assert "fine-tuned through euler in 2 steps and now runs euler in 3 steps" in caplog.text


@pytest.mark.parametrize("head", ["constructed-shared", "unet"])
def test_a_residual_policy_goes_on_as_it_is(head, tiny, trained, tmp_path):
    policy = trained(head).policy
    policy.save_pretrained(tmp_path)
    again = start(tiny, tmp_path, **HEADS[head])
    assert_equal(again.state_dict(), policy.state_dict())
    assert again.ema_updates == 30


@pytest.mark.parametrize("head", ["constructed-shared", "unet"])
def test_averaged_weights_alone_are_trained_on(head, tiny, trained, tmp_path):
    policy = trained(head).policy
    policy.ema_only().save_pretrained(tmp_path)
    again = start(tiny, tmp_path, **HEADS[head])
    for role in ("net", "ema_net"):
        parts = (*PARTS, "head")
        expected = renamed(weights(policy, "ema_net", parts=parts), "ema_net")
        assert_equal(renamed(weights(again, role, parts=parts), role), expected)
    assert_equal(weights(again, "base_net", parts=("",)), weights(policy, "base_net", parts=("",)))
    assert again.ema_updates == 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_no_earlier_stage_goes_on_from_a_residual_policy(stage, tiny, trained, tmp_path):
    trained("unet").policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is of stage 'residual': stage '{stage}' goes on from"):
        start(tiny, tmp_path, stage=stage)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert (config.stage, config.head) == ("residual", "unet")


def test_a_head_of_another_shape_than_the_checkpoints_is_named(tiny, trained, tmp_path):
    trained("constructed-shared").policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wrong shape: ema_net\.head\.bias is \(16, 128\), .* makes it \(16, 64\)"):
        start(tiny, tmp_path, **HEADS["constructed-shared"], head_width=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_rate": 3.0}, "head_rate: 0.02 there, 3.0 asked for"),
        ({"head_activations": ("leaky_relu", "tanh")}, r"head_activations: \('tanh', 'leaky_relu'\) there, \('leaky"),
        ({"head_mode": "free"}, "head_mode: constructed there, free asked for"),
    ],
)
def test_a_head_goes_on_as_the_map_that_it_was(tiny, trained, tmp_path, monkeypatch, changes, message):
    """Weights of the same shapes would load, and be another map."""
    trained("constructed-shared").policy.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["lerobot-train", f"--policy.path={tmp_path}"])
    with pytest.raises(ValueError, match=f"(?s)keeps the shape of its base .*{message}"):
        start(tiny, tmp_path, **HEADS["constructed-shared"] | changes)


def test_another_grid_of_the_head_is_mentioned(tiny, trained, tmp_path, caplog):
    trained("constructed-shared").policy.save_pretrained(tmp_path)
    start(tiny, tmp_path, **HEADS["constructed-shared"], head_steps=2, head_span=0.5)
    assert "2 steps and a head of 4 steps to 1 + 0.25 and now runs" in caplog.text
    assert "a head of 2 steps to 1 + 0.5: another map" in caplog.text


def test_an_adaptive_solver_has_no_grid_for_a_head(tiny, base):
    with pytest.raises(ValueError, match="goes through a fixed grid, which solver='dopri5' has not"):
        start(tiny, base, head="unet", solver="dopri5")


def test_the_card_names_the_head(tiny, tmp_path):
    shown = {
        "constructed-shared": "| head | control_synth (constructed, shared), 4 Euler steps from t = 1 to 1.25 |",
        "unet": "| head | unet, 4 Euler steps from t = 1 to 1.25 |",
    }
    for head, row in shown.items():
        tiny.policy(stage="residual", **HEADS[head]).save_pretrained(tmp_path / head)
        assert row in (tmp_path / head / "README.md").read_text().splitlines()
    tiny.policy().save_pretrained(tmp_path)
    assert "head" not in (tmp_path / "README.md").read_text()


# ---------------------------------------------------------------- its configuration

RESIDUAL = {"stage": "residual", "head": "control_synth"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "residual"}, "stage 'residual' needs a head: 'control_synth' or 'unet', got head=None"),
        ({"head": "unet"}, "stage 'pretrain' has no head, got head='unet'"),
        ({"stage": "finetune", "head": "control_synth"}, "stage 'finetune' has no head, got head='control_synth'"),
        ({**RESIDUAL, "head": "mlp"}, "head must be one of .* got 'mlp'"),
        ({**RESIDUAL, "head_mode": "stable"}, r"head_mode must be one of \['free', 'penalty', .* got 'stable'"),
        ({**RESIDUAL, "head_layout": "flat"}, r"head_layout must be one of \['shared', 'chunk'\], got 'flat'"),
        ({**RESIDUAL, "head_penalty": "hinge"}, r"head_penalty must be one of \['linear', .* got 'hinge'"),
        ({**RESIDUAL, "head_activations": ("tanh", "gelu")}, r"head_activations must be some of .* \['tanh', 'gelu'\]"),
        ({**RESIDUAL, "head_activations": ()}, r"head_activations must be some of .* got \[\]"),
        ({**RESIDUAL, "head_width": 0}, "head_width must be at least 1, got 0"),
        ({**RESIDUAL, "head_steps": 0}, "head_steps must be at least 1, got 0"),
        ({**RESIDUAL, "head_rate": 0.0}, r"head_rate must be finite and positive, got 0\.0"),
        ({**RESIDUAL, "head_span": -1.0}, r"head_span must be finite and positive, got -1\.0"),
        ({**RESIDUAL, "head_penalty_weight": -0.1}, r"head_penalty_weight must be finite and 0 or more, got -0\.1"),
        ({**RESIDUAL, "head_penalty_margin": -0.1}, r"head_penalty_margin must be finite and 0 or more, got -0\.1"),
        ({**RESIDUAL, "head_lr": -1e-3}, r"head_lr must be finite and 0 or more, got -0\.001"),
        (
            {**RESIDUAL, "cfm_weight": 0.1},
            r"cfm_weight=0\.1 is a loss of the base, which train_base=False leaves alone",
        ),
    ],
)
def test_what_makes_no_head_is_refused_by_name(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)
