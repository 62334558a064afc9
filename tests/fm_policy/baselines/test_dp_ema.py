"""LeRobot's diffusion policy as a baseline: what it adds, and that it is otherwise LeRobot's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from safetensors.torch import load_file, save_file

from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.baselines.modeling_dp_ema import DiffusionEmaPolicy
from fm_policy.ema import ema_decay
from fm_policy.window_store import WindowStoreStep

INPUTS = {
    "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    "observation.environment_state": PolicyFeature(FeatureType.ENV, (16,)),
}
OUTPUTS = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
SMALL = {"down_dims": (16, 32), "n_groups": 4, "diffusion_step_embed_dim": 16, "num_train_timesteps": 20}


def config(**changes) -> DiffusionEmaConfig:
    return DiffusionEmaConfig(input_features=INPUTS, output_features=OUTPUTS, device="cpu", **SMALL | changes)


def policy(**changes) -> DiffusionEmaPolicy:
    torch.manual_seed(0)
    return DiffusionEmaPolicy(config(**changes))


def windows(size: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    batch = {name: torch.rand(size, 1, *ft.shape, generator=draw) * 2 - 1 for name, ft in INPUTS.items()}
    action = torch.rand(size, 16, 2, generator=draw) * 2 - 1
    return batch | {"action": action, "action_is_pad": torch.zeros(size, 16, dtype=torch.bool)}


@pytest.mark.parametrize("fields", [{"ema_power": 0.0}, {"ema_power": -1.0}, {"ema_max_decay": 1.5}])
def test_what_is_no_average_is_refused(fields):
    with pytest.raises(ValueError, match="ema_max_decay must be in .* and ema_power positive and finite"):
        DiffusionEmaConfig(**fields)


def test_a_file_without_the_average_is_refused(tmp_path):
    """By LeRobot's own loading, too, which is lenient: the policy would act by random weights."""
    policy().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    live = {name: value for name, value in weights.items() if not name.startswith("ema_diffusion.")}
    save_file(live, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="Missing key.*ema_diffusion"):
        DiffusionEmaPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(("kind", "steps"), [("DDPM", 20), ("DDPM", 7), ("DDIM", 20), ("DDIM", 8)])
def test_chunks_are_lerobots_for_the_same_noise(kind, steps):
    """Diffusers' own scheduler draws what ours is handed."""
    ours = policy(noise_scheduler_type=kind, num_inference_steps=steps).eval()
    theirs = DiffusionModel(ours.config).eval()
    theirs.load_state_dict(ours.ema_diffusion.state_dict())
    draw = torch.Generator().manual_seed(5)
    draws = [torch.randn(3, 16, 2, generator=draw) for _ in range(steps)]
    noise = torch.stack(draws, dim=1) if kind == "DDPM" else draws[0]
    assert noise.shape[1:] == ours.config.noise_shape
    again = torch.Generator().manual_seed(5)
    start = torch.randn(3, 16, 2, generator=again)
    o = torch.randn(3, 18, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        chunk = ours.diffusion.conditional_sample(3, o, noise=noise)
        expected = theirs.conditional_sample(3, o, generator=again, noise=start)
    assert chunk.abs().max() <= 1
    torch.testing.assert_close(chunk, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_its_noise_is_scaled_like_ours(kind):
    steps = {"noise_scheduler_type": kind, "num_inference_steps": 4}
    noise = torch.randn(3, 4, 16, 2) if kind == "DDPM" else torch.randn(3, 16, 2)
    chunk = policy(**steps, noise_scale=0.5).eval().predict_action_chunk(windows(3), noise=noise)
    assert torch.equal(chunk, policy(**steps).eval().predict_action_chunk(windows(3), noise=0.5 * noise))
    with pytest.raises(ValueError, match="noise_scale must be finite and 0 or more, got -1"):
        config(noise_scale=-1.0)


def test_every_reverse_step_of_ddpm_but_the_last_adds_noise_of_its_own():
    ours = policy(num_inference_steps=4).eval()
    noise, batch = torch.randn(1, 4, 16, 2), {name: windows(1)[name] for name in INPUTS}
    chunk = ours.predict_action_chunk(batch, noise=noise)
    assert torch.equal(ours.predict_action_chunk(batch, noise=noise.clone()), chunk)
    for step in range(4):
        other = noise.clone()
        other[:, step] += 0.1
        assert not torch.equal(ours.predict_action_chunk(batch, noise=other), chunk)
    with pytest.raises(ValueError, match=r"noise must have the shape \(1, 4, 16, 2\), got \(1, 16, 2\)"):
        ours.predict_action_chunk(batch, noise=noise[:, 0])


def test_noise_disturbs_what_is_observed_in_training_alone_and_by_its_size(monkeypatch):
    seen = []
    monkeypatch.setattr(DiffusionModel, "compute_loss", lambda _, batch: seen.append(batch) or torch.zeros(()))
    ours, batch = policy(observation_noise=0.1), windows(2000)
    ours.train().forward(batch)
    ours.eval().forward(batch)
    noisy, clean = seen
    for name in INPUTS:
        assert (noisy[name] - batch[name]).std() == pytest.approx(0.1, rel=0.05)
        assert torch.equal(clean[name], batch[name])
    assert torch.equal(noisy["action"], batch["action"])
    for size in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"observation_noise must be finite and 0 or more, got {size}"):
            config(observation_noise=size)


def test_the_average_follows_the_weights_and_speaks_in_evaluation_mode():
    ours = policy()
    kept = {name: value.clone() for name, value in ours.ema_diffusion.state_dict().items()}
    optimizer = torch.optim.SGD(ours.get_optim_params(), lr=0.1)
    for update in (1, 2, 3):
        ours.forward(windows())[0].backward()
        optimizer.step()
        ours.update()
        live, decay = ours.diffusion.state_dict(), ema_decay(update)
        kept = {name: torch.lerp(live[name], value, decay) for name, value in kept.items()}
    average = ours.ema_diffusion.state_dict()
    assert all(torch.allclose(average[name], value, atol=1e-6) for name, value in kept.items())
    assert any(not torch.equal(average[name], live[name]) for name in live)
    assert ours.eval().diffusion is ours.ema_diffusion
    assert ours.train().diffusion is not ours.ema_diffusion


def test_what_is_trained_does_not_depend_on_the_mode_and_leaves_the_average_out():
    ours = policy()
    trained = {id(parameter) for parameter in ours.eval().get_optim_params()}
    assert trained == {id(parameter) for parameter in ours.train().diffusion.parameters()}


def test_the_draws_of_a_step_depend_on_seed_and_step_alone():
    ours, batch = policy(), windows()
    torch.manual_seed(3)
    losses = [ours.forward(batch)[0].item() for _ in range(2)]
    torch.rand(5)  # whatever else is drawn
    ours.training_steps.fill_(1)
    assert ours.forward(batch)[0].item() == losses[1] != losses[0]
    torch.manual_seed(4)
    ours.training_steps.zero_()
    assert ours.forward(batch)[0].item() not in losses
    held_out = [ours.eval().forward(batch)[0].item() for _ in range(2)]
    assert held_out[0] == held_out[1]


def test_padding_is_no_part_of_the_loss():
    """With the weights of the last layer zero, every prediction is its bias: the loss is that of the frames alone."""
    ours, batch = policy(prediction_type="sample"), windows()
    last = ours.diffusion.unet.final_conv[-1]
    last.weight.data.zero_()
    batch["action_is_pad"][:, 10:] = True
    expected = (last.bias - batch["action"][:, :10]).square().mean()
    assert ours.forward(batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_kind_of_feature_is_normalised_and_windows_come_from_the_store():
    assert set(config().normalization_mapping) == {"VISUAL", "STATE", "ENV", "ACTION"}
    stored, plain = config(window_store=True), config(n_obs_steps=2, horizon=4, n_action_steps=2)
    assert stored.observation_delta_indices is stored.action_delta_indices is None
    assert (stored.observation_window, len(stored.action_window)) == ([0], 16)
    lerobot = DiffusionConfig(n_obs_steps=2, horizon=4, n_action_steps=2, down_dims=(16, 32), device="cpu")
    assert plain.observation_delta_indices == lerobot.observation_delta_indices
    assert plain.action_delta_indices == lerobot.action_delta_indices
    preprocessor, _ = make_pre_post_processors(stored, dataset_stats=None)
    assert isinstance(preprocessor.steps[0], WindowStoreStep)


def board(largest: float = 2.0, **stood) -> SimpleNamespace:
    """A data set's description, its numbers between 0 and `largest`, as LeRobot's trainer hands it in."""
    shapes = {name: ft.shape for name, ft in (INPUTS | OUTPUTS).items()}
    stats = {
        name: {"min": np.zeros(shape, np.float32), "max": np.full(shape, largest, np.float32)}
        for name, shape in shapes.items()
    }
    stats["observation.state"] |= {end: np.array(value, np.float32) for end, value in stood.items()}
    features = {name: {"dtype": "float32", "shape": shape, "names": None} for name, shape in shapes.items()}
    return SimpleNamespace(features=features, stats=stats, root="data/board", repo_id="local/board")


def test_a_training_goes_on_with_its_own_normalisation_alone(tmp_path):
    first = board()
    ours = make_policy(config(), ds_meta=first)
    ours.save_pretrained(tmp_path)
    for processor in make_pre_post_processors(ours.config, dataset_stats=first.stats):
        processor.save_pretrained(tmp_path)

    def go_on(data, **changes):
        read = PreTrainedConfig.from_pretrained(tmp_path)
        read.pretrained_path = tmp_path
        for name, value in changes.items():
            setattr(read, name, value)
        return make_policy(read, ds_meta=data)

    again = go_on(board()).state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())
    with pytest.raises(ValueError, match=r"data/board has other statistics than (?s:.*)action max: \[2.0, 2.0\] there"):
        go_on(board(largest=3.0))
    other = board(largest=3.0)
    go_on(other, keep_statistics=True)
    assert all((other.stats[name]["max"] == 2.0).all() for name in INPUTS | OUTPUTS)


def test_what_never_changed_gets_a_range(caplog):
    data = board(min=[0.3, 0.0], max=[0.3, 2.0])
    make_policy(config(), ds_meta=data)
    assert "nothing is learned from it: observation.state[0]" in caplog.text
    assert np.allclose(data.stats["observation.state"]["max"], [2.3, 2.0])


def test_lerobot_finds_the_policy_by_its_type_and_it_comes_back_from_disk(tmp_path):
    assert get_policy_class("dp_ema") is DiffusionEmaPolicy
    ours = policy()
    ours.update()
    ours.save_pretrained(tmp_path)
    again = DiffusionEmaPolicy.from_pretrained(tmp_path, strict=True)
    assert again.config.type == "dp_ema" and not again.training
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("solver", "nfe", "expected"),
    [(None, None, ("ddpm", 20, (20, 16, 2))), ("ddim", 8, ("ddim", 8, (16, 2))), (None, 5, ("ddpm", 5, (5, 16, 2)))],
)
def test_solver_and_calls_are_chosen(solver, nfe, expected):
    chosen = config()
    chosen.set_solver(solver, nfe)
    assert (chosen.solver, chosen.nfe, chosen.noise_shape) == expected


@pytest.mark.parametrize(
    ("solver", "nfe", "message"),
    [("euler", None, "'euler' of a diffusion policy"), ("ddim", 0, "from 1 to 20, got 0"), (None, 21, "got 21")],
)
def test_solvers_that_cannot_be_had_are_refused(solver, nfe, message):
    with pytest.raises(ValueError, match=message):
        config().set_solver(solver, nfe)
