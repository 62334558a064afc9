"""Checkpoints: there and back, refusals, the EMA-only form, and one that must load for ever."""

from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from safetensors.torch import load_file, save_file

from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

GOLDEN = Path(__file__).parent / "golden"


def trained(tiny, **changes) -> FlowMatchingPolicy:
    """A policy whose average differs from its weights."""
    policy = tiny.policy(**changes)
    for _ in range(3):
        for parameter in policy.get_optim_params():
            parameter.data += 0.1 * torch.randn_like(parameter)
        policy.update()
    return policy


def edit(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_lerobot_finds_the_classes_by_name(tiny):
    assert get_policy_class("fm_ft") is FlowMatchingPolicy
    assert FlowMatchingPolicy.name == "fm_ft"
    assert make_policy_config("fm_ft", device="cpu").type == "fm_ft"


@pytest.mark.parametrize("changes", [{}, {"velocity_net": "transformer"}, {"use_ema": False}])
def test_actions_are_bitwise_equal_after_save_and_load(tiny, tmp_path, changes):
    policy = trained(tiny, **changes)
    policy.save_pretrained(tmp_path)
    loaded = FlowMatchingPolicy.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config == policy.config
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in policy.state_dict().items())
    frame, noise = tiny.frame(policy.config), torch.randn(4, 16, 3)
    expected = policy.eval().predict_action_chunk(frame, noise=noise)
    assert torch.equal(loaded.predict_action_chunk(frame, noise=noise), expected)


def test_card_and_safetensors_and_nothing_pickled(tiny, tmp_path):
    tiny.policy(noise_scale=0.75).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    card = (tmp_path / "README.md").read_text()
    assert "library_name: lerobot" in card
    assert "euler, 4 network calls per chunk, noise scaled by 0.75" in card


def test_weights_that_do_not_fit_are_named(tiny, tmp_path):
    name = "net.velocity.out.1.bias"
    cases = {
        f"missing: {name}": lambda w: w.pop(name),
        "unexpected: net.velocity.head": lambda w: w.update({"net.velocity.head": torch.zeros(1)}),
        rf"wrong shape: {name} is \(7,\), the configuration makes it \(3,\)": lambda w: w.update(
            {name: torch.zeros(7)}
        ),
    }
    for i, (message, change) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        tiny.policy().save_pretrained(folder)
        edit(folder / "model.safetensors", change)
        with pytest.raises(ValueError, match=message):
            FlowMatchingPolicy.from_pretrained(folder)


def test_averaged_weights_alone(tiny, tmp_path):
    policy = trained(tiny).eval()
    policy.ema_only().save_pretrained(tmp_path)
    loaded = FlowMatchingPolicy.from_pretrained(tmp_path)
    assert loaded.config.use_ema is False
    frame, noise = tiny.frame(policy.config), torch.randn(4, 16, 3)
    expected = policy.predict_action_chunk(frame, noise=noise)
    assert torch.equal(loaded.predict_action_chunk(frame, noise=noise), expected)
    # Trained on with an average again, it starts from these weights.
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.use_ema = True
    resumed = FlowMatchingPolicy.from_pretrained(tmp_path, config=config)
    assert resumed.ema_updates == 0
    assert torch.equal(resumed.predict_action_chunk(frame, noise=noise), expected)


def test_unknown_fields_are_refused_by_name(tiny, tmp_path):
    tiny.policy().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"horizon"', '"horizont"'))
    with pytest.raises(Exception, match="horizont"):
        FlowMatchingPolicy.from_pretrained(tmp_path)


def statistics(config) -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    stats = {}
    for name, feature in {**config.input_features, **config.output_features}.items():
        low, high = -torch.rand(feature.shape), 1 + torch.rand(feature.shape)
        stats[name] = {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4}
    return stats


def test_processors_there_and_back(tiny, tmp_path):
    config = tiny.config(input_features={**tiny.VECTORS, **tiny.CAMERAS})
    stats = statistics(config)
    pre, post = make_fm_ft_pre_post_processors(config, stats)
    raw = {name: stats[name]["max"].expand(1, *ft.shape) for name, ft in config.input_features.items()}
    batch = pre({**raw, "action": stats["action"]["min"].expand(1, 3)})
    assert torch.allclose(batch["observation.state"], torch.ones(1, 2))
    assert torch.allclose(batch["observation.environment_state"], torch.ones(1, 5))  # ENV is normalised too
    assert torch.allclose(batch["action"], -torch.ones(1, 3))
    assert torch.allclose(post(batch["action"]), stats["action"]["min"].expand(1, 3))
    pre.save_pretrained(tmp_path)
    post.save_pretrained(tmp_path)
    overrides = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {}}}
    pre2, post2 = make_pre_post_processors(config, str(tmp_path), preprocessor_overrides=overrides)
    again = pre2({**raw, "action": stats["action"]["min"].expand(1, 3)})
    assert all(torch.equal(again[name], batch[name]) for name in (*config.input_features, "action"))
    assert torch.equal(post2(batch["action"]), post(batch["action"]))


def test_the_golden_checkpoint_still_loads_and_acts_as_it_did():
    """Written once by version 0.1.0. If this fails, users' checkpoints have stopped loading: mend the code."""
    policy = FlowMatchingPolicy.from_pretrained(GOLDEN)
    pre, post = make_pre_post_processors(policy.config, str(GOLDEN))
    recorded = load_file(GOLDEN / "recorded.safetensors")
    frame = pre({name: recorded[name] for name in policy.config.input_features})
    chunk = policy.predict_action_chunk(frame, noise=recorded["noise"])
    torch.testing.assert_close(post(chunk.flatten(0, 1)), recorded["actions"], rtol=1e-4, atol=1e-4)
