"""Trainings that stop and go on, and what eq. (6) does to an unconditional flow."""

import copy

import pytest
import torch

from fm_policy.files import read_tensors
from fm_policy.flow.coupling import inverse
from fm_policy.flow.losses import masked_mse
from fm_policy.images.net import ImageFlow, Shape
from fm_policy.images.training import Recipe, Trainer
from fm_policy.slices import Clock, TimeIsUpError

CPU = torch.device("cpu")
SMALL = Shape((8,), groups=4)
BASE = Recipe("matching", "independent", 12, 8, 3e-3, warmup=3, cosine=True)
TUNED = Recipe("likelihood", "inverse", 4, 4, 1e-3, start="base", solver_steps=2, k=3)


@pytest.fixture(scope="module")
def base(images, tmp_path_factory):
    """A base that has learned a little."""
    recipe = Recipe("matching", "independent", 120, 32, 1e-2, warmup=10, cosine=True)
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    return Trainer(images, SMALL, recipe, 0, None, CPU).run(file, Clock()).model


def changed(recipe, **settings):
    return Recipe(**{**vars(recipe), **settings})


def train(images, recipe, folder, start=None, clock=None, seed=0, **settings):
    return Trainer(images, SMALL, recipe, seed, start, CPU).run(folder / "m.safetensors", clock or Clock(), **settings)


def weights(trained):
    return trained.model.state_dict()


def total(model):
    return sum(p.detach().sum().item() for p in model.parameters())


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class TestStopAndGoOn:
    @pytest.mark.parametrize("recipe", [BASE, changed(BASE, coupling="ot"), TUNED, changed(TUNED, head="unet")])
    def test_to_the_bit_as_if_it_had_not_stopped(self, images, base, after, tmp_path, recipe):
        start = base if recipe.start else None
        whole = train(images, recipe, tmp_path / "whole", start, measure=total, points=2)
        for _ in range(2):
            with pytest.raises(TimeIsUpError):
                train(images, recipe, tmp_path / "parts", start, after(recipe.steps // 3), measure=total, points=2)
            torch.manual_seed(99)
        parts = train(images, recipe, tmp_path / "parts", start, measure=total, points=2)
        assert equal(weights(whole), weights(parts))
        assert whole.curve == parts.curve and list(whole.curve) == [0, recipe.steps // 2, recipe.steps]

    def test_a_finished_model_is_read_back(self, images, after, tmp_path):
        first = train(images, BASE, tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
        tensors, metadata = read_tensors(tmp_path / "m.safetensors")
        assert metadata["step"] == 12 and metadata["settings"]["recipe"]["lr"] == 3e-3
        assert all(name.startswith("average.") for name in tensors)
        assert equal(weights(first), weights(train(images, BASE, tmp_path, clock=after(0))))

    @pytest.mark.parametrize("stopped", [False, True])
    def test_what_other_settings_made_is_refused(self, images, after, tmp_path, stopped):
        if stopped:
            with pytest.raises(TimeIsUpError):
                train(images, BASE, tmp_path, clock=after(2))
        else:
            train(images, BASE, tmp_path)
        with pytest.raises(ValueError, match=r"was made with recipe.batch 8 instead of 9, seed 0 instead of 1: choose"):
            train(images, changed(BASE, batch=9), tmp_path, seed=1)

    def test_seeds_differ(self, images, tmp_path):
        a, b = (train(images, BASE, tmp_path / str(seed), seed=seed) for seed in (0, 1))
        assert not equal(weights(a), weights(b))


class TestRecipe:
    @pytest.mark.parametrize("recipe", [TUNED, *(changed(TUNED, coupling=c) for c in ("nearest", "independent", "ot"))])
    @pytest.mark.parametrize("head", ["", "unet"])
    def test_cost_is_what_the_flows_nets_see(self, images, base, recipe, head):
        recipe = changed(recipe, head=head)
        seen = []
        start = copy.deepcopy(base)
        trainer = Trainer(images, SMALL, recipe, 0, start, CPU)

        def count(module, inputs, output):
            seen.append(len(inputs[1]) * (3 if output.requires_grad else 1))

        for net in (trainer.net.flow, start.flow):
            net.register_forward_hook(count)
        trainer._learn()
        assert sum(seen) == recipe.cost() / recipe.steps

    def test_cost_of_flow_matching(self):
        assert BASE.cost() == 3 * 8 * 12

    def test_rate_grows_and_decays(self):
        rates = [BASE.rate(step) for step in range(12)]
        assert rates[0] == pytest.approx(1e-3) and max(rates) <= 3e-3
        assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 1e-4
        assert {TUNED.rate(step) for step in range(4)} == {1e-3}

    def test_refuses_what_it_cannot_do(self, images):
        with pytest.raises(ValueError, match="coupling of matching must be one of .*, got 'inverse'"):
            changed(BASE, coupling="inverse")
        with pytest.raises(ValueError, match="at least 1 solver step, got solver_steps=0"):
            changed(TUNED, solver_steps=0)
        with pytest.raises(ValueError, match="starts from base, got none"):
            Trainer(images, SMALL, TUNED, 0, None, CPU)
        with pytest.raises(ValueError, match="must name its start"):
            Trainer(images, SMALL, changed(TUNED, start=""), 0, None, CPU)


class TestWhatIsLearned:
    def samples(self, model: ImageFlow, steps=2):
        with torch.no_grad():
            return model.solve(torch.randn(300, 64, 1, generator=torch.Generator().manual_seed(5)), "euler", steps)

    def test_flow_matching_moves_noise_towards_digits(self, images, base):
        data = images.chunks(images.train.pixels)
        ends = self.samples(base, 16)
        assert masked_mse(ends.mean(0, keepdim=True), data.mean(0, keepdim=True)) < 0.03
        assert abs(ends.std(0).mean() - data.std(0).mean()) < 0.15

    def test_independent_pairs_collapse_to_the_mean_image(self, images, base, tmp_path):
        recipe = changed(TUNED, coupling="independent", steps=40, batch=16, lr=1e-2)
        tuned = train(images, recipe, tmp_path, base).model
        spreads = [self.samples(model).std(0).mean() for model in (base, tuned)]
        assert spreads[1] < 0.4 * spreads[0]
        mean = images.chunks(images.train.pixels).mean(0)
        assert masked_mse(self.samples(tuned).mean(0)[None], mean[None]) < 0.03

    def test_inverse_pairs_lower_the_error_and_keep_the_spread(self, images, base, tmp_path):
        tuned = train(images, changed(TUNED, steps=25, batch=8, lr=3e-3), tmp_path, base).model
        x1 = images.chunks(images.held_out.pixels[:50])
        with torch.no_grad():
            x0 = inverse(x1, base.flow)
            before, after = (masked_mse(model.solve(x0, "euler", 2), x1) for model in (base, tuned))
        assert after < 0.9 * before
        spreads = [self.samples(model).std(0).mean() for model in (base, tuned)]
        assert spreads[1] > 0.8 * spreads[0]

    @pytest.mark.parametrize("head", ["unet", "control_synth"])
    def test_behind_a_head_the_flow_stays(self, images, base, tmp_path, head):
        headed = train(images, changed(TUNED, head=head, steps=5), tmp_path, base).model
        assert equal(base.flow.state_dict(), headed.flow.state_dict())
        assert not torch.equal(self.samples(headed), self.samples(base))
