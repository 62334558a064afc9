"""The average of a checkpoint as a checkpoint of its own, by the program that users call."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fm_policy.average import main
from fm_policy.baselines.configuration_dp_ema import DiffusionEmaConfig
from fm_policy.baselines.modeling_dp_ema import DiffusionEmaPolicy
from fm_policy.baselines.processor_dp_ema import make_dp_ema_pre_post_processors
from fm_policy.evaluation.checkpoint import load_any_checkpoint
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

SMALL = {"down_dims": (16, 32), "n_groups": 4, "diffusion_step_embed_dim": 16, "num_train_timesteps": 4}


@pytest.fixture(params=["fm_ft", "dp_ema"])
def checkpoint(request, tiny, tmp_path):
    """A policy whose average lies off its weights, saved with its processors; a batch that it takes."""
    torch.manual_seed(0)
    policy = tiny.policy(use_ema=True)
    make = make_fm_ft_pre_post_processors
    if request.param == "dp_ema":
        features = {name: getattr(policy.config, name) for name in ("input_features", "output_features")}
        policy = DiffusionEmaPolicy(DiffusionEmaConfig(**features, device="cpu", n_obs_steps=1, **SMALL))
        make = make_dp_ema_pre_post_processors
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight += 0.1 * name.startswith("ema_")
    folder = tmp_path / "checkpoint"
    policy.config.pretrained_path = "where/its/base/lay"
    for part in (policy, *make(policy.config)):
        part.save_pretrained(folder)
    return folder


def chunk(folder, tiny) -> torch.Tensor:
    policy = load_any_checkpoint(folder).policy
    noise = torch.randn(4, *policy.config.noise_shape, generator=torch.Generator().manual_seed(1))
    windows = tiny.windows(policy.config)
    return policy.predict_action_chunk({name: windows[name] for name in policy.config.input_features}, noise)


def test_the_average_acts_as_before_and_is_trained_on_from_there(checkpoint, tiny, tmp_path, capsys):
    main([str(checkpoint), "--out", str(tmp_path / "average")])
    assert f"{tmp_path / 'average'}: {checkpoint} with its averaged weights alone" in capsys.readouterr().out
    torch.testing.assert_close(chunk(tmp_path / "average", tiny), chunk(checkpoint, tiny), rtol=0, atol=0)
    policy = load_any_checkpoint(tmp_path / "average").policy
    live = "diffusion." if policy.name == "dp_ema" else "net."
    averaged, written = load_file(checkpoint / "model.safetensors"), policy.state_dict()
    names = [name for name in averaged if name.startswith(live)]
    assert names
    assert all(torch.equal(written[name], averaged[f"ema_{name}"]) for name in names)
    assert int(getattr(policy, "ema_updates", 0)) == 0
    assert json.loads((tmp_path / "average" / "config.json").read_text())["pretrained_path"] is None


def test_its_card_says_what_its_weights_are_and_what_they_learned_from(tiny, tmp_path):
    policy = tiny.policy(use_ema=True)
    policy.config._runtime_dataset_meta = SimpleNamespace(repo_id="local/t", total_episodes=3, total_frames=90)
    for part in (policy, *make_fm_ft_pre_post_processors(policy.config)):
        part.save_pretrained(tmp_path / "checkpoint")
    main([str(tmp_path / "checkpoint"), "--out", str(tmp_path / "once"), "--half"])
    main([str(tmp_path / "once"), "--out", str(tmp_path / "twice")])
    of_checkpoint, once, twice = (
        (tmp_path / name / "README.md").read_text() for name in ("checkpoint", "once", "twice")
    )
    learned = "\n\nTrained on `local/t`: 3 episodes, 90 frames.\n\n| | |\n"
    assert learned in of_checkpoint
    rows = {"yes": of_checkpoint, "these are the averaged weights, stored as float16": once, "no": twice}
    for average, card in rows.items():
        assert card == of_checkpoint.replace("| yes |", f"| {average} |")


@pytest.fixture
def tuned(tiny, tmp_path):
    """A fine-tuned checkpoint with its base, and a second one whose net, averaged or not, lies .5 off."""
    policy = tiny.finetuning(use_ema=True, coupling="nearest")
    for part in (policy, *make_fm_ft_pre_post_processors(policy.config)):
        part.save_pretrained(tmp_path / "tuned")
    other = shutil.copytree(tmp_path / "tuned", tmp_path / "other")
    shift(other, ("net.", "ema_net."), 0.5)
    return tmp_path / "tuned", other


def shift(folder, parts, by) -> None:
    weights = load_file(folder / "model.safetensors")
    moved = {name: w + by * (w.is_floating_point() and name.startswith(parts)) for name, w in weights.items()}
    save_file(moved, folder / "model.safetensors")


def test_of_two_fine_tunings_it_is_the_mean_of_their_averages(tuned, tiny, tmp_path, capsys):
    main([*map(str, tuned), "--out", str(tmp_path / "mean")])
    assert "with their averaged weights alone" in capsys.readouterr().out
    main([str(tuned[0]), "--out", str(tmp_path / "one")])
    mean, one = (load_file(tmp_path / name / "model.safetensors") for name in ("mean", "one"))
    for name, weight in one.items():
        expected = weight + 0.25 if weight.is_floating_point() else weight
        torch.testing.assert_close(mean[name], expected, msg=name)
    chunk(tmp_path / "mean", tiny)
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "| moving average of weights | these are the averaged weights, in the mean of 2 trainings |" in card


def test_trainings_of_different_policies_have_no_mean(checkpoint, tuned, tmp_path):
    first, other = tuned

    def refused(*folders) -> str:
        with pytest.raises(SystemExit) as refusal:
            main([*map(str, folders), "--out", str(tmp_path / "mean")])
        assert not (tmp_path / "mean").exists()
        return str(refusal.value).replace(f"{tmp_path}/", "")

    assert refused(first, tmp_path / "absent").startswith("average: no checkpoint: ")
    one = "are one checkpoint, which is its own mean"
    assert refused(first, other, first) == f"average: tuned and tuned {one}"
    assert refused(checkpoint, shutil.copytree(checkpoint, tmp_path / "copy")) == f"average: checkpoint and copy {one}"
    from_scratch = "do not hold one base that both were fine-tuned from"
    shift(tmp_path / "copy", ("net.", "ema_", "diffusion."), 0.5)
    assert refused(checkpoint, tmp_path / "copy").startswith(f"average: checkpoint and copy {from_scratch}")
    elsewhere = shutil.copytree(other, tmp_path / "elsewhere")
    shift(elsewhere, ("base_net.",), 0.5)
    assert refused(first, elsewhere).startswith(f"average: tuned and elsewhere {from_scratch}")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"pretrained_path": "elsewhere", "n_action_steps": 3}))
    processor = other / "policy_postprocessor.json"
    processor.write_text(processor.read_text() + " ")
    differing = "config.json's n_action_steps, policy_postprocessor.json"
    assert refused(first, other) == f"average: other is no second training of tuned: they differ in {differing}"


def test_half_the_bytes_hold_nearly_the_same(checkpoint, tiny, tmp_path):
    for name, flags in {"whole": [], "half": ["--half"]}.items():
        main([str(checkpoint), "--out", str(tmp_path / name), *flags])
    whole, half = (tmp_path / name / "model.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    torch.testing.assert_close(chunk(half.parent, tiny), chunk(checkpoint, tiny), rtol=0, atol=0.02)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="average: no checkpoint: .*absent is no folder"):
        main([str(tmp_path / "absent"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="checkpoint is not an empty folder"):
        main([str(checkpoint), "--out", str(checkpoint)])
    policy = load_any_checkpoint(checkpoint).policy
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if name.startswith("ema_"))[:] = 1e5
    policy.save_pretrained(checkpoint)
    with pytest.raises(SystemExit, match=r"the weight .* has values up to 100000, too large for float16"):
        main([str(checkpoint), "--out", str(tmp_path / "out"), "--half"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
