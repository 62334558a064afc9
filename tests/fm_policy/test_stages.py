"""From stage to stage: what a policy takes over from its base's checkpoint, and which bases are refused."""

import copy
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.factory import make_policy
from safetensors.torch import load_file, save_file

from fm_policy.flow.solvers import SCHEMES
from fm_policy.modeling_fm_ft import FlowMatchingPolicy
from fm_policy.processor_fm_ft import make_fm_ft_pre_post_processors

GOLDEN = Path(__file__).parent / "golden"
DATA = SimpleNamespace()  # stands for the data set that a trainer hands in


def trained(policy) -> FlowMatchingPolicy:
    """Three steps: weights, their average and counters all differ from a new policy's."""
    for _ in range(3):
        policy.training_steps += 1
        for group in torch.optim.SGD(policy.get_optim_params()).param_groups:
            for parameter in group["params"]:
                parameter.data += 0.1 * torch.randn_like(parameter)
        policy.update()
    return policy


def saved(policy, folder: Path) -> Path:
    policy.save_pretrained(folder)
    return folder


def load(folder: Path, data=DATA, **changes) -> FlowMatchingPolicy:
    """Load as a trainer does, with these fields in place of the checkpoint's."""
    config = PreTrainedConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    return FlowMatchingPolicy.from_pretrained(folder, config=config, dataset_meta=data)


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    weights = theirs.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in ours.state_dict().items())


class TestNewStage:
    def test_the_bases_average_takes_every_role_and_counters_are_zero(self, tiny, tmp_path):
        base = trained(tiny.policy())
        assert not equal(base.ema_net, base.net)
        policy = load(saved(base, tmp_path), stage="finetune", num_solver_steps=2, coupling="nearest")
        for net in (policy.net, policy.ema_net, policy.base_net):
            assert equal(net, base.ema_net)
        assert base.training_steps == base.ema_updates == 3
        assert policy.training_steps == policy.ema_updates == 0
        names = {name.split(".")[0] for name in policy.state_dict()}
        assert names == {"net", "ema_net", "base_net", "ema_updates", "training_steps"}

    @pytest.mark.parametrize("use_ema", [False, True])
    def test_a_base_without_an_average_gives_its_weights(self, tiny, tmp_path, use_ema):
        base = trained(tiny.policy(use_ema=False))
        policy = load(saved(base, tmp_path), stage="finetune", use_ema=use_ema)
        nets = dict(policy.named_children())
        assert set(nets) == {"net", "base_net"} | ({"ema_net"} if use_ema else set())
        assert all(equal(net, base.net) for net in nets.values())

    def test_no_two_roles_share_their_weights(self, tiny, tmp_path):
        policy = load(saved(trained(tiny.policy()), tmp_path), stage="finetune")
        before = copy.deepcopy(policy.base_net)
        with torch.no_grad():
            for parameter in policy.net.parameters():
                parameter += 1.0
        assert equal(policy.base_net, before) and equal(policy.ema_net, before)

    def test_a_base_knows_no_variance_so_it_starts_where_it_is_told(self, tiny, tmp_path):
        folder = saved(tiny.policy(), tmp_path)
        assert not any("variance" in name for name in load_file(folder / "model.safetensors"))
        policy = load(folder, stage="finetune", variance="learned", sigma=(0.1, 0.2, 0.4))
        sigma = (0.5 * policy.log_variance.detach()).exp()
        torch.testing.assert_close(sigma, torch.tensor([0.1, 0.2, 0.4]).expand(16, 3))

    def test_its_first_chunk_is_that_of_its_base(self, tiny, tmp_path):
        base = trained(tiny.policy(velocity_net="transformer")).eval()
        frame, noise = tiny.frame(base.config), torch.randn(4, 16, 3)
        policy = load(saved(base, tmp_path), stage="finetune")
        expected = base.predict_action_chunk(frame, noise=noise)
        for tuned in (policy.eval(), policy.train()):
            assert torch.equal(tuned.predict_action_chunk(frame, noise=noise), expected)

    def test_without_a_data_set_there_is_no_base_to_keep(self, tiny, tmp_path):
        policy = load(saved(tiny.policy(), tmp_path), data=None, stage="finetune")
        assert not hasattr(policy, "base_net")

    def test_the_oldest_checkpoint_can_be_tuned(self):
        policy = load(GOLDEN, stage="finetune", coupling="inverse")
        average = {
            name: w for name, w in load_file(GOLDEN / "model.safetensors").items() if name.startswith("ema_net.")
        }
        assert average
        assert all(torch.equal(policy.state_dict()[name.replace("ema", "base")], w) for name, w in average.items())


class TestShapeIsInherited:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"horizon": 32}, "horizon: 16 there, 32 asked for"),  # a U-Net would load it without a word
            ({"n_obs_steps": 2}, "n_obs_steps: 1 there, 2 asked for"),
            ({"velocity_net": "transformer"}, "velocity_net: unet there, transformer asked for"),
            ({"down_dims": (16, 64)}, r"down_dims: .*16, 32.* there, \(16, 64\) asked for"),
            ({"crop_shape": (8, 8)}, r"crop_shape: None there, \(8, 8\) asked for"),
            ({"time_embed_dim": 16, "kernel_size": 5}, "kernel_size: 3 there, 5 .*\n  time_embed_dim: 8 there, 16"),
        ],
    )
    def test_another_one_is_refused_with_both_values(self, tiny, tmp_path, changes, message):
        saved(tiny.policy(), tmp_path)
        config = tiny.config(stage="finetune", **changes)
        with pytest.raises(ValueError, match=rf"(?s)keeps the shape of its base {tmp_path}, but:\n.*{message}"):
            FlowMatchingPolicy.from_pretrained(tmp_path, config=config, dataset_meta=DATA)

    def test_other_features_are_refused(self, tiny, tmp_path):
        saved(tiny.policy(), tmp_path)
        config = tiny.config(stage="finetune", input_features={**tiny.VECTORS, **tiny.CAMERAS})
        with pytest.raises(ValueError, match="input_features: .*observation.images.top"):
            FlowMatchingPolicy.from_pretrained(tmp_path, config=config, dataset_meta=DATA)

    def test_what_makes_no_weights_may_change(self, tiny, tmp_path):
        changes = {"solver": "heun", "num_solver_steps": 1, "n_action_steps": 4, "transformer_dropout": 0.0}
        policy = load(saved(tiny.policy(), tmp_path), stage="finetune", **changes)
        assert policy.config.nfe == SCHEMES["heun"].calls


class TestBasesThatAreRefused:
    def test_another_kind_of_policy(self, tiny, tmp_path):
        saved(tiny.policy(), tmp_path)
        DiffusionConfig(device="cpu")._save_pretrained(tmp_path)
        config = tiny.config(stage="finetune")
        with pytest.raises(ValueError, match=f"{tmp_path} holds a policy of type 'diffusion', expected 'fm_ft'"):
            FlowMatchingPolicy.from_pretrained(tmp_path, config=config, dataset_meta=DATA)

    def test_pre_training_does_not_go_on_from_a_tuned_policy(self, tiny, tmp_path):
        saved(tiny.finetuning(), tmp_path)
        with pytest.raises(ValueError, match="is of stage 'finetune': stage 'pretrain' goes on from .'pretrain'."):
            load(tmp_path, stage="pretrain")

    @staticmethod
    def checkpoint(tiny, run: Path, step: int, steps: int) -> Path:
        """A checkpoint as LeRobot's trainer writes it, `step` of `steps`."""
        folder = saved(tiny.policy(), run / "checkpoints" / f"{step:06d}" / "pretrained_model")
        (folder / "train_config.json").write_text(json.dumps({"steps": steps}))
        (folder.parent / "training_state").mkdir()
        (folder.parent / "training_state" / "training_step.json").write_text(json.dumps({"step": step}))
        return folder

    def test_a_half_trained_one(self, tiny, tmp_path):
        half = self.checkpoint(tiny, tmp_path, 10, 20)
        expected = rf"half-trained: step 10 of 20\. Resume .* python -m fm_policy\.select {tmp_path} --out DIR"
        with pytest.raises(ValueError, match=expected):
            load(half, stage="finetune")
        load(half)  # its own stage may go on

    def test_a_finished_or_chosen_one_is_taken(self, tiny, tmp_path):
        whole = self.checkpoint(tiny, tmp_path, 20, 20)
        assert load(whole, stage="finetune").config.stage == "finetune"
        chosen = self.checkpoint(tiny, tmp_path, 10, 20)
        (chosen.parent / "training_state" / "training_step.json").unlink()
        assert load(chosen, stage="finetune").config.stage == "finetune"

    def test_one_whose_weights_do_not_fit(self, tiny, tmp_path):
        saved(tiny.policy(), tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["ema_net.velocity.out.1.bias"] = torch.zeros(7)
        del weights["ema_net.velocity.out.1.weight"]
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"(?s)missing: .*velocity.out.1.weight.*wrong shape: .*velocity.out.1.bias"
        ):
            load(tmp_path, stage="finetune")


class TestSameStage:
    def test_goes_on_as_it_is(self, tiny, tmp_path):
        policy = trained(tiny.finetuning(variance="learned"))
        with torch.no_grad():
            policy.log_variance += 1.0
        resumed = load(saved(policy, tmp_path))
        assert resumed.state_dict().keys() == policy.state_dict().keys()
        assert equal(resumed, policy)
        assert resumed.training_steps == resumed.ema_updates == 3
        assert not equal(resumed.base_net, resumed.net)

    def test_acts_without_its_base(self, tiny, tmp_path):
        policy = trained(tiny.finetuning()).eval()
        loaded = FlowMatchingPolicy.from_pretrained(saved(policy, tmp_path))
        assert not hasattr(loaded, "base_net")
        frame, noise = tiny.frame(policy.config), torch.randn(4, 16, 3)
        expected = policy.predict_action_chunk(frame, noise=noise)
        assert torch.equal(loaded.predict_action_chunk(frame, noise=noise), expected)

    def test_a_variance_that_the_file_lacks_is_named(self, tiny, tmp_path):
        saved(tiny.finetuning(), tmp_path)
        with pytest.raises(
            ValueError, match="does not fit its configuration, 1 weights differ:\n  missing: log_variance"
        ):
            load(tmp_path, variance="learned")

    @pytest.mark.parametrize(
        ("changes", "now"), [({"num_solver_steps": 2}, "euler in 2 steps"), ({"solver": "heun"}, "heun in 4 steps")]
    )
    def test_another_grid_than_the_tuned_one_is_mentioned(self, tiny, tmp_path, caplog, changes, now):
        saved(tiny.finetuning(), tmp_path)
        with caplog.at_level(logging.WARNING):
            load(tmp_path, **changes)
        assert f"fine-tuned through euler in 4 steps and now runs {now}" in caplog.text

    def test_the_tuned_grid_and_any_grid_of_a_base_are_not(self, tiny, tmp_path, caplog):
        saved(tiny.finetuning(), tmp_path / "tuned")
        saved(tiny.policy(), tmp_path / "base")
        with caplog.at_level(logging.WARNING):
            load(tmp_path / "tuned")
            load(tmp_path / "base", num_solver_steps=2)
            load(tmp_path / "base", stage="finetune", num_solver_steps=2)
        assert "fine-tuned through" not in caplog.text


class TestStatistics:
    """Through LeRobot's `make_policy`, which tells the configuration of the data set."""

    STATS = ("observation.state", "observation.environment_state", "action")

    def data(self, config, largest=2.0):
        """A data set's description, its numbers between 0 and `largest`."""
        shapes = {name: ft.shape for name, ft in {**config.input_features, **config.output_features}.items()}
        features = {name: {"dtype": "float32", "shape": shape, "names": None} for name, shape in shapes.items()}
        ends = {"min": 0.0, "max": largest, "mean": largest / 3, "std": largest / 4}
        stats = {
            name: {end: np.full(shape, value, dtype=np.float32) for end, value in ends.items()}
            for name, shape in shapes.items()
        }
        counts = {"total_episodes": 1, "total_frames": 1}
        return SimpleNamespace(features=features, stats=stats, root="data/board", repo_id="local/board", **counts)

    def base(self, tiny, folder):
        policy = tiny.policy()
        for processor in make_fm_ft_pre_post_processors(policy.config, self.data(policy.config).stats):
            processor.save_pretrained(folder)
        return saved(policy, folder)

    def make(self, folder, data, **changes):
        config = PreTrainedConfig.from_pretrained(folder)
        config.pretrained_path = folder
        config.stage = "finetune"
        for name, value in changes.items():
            setattr(config, name, value)
        return make_policy(config, ds_meta=data)

    def test_equal_ones_pass(self, tiny, tmp_path):
        folder = self.base(tiny, tmp_path)
        data = self.data(tiny.config())
        data.stats["action"]["mean"] += 1.0  # not what the normaliser uses
        assert self.make(folder, data).base_net is not None

    def test_others_are_refused_with_both_values(self, tiny, tmp_path):
        folder = self.base(tiny, tmp_path)
        data = self.data(tiny.config())
        data.stats["action"]["max"] = np.array([2.0, 3.0, 2.0], dtype=np.float32)
        expected = (
            r"(?s)data/board has other statistics than .*action max: \[2.0, 2.0, 2.0\] there, \[2.0, 3.0, 2.0\] here"
            r"\nTake .* --policy.keep_statistics=true"
        )
        with pytest.raises(ValueError, match=expected) as refusal:
            self.make(folder, data)
        assert "observation" not in str(refusal.value)

    def test_the_bases_may_be_kept(self, tiny, tmp_path):
        folder = self.base(tiny, tmp_path)
        data = self.data(tiny.config(), largest=5.0)
        policy = self.make(folder, data, keep_statistics=True)
        for name in self.STATS:
            assert (data.stats[name]["max"] == 2.0).all()  # what LeRobot makes the processors of
        preprocessor, _ = make_fm_ft_pre_post_processors(policy.config, data.stats)
        batch = preprocessor({**{name: torch.ones(1, *ft.shape) for name, ft in policy.config.input_features.items()}})
        assert torch.allclose(batch["observation.state"], torch.zeros(1, 2))  # 1 is the middle of [0, 2]

    def test_pre_training_that_goes_on_keeps_its_own_too(self, tiny, tmp_path):
        folder = self.base(tiny, tmp_path)
        data = self.data(tiny.config(), largest=5.0)
        with pytest.raises(ValueError, match="data/board has other statistics than"):
            self.make(folder, data, stage="pretrain")
        self.make(folder, data, stage="pretrain", keep_statistics=True)
        assert (data.stats["action"]["max"] == 2.0).all()

    def test_what_never_changed_gets_a_range_and_stays_where_it_was(self, tiny, tmp_path, caplog):
        """A joint that stood at .3 in all of the data, and is at .301 on the robot."""
        data = self.data(tiny.config())
        stood = {"min": [0.3, 0.0], "max": [0.3, 2.0]}
        data.stats["observation.state"] |= {end: np.array(v, dtype=np.float32) for end, v in stood.items()}
        with caplog.at_level(logging.WARNING):
            policy = make_policy(tiny.config(), ds_meta=data)
        assert "nothing is learned from it: observation.state[0]" in caplog.text
        preprocessor, _ = make_fm_ft_pre_post_processors(policy.config, data.stats)

        def normalised(joint: float) -> float:
            seen = {"observation.state": torch.tensor([joint, 1.0]), "observation.environment_state": torch.ones(5)}
            return preprocessor(seen)["observation.state"][0, 0].item()

        assert normalised(0.3) == -1.0
        assert normalised(0.301) == pytest.approx(-0.999, abs=1e-6)
        # A checkpoint from before such ranges, whose weights know the joint at -1, belongs to the same data.
        old = self.data(policy.config)
        old.stats["observation.state"] |= {end: np.array(v, dtype=np.float32) for end, v in stood.items()}
        for processor in make_fm_ft_pre_post_processors(policy.config, old.stats):
            processor.save_pretrained(tmp_path)
        saved(policy, tmp_path)
        assert self.make(tmp_path, data).base_net is not None

    def test_what_never_changed_is_divided_by_a_range_of_its_own_in_units_of_its_spread_too(self, tiny, caplog):
        modes = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}
        config = tiny.config(normalization_mapping={kind: NormalizationMode(mode) for kind, mode in modes.items()})
        data = self.data(config)
        data.stats["observation.state"] |= {"mean": np.float32([5.0, 1.0]), "std": np.float32([0.0, 2.0])}
        with caplog.at_level(logging.WARNING):
            make_policy(config, ds_meta=data)
        assert "nothing is learned from it: observation.state[0]" in caplog.text
        assert data.stats["observation.state"]["std"].tolist() == [5.0, 2.0]

    def test_another_robots_data_are_refused_by_the_size_of_what_they_hold(self, tiny, tmp_path):
        folder = self.base(tiny, tmp_path)
        data = self.data(tiny.config())
        for end, value in data.stats["action"].items():
            data.stats["action"][end] = value[:2]
        with pytest.raises(ValueError, match="'action' has 2 numbers in the data set, 3 in"):
            self.make(folder, data, keep_statistics=True)

    def test_statistics_that_are_not_there_are_named(self, tiny, tmp_path):
        folder = self.base(tiny, tmp_path / "base")
        data = self.data(tiny.config())
        data.stats["observation.agent"] = data.stats.pop("observation.state")
        with pytest.raises(ValueError, match="the data set has no statistics of 'observation.state', only of .*agent"):
            self.make(folder, data)
        bare = tiny.policy()
        for processor in make_fm_ft_pre_post_processors(bare.config):
            processor.save_pretrained(tmp_path / "bare")
        saved(bare, tmp_path / "bare")
        with pytest.raises(ValueError, match=r"the preprocessor of .*bare has no statistics of '.*', only of \[\]"):
            self.make(tmp_path / "bare", self.data(tiny.config()))
        modes = {"VISUAL": "MEAN_STD", "STATE": "QUANTILES", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}
        quantiles = tiny.config(normalization_mapping={kind: NormalizationMode(mode) for kind, mode in modes.items()})
        with pytest.raises(ValueError, match="the data set has no 'q01' of 'observation.state'"):
            make_policy(quantiles, ds_meta=self.data(quantiles))


class TestNewRunOfTheSameStage:
    """`--policy.path=TUNED stage=finetune`, as against a resumed training."""

    @pytest.fixture(autouse=True)
    def named(self, monkeypatch, tmp_path):
        monkeypatch.setattr("sys.argv", ["lerobot-train", f"--policy.path={tmp_path}"])

    def test_the_tuned_policy_is_the_base_of_further_tuning(self, tiny, tmp_path):
        tuned = trained(tiny.finetuning())
        policy = load(saved(tuned, tmp_path), coupling="nearest")
        for net in (policy.net, policy.ema_net, policy.base_net):
            assert equal(net, tuned.ema_net)
        assert policy.training_steps == policy.ema_updates == 0

    def test_it_must_have_come_to_its_end_and_have_the_same_shape(self, tiny, tmp_path):
        saved(tiny.finetuning(), tmp_path)
        with pytest.raises(ValueError, match="(?s)keeps the shape of its base .*horizon: 16 there, 32 asked for"):
            load(tmp_path, horizon=32)
        half = TestBasesThatAreRefused.checkpoint(tiny, tmp_path / "run", 10, 20)
        saved(tiny.finetuning(), half)
        with pytest.raises(ValueError, match="half-trained: step 10 of 20"):
            load(half)

    def test_it_teaches_on_its_own_grid_alone(self, tiny, tmp_path):
        saved(tiny.finetuning(num_solver_steps=2), tmp_path)
        with pytest.raises(ValueError, match="by 16 steps of euler, .* through 2 of euler: --policy.reflow_steps=2"):
            load(tmp_path, coupling="reflow", num_solver_steps=1)
        assert load(tmp_path, coupling="reflow", num_solver_steps=1, reflow_steps=2).config.nfe == 1
        saved(tiny.finetuning(solver="heun", num_solver_steps=2), tmp_path)
        with pytest.raises(ValueError, match="fine-tuned through 2 of heun, which reflow, by Euler's steps, cannot"):
            load(tmp_path, coupling="reflow", solver="euler", num_solver_steps=1, reflow_steps=2)

    def test_a_tuned_policy_acts_whatever_taught_it(self, tiny, tmp_path):
        """lerobot-eval and lerobot-rollout name the policy on their command line, too."""
        half = TestBasesThatAreRefused.checkpoint(tiny, tmp_path / "run", 10, 20)
        saved(tiny.finetuning(coupling="reflow", num_solver_steps=2), half)
        policy = load(half, data=None)
        assert policy.config.nfe == 2 and not hasattr(policy, "base_net")

    def test_pre_training_goes_on_with_its_weights_and_their_average(self, tiny, tmp_path):
        base = trained(tiny.policy())
        policy = load(saved(base, tmp_path))
        assert equal(policy.net, base.net)
        assert equal(policy.ema_net, base.ema_net)


def test_a_teacher_is_asked_for_where_a_training_starts_from_scratch(tiny):
    data = TestStatistics().data(tiny.config())
    with pytest.raises(ValueError, match="coupling='reflow' learns from a trained policy: --policy.path=DIR"):
        make_policy(tiny.config(stage="finetune", coupling="reflow"), ds_meta=data)
