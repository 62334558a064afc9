"""Stage `finetune` of the policy: what is trained, on which pairs, and what is logged of it."""

import copy
import math

import pytest
import torch
from lerobot.configs import PreTrainedConfig

from fm_policy.ema import ema_decay
from fm_policy.flow.coupling import inverse
from fm_policy.flow.losses import HUBER_SCALE, gaussian_nll, masked_mse, pseudo_huber
from fm_policy.flow.solvers import integrate
from fm_policy.modeling_fm_ft import FlowMatchingPolicy

NETS = ["unet", "transformer"]
FAST = {"optimizer_lr": 3e-3, "finetune_lr": 3e-3}


def optimizer_of(policy) -> torch.optim.Optimizer:
    return policy.config.get_optimizer_preset().build(policy.get_optim_params())


def trained_parameters(policy) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer_of(policy).param_groups for parameter in group["params"]]


def train(policy, batch, steps=3, held_out=None) -> list[dict[str, float]]:
    """Train as LeRobot does, with an evaluation after every step if a batch is held out; what each step logged."""
    optimizer, logged = optimizer_of(policy.train()), []
    for _ in range(steps):
        loss, logs = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.update()
        logged.append({"loss": loss.item()} | logs)
        if held_out is not None:
            evaluate(policy, held_out)
    return logged


@torch.no_grad()
def evaluate(policy, *batches) -> list[dict[str, float]]:
    """Held-out batches in evaluation mode, as LeRobot runs them between steps; the policy trains on afterwards."""
    policy.eval()
    logged = [policy.forward(batch)[1] for batch in batches]
    policy.train()
    return logged


def first_step(policy, batch, reduction="mean"):
    """Loss and logs of step 1: its noise is the same whatever was drawn before."""
    policy.training_steps.zero_()
    return policy.forward(batch, reduction)


def starts(policy, batch) -> torch.Tensor:
    """The noise that the batch's loss starts from, in the net in training; the last solve of `forward`."""
    seen = []
    hook = policy.net.velocity.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    first_step(policy, batch)
    hook.remove()
    return [x for t, x in seen if not torch.as_tensor(t).any()][-1]


class TestTraining:
    @pytest.mark.parametrize(("sees", "steps", "share"), [("states", 30, 0.7), ("cameras", 8, 0.95)])
    @pytest.mark.parametrize("net", NETS)
    def test_loss_falls_on_one_batch(self, tiny, net, sees, steps, share):
        features = tiny.VECTORS if sees == "states" else dict(list(tiny.CAMERAS.items())[:1])
        policy = tiny.finetuning(velocity_net=net, input_features=features, num_solver_steps=2, **FAST)
        batch = tiny.windows(policy.config)
        before = first_step(policy, batch)[0].item()
        logged = train(policy, batch, steps)
        assert first_step(policy, batch)[0].item() < share * before  # of the same noise
        assert all(logs["loss"] == pytest.approx(logs["reconstruction_error"]) for logs in logged)

    def test_every_trained_parameter_gets_a_gradient_and_no_copy_does(self, tiny):
        policy = tiny.finetuning(input_features={**tiny.VECTORS, **tiny.CAMERAS}, variance="learned")
        policy.forward(tiny.windows(policy.config, size=2))[0].backward()
        parameters = trained_parameters(policy)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        assert {id(p) for p in parameters} == {id(p) for p in (*policy.net.parameters(), policy.log_variance)}
        assert all(p.grad is None for net in (policy.ema_net, policy.base_net) for p in net.parameters())

    def test_the_loss_is_the_error_of_the_reconstruction(self, tiny):
        policy = tiny.finetuning()
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][:2, 5:] = True
        batch["action"][:2, 5:] = math.nan  # what lies beyond an episode is not looked at
        chunk = policy.reconstruct(batch, starts(policy, batch))
        expected = masked_mse(chunk, batch["action"], batch["action_is_pad"])
        assert first_step(policy, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)

    def test_a_reconstruction_is_the_chunk_that_the_robot_gets(self, tiny):
        policy = tiny.finetuning(n_obs_steps=2).eval()
        batch = tiny.windows(policy.config)
        noise = torch.randn(4, 16, 3)
        observation = {name: batch[name] for name in policy.config.input_features}
        deployed = policy.predict_action_chunk(observation, noise=noise)
        reconstruction = policy.reconstruct(batch, noise)
        assert torch.equal(reconstruction[:, 1:], deployed)
        assert not reconstruction.requires_grad  # of the moving average
        assert policy.train().reconstruct(batch, noise).requires_grad
        with pytest.raises(ValueError, match=r"noise must have the shape \(4, 16, 3\), got \(4, 8, 3\)"):
            policy.reconstruct(batch, noise[:, :8])

    def test_the_map_in_training_has_no_dropout(self, tiny):
        changes = {"velocity_net": "transformer", "transformer_dropout": 0.5}
        policy = tiny.finetuning(**changes)
        batch, noise = tiny.windows(policy.config), torch.randn(4, 16, 3)
        chunks = [policy.reconstruct(batch, noise) for _ in range(2)]
        assert torch.equal(*chunks)
        assert torch.equal(policy.eval().reconstruct(batch, noise), chunks[0])
        pretraining = tiny.policy(**changes).train()
        pretraining.net.load_state_dict(policy.net.state_dict())
        assert not torch.equal(*[pretraining.reconstruct(batch, noise) for _ in range(2)])

    @pytest.mark.parametrize("coupling", ["independent", "nearest", "inverse", "reflow"])
    def test_per_sample_losses_average_to_the_loss(self, tiny, coupling):
        policy = tiny.finetuning(coupling=coupling, variance="learned", cfm_weight=0.5)
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][:2, 5:] = True
        mean, logs = first_step(policy, batch)
        per_sample, same_logs = first_step(policy, batch, reduction="none")
        assert per_sample.shape == (4,)
        torch.testing.assert_close(per_sample.mean(), mean)
        assert same_logs == pytest.approx(logs)

    def test_some_flow_matching_loss_may_remain(self, tiny):
        policy = tiny.finetuning(cfm_weight=0.5)
        batch = tiny.windows(policy.config)
        loss, logs = first_step(policy, batch)
        assert loss.item() == pytest.approx(logs["reconstruction_error"] + 0.5 * logs["cfm_loss"])
        policy.config.cfm_weight = 0.0
        without, logs = first_step(policy, batch)
        assert without.item() == pytest.approx(logs["reconstruction_error"]) and "cfm_loss" not in logs

    @pytest.mark.parametrize(("solver", "calls"), [("euler", 4), ("heun", 8), ("rk4", 16)])
    @pytest.mark.parametrize(("coupling", "solves"), [("independent", 1), ("nearest", 2)])
    def test_network_calls_of_a_step_and_of_the_robot(self, tiny, solver, calls, coupling, solves):
        policy = tiny.finetuning(solver=solver, coupling=coupling)
        sizes = []
        policy.net.velocity.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[1])))
        policy.forward(tiny.windows(policy.config))
        assert sizes == [20] * calls * (solves - 1) + [4] * calls  # of nearest_k = 5 candidates per row, at once
        policy.eval().predict_action_chunk(tiny.frame(policy.config))
        assert policy.nfe == calls

    def test_fewer_network_calls_choose_among_the_noises(self, tiny):
        policy = tiny.finetuning(coupling="nearest", nearest_steps=1)
        sizes, noises = [], []
        policy.net.velocity.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[1])))
        policy.net.velocity.register_forward_pre_hook(lambda _, inputs: noises.append(inputs[1].detach()))
        batch = tiny.windows(policy.config)
        policy.forward(batch)
        assert sizes == [20] + [4] * 4
        candidates, chosen = noises[0].view(5, 4, 16, 3), noises[1]
        policy.config.num_solver_steps = 1
        with torch.no_grad():
            chunks = torch.stack([policy.reconstruct(batch, noise) for noise in candidates])
        best = (chunks - batch["action"]).square().mean(dim=(2, 3)).argmin(dim=0)
        assert len(best.unique()) > 1
        assert torch.equal(chosen, candidates[best, torch.arange(4)])

    def test_gradients_of_the_solver_steps_are_logged_one_step_later(self, tiny):
        policy = tiny.finetuning()
        logged = train(policy, tiny.windows(policy.config), steps=2)
        names = [f"grad_step_{step:02d}" for step in range(4)]
        assert not any(name in logged[0] for name in names)
        assert sum(logged[1][name] for name in names) == pytest.approx(4)  # relative to their mean

    def test_an_adaptive_solver_is_refused(self, tiny):
        with pytest.raises(ValueError, match="a fixed grid, which solver='dopri5' has not"):
            tiny.finetuning(solver="dopri5")


class TestFrozenEncoder:
    def policy(self, tiny, **changes):
        """With a camera behind BatchNorm."""
        features = dict(list(tiny.CAMERAS.items())[:1])
        return tiny.finetuning(
            input_features=features, use_group_norm=False, num_solver_steps=2, crop_shape=(28, 28), **FAST, **changes
        )

    def test_stays_as_it_is_with_its_statistics(self, tiny):
        policy = self.policy(tiny, train_encoder=False)
        before = copy.deepcopy(policy.net.state_dict())
        train(policy, tiny.windows(policy.config))
        after = policy.net.state_dict()
        assert any(name.endswith("running_mean") for name in before)
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"velocity"}
        assert all(p.grad is None for p in policy.net.encoder.parameters())
        ids = {id(p) for p in policy.net.encoder.parameters()}
        assert not any(id(p) in ids for p in trained_parameters(policy))
        assert not policy.net.encoder.training

    def test_trained_along_it_changes_with_its_statistics(self, tiny):
        policy = self.policy(tiny)
        before = copy.deepcopy(policy.net.encoder.state_dict())
        train(policy, tiny.windows(policy.config), steps=1)
        after = policy.net.encoder.state_dict()
        assert all(not torch.equal(before[name], after[name]) for name in before)


class TestVariance:
    def test_learned_it_follows_the_error_in_a_group_of_its_own(self, tiny):
        policy = tiny.finetuning(variance="learned")
        groups = optimizer_of(policy).param_groups
        assert [len(group["params"]) for group in groups] == [len(list(policy.net.parameters())), 1]
        assert groups[0]["lr"] == 5e-6 and groups[0]["weight_decay"] == 1e-6
        assert groups[1]["lr"] == 1e-2 and groups[1]["weight_decay"] == 0
        assert policy.log_variance.detach().exp().sqrt().flatten().tolist() == pytest.approx([0.1] * 48)
        logged = train(policy, tiny.windows(policy.config), steps=3)
        assert [logs["sigma"] for logs in logged] == pytest.approx(
            [0.1 * math.exp(0.005 * n) for n in range(3)], rel=1e-3
        )
        assert logged[-1]["reconstruction_error"] ** 0.5 > 0.1  # why it grows

    def test_learned_it_decides_the_loss(self, tiny):
        policy = tiny.finetuning(variance="learned", sigma=(0.1, 0.5, 2.0))
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][:2, 5:] = True
        chunk = policy.reconstruct(batch, starts(policy, batch))
        log_variance = 2 * torch.tensor([0.1, 0.5, 2.0]).log()
        expected = gaussian_nll(chunk, batch["action"], log_variance, batch["action_is_pad"])
        assert first_step(policy, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)

    def test_given_it_weighs_every_element_and_is_not_trained_or_saved(self, tiny):
        sigma = tuple(0.1 + 0.01 * n for n in range(48))
        policy = tiny.finetuning(variance="diagonal", sigma=sigma)
        batch = tiny.windows(policy.config)
        chunk = policy.reconstruct(batch, starts(policy, batch))
        sigma = torch.tensor(sigma).view(16, 3)  # time by time
        expected = 0.5 * (((chunk - batch["action"]) / sigma).square() + 2 * sigma.log()).mean()
        assert first_step(policy, batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
        assert len(trained_parameters(policy)) == len(list(policy.net.parameters()))
        assert "log_variance" not in policy.state_dict()


class TestCouplings:
    def test_nearest_starts_from_the_best_of_its_candidates(self, tiny):
        policy = tiny.finetuning(coupling="nearest", nearest_k=3)
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][0, 5:] = True
        inputs = []
        hook = policy.net.velocity.register_forward_pre_hook(lambda _, seen: inputs.append(seen[1].detach()))
        loss, _ = first_step(policy, batch)
        hook.remove()
        candidates, chosen = inputs[0].view(3, 4, 16, 3), inputs[4]
        with torch.no_grad():
            errors = torch.stack(
                [masked_mse(policy.reconstruct(batch, x0), batch["action"], batch["action_is_pad"], "none")
                 for x0 in candidates]
            )  # fmt: skip
        best = errors.argmin(dim=0)
        assert len(best.unique()) > 1
        assert torch.equal(chosen, candidates[best, torch.arange(4)])
        assert loss.item() == pytest.approx(errors.min(dim=0).values.mean().item(), rel=1e-5)

    def test_inverse_starts_where_the_base_would_have_started(self, tiny):
        policy = tiny.finetuning(coupling="inverse", **FAST)
        batch = tiny.windows(policy.config)
        train(policy, batch, steps=2)  # the net has left its base
        base, x0 = policy.base_net, starts(policy, batch)

        o = base.encoder(batch)

        def velocity(t, x):
            return base.velocity(t, x, o)

        assert torch.equal(x0, inverse(batch["action"], velocity))
        with torch.no_grad():
            x1 = integrate(velocity, x0, "rk4", 16)
        assert (x1 - batch["action"]).abs().mean() < 0.1 * (x0 - batch["action"]).abs().mean()

    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_reflow_aims_at_what_the_base_makes_in_many_steps(self, tiny, scale):
        policy = tiny.finetuning(coupling="reflow", reflow_steps=8, num_solver_steps=2, noise_scale=scale, **FAST)
        batch = tiny.windows(policy.config)
        train(policy, batch, steps=2)  # the net has left its base
        x0, base = starts(policy, batch), policy.base_net
        with torch.no_grad():
            aim = integrate(base.velocity.bind(base.encoder(batch)), x0, "euler", 8)
            chunk = policy.reconstruct(batch, x0 / scale)
        batch["action"] = torch.zeros_like(batch["action"])  # the demonstrations have no part in it, nor their padding
        batch["action_is_pad"][:2, 5:] = True
        loss, logs = first_step(policy, batch)
        assert loss.item() == pytest.approx(pseudo_huber(chunk, aim, HUBER_SCALE).item(), rel=1e-5)
        assert logs["distillation_error"] == pytest.approx(masked_mse(chunk, aim).item(), rel=1e-5)
        assert "reconstruction_error" not in logs

    @pytest.mark.parametrize("coupling", ["inverse", "reflow"])
    def test_the_base_sees_the_noise_that_the_net_sees_and_nothing_sees_it_in_evaluation(self, tiny, coupling):
        policy = tiny.finetuning(coupling=coupling, observation_noise=0.1, num_solver_steps=2)
        batch, seen = tiny.windows(policy.config), {}
        clean = policy.base_net.encoder(batch)
        for name in ("net", "base_net", "ema_net"):
            hook = lambda _, inputs, output, name=name: seen.update({name: output})  # noqa: E731
            getattr(policy, name).encoder.register_forward_hook(hook)
        first_step(policy.train(), batch)
        assert torch.equal(seen["net"], seen["base_net"])
        assert 0.05 < (seen["net"] - clean).std() < 0.2
        policy.eval().forward(batch)
        assert torch.equal(seen["ema_net"], clean)

    @pytest.mark.parametrize("coupling", ["independent", "nearest", "reflow", "inverse"])
    def test_pairs_start_at_the_noise_that_the_robot_draws(self, tiny, coupling):
        """But where the data themselves say which noise they come from."""
        policy = tiny.finetuning(coupling=coupling, nearest_k=1, num_solver_steps=2).train()
        batch = tiny.windows(policy.config)
        whole = starts(policy, batch)
        policy.config.noise_scale = 0.5
        assert torch.equal(starts(policy, batch), whole if coupling == "inverse" else 0.5 * whole)

    def test_reflow_of_the_same_grid_has_nothing_to_learn(self, tiny):
        policy = tiny.finetuning(coupling="reflow", reflow_steps=4, num_solver_steps=4)
        assert first_step(policy, tiny.windows(policy.config))[0] == 0

    @pytest.mark.parametrize("coupling", ["inverse", "reflow"])
    def test_the_base_s_pairs_need_a_base(self, tiny, coupling):
        policy = tiny.policy(stage="finetune", coupling=coupling).train()
        with pytest.raises(ValueError, match="holds no copy of its base.*dataset_meta"):
            policy.forward(tiny.windows(policy.config))

    def test_the_base_never_changes(self, tiny):
        policy = tiny.finetuning(coupling="inverse", **FAST, input_features={**tiny.VECTORS, **tiny.CAMERAS},
                                 use_group_norm=False, num_solver_steps=2)  # fmt: skip
        before = copy.deepcopy(policy.base_net.state_dict())
        batch = tiny.windows(policy.config, size=2)
        train(policy, batch, steps=1, held_out=batch)
        assert all(torch.equal(before[name], weight) for name, weight in policy.base_net.state_dict().items())
        assert not any(torch.equal(before[name], p) for name, p in policy.net.named_parameters())
        assert not policy.base_net.training
        assert not any(p.requires_grad for p in policy.base_net.parameters())


class TestAverage:
    def test_follows_its_recursion_from_the_base_on(self, tiny):
        policy = tiny.finetuning(**FAST)
        batch = tiny.windows(policy.config)
        expected = next(policy.net.parameters()).detach().clone()
        for update in range(1, 4):
            train(policy, batch, steps=1)
            decay = ema_decay(update)
            expected = decay * expected + (1 - decay) * next(policy.net.parameters()).detach()
        torch.testing.assert_close(next(policy.ema_net.parameters()), expected)
        assert policy.eval().active_net is policy.ema_net
        assert policy.train().active_net is policy.net

    @pytest.mark.parametrize("variance", ["scalar", "learned"])
    def test_alone_it_acts_equally_and_can_be_tuned_again(self, tiny, tmp_path, variance):
        policy = tiny.finetuning(variance=variance, **FAST)
        batch = tiny.windows(policy.config)
        train(policy, batch)
        policy.eval().ema_only().save_pretrained(tmp_path)
        loaded = FlowMatchingPolicy.from_pretrained(tmp_path)
        assert not any(name.startswith(("ema_", "base_")) for name in loaded.state_dict())
        frame, noise = tiny.frame(policy.config), torch.randn(4, 16, 3)
        expected = policy.predict_action_chunk(frame, noise=noise)
        assert torch.equal(loaded.predict_action_chunk(frame, noise=noise), expected)

        config = PreTrainedConfig.from_pretrained(tmp_path)
        config.use_ema = True
        again = FlowMatchingPolicy.from_pretrained(tmp_path, config=config, dataset_meta=object())
        average = policy.ema_net.state_dict()
        for net in (again.net, again.ema_net, again.base_net):
            assert all(torch.equal(average[name], weight) for name, weight in net.state_dict().items())
        if variance == "learned":
            assert torch.equal(again.log_variance, policy.log_variance)
        assert torch.equal(again.predict_action_chunk(frame, noise=noise), expected)
        assert again.ema_updates == 0
        train(again, batch, steps=1)
        assert not torch.equal(again.eval().predict_action_chunk(frame, noise=noise), expected)


class TestHeldOut:
    NAMES = ("reconstruction_error", "spread", "mode_changes")

    def test_numbers_reach_the_next_training_step(self, tiny):
        policy = tiny.finetuning()
        batches = [tiny.windows(policy.config, seed=seed) for seed in range(2)]
        assert not any(name.startswith("held_out") for name in policy.forward(batches[0])[1])
        rows = evaluate(policy, *batches)
        logs = policy.forward(batches[0])[1]
        for name in self.NAMES:
            assert logs[f"held_out_{name}"] == pytest.approx((rows[0][name] + rows[1][name]) / 2)
        row = evaluate(policy, batches[1])[0]
        logs = policy.forward(batches[0])[1]
        assert all(logs[f"held_out_{name}"] == row[name] for name in self.NAMES)  # of the last evaluation alone

    @pytest.mark.parametrize("coupling", ["independent", "nearest"])
    def test_are_equal_for_equal_weights_whatever_ran_before(self, tiny, coupling):
        policy = tiny.finetuning(coupling=coupling)
        batch = tiny.windows(policy.config)
        first = evaluate(policy, batch)[0]
        torch.manual_seed(1)
        policy.forward(tiny.windows(policy.config, seed=1))
        state = torch.get_rng_state()
        assert evaluate(policy, batch)[0] == first
        assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone

    def test_evaluating_leaves_training_alone(self, tiny):
        evaluated, plain = tiny.finetuning(**FAST), tiny.finetuning(**FAST)
        batch = tiny.windows(plain.config)
        train(evaluated, batch, held_out=batch)
        train(plain, batch)
        weights = plain.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in evaluated.state_dict().items())

    def test_error_and_spread_are_those_of_the_averaged_policy(self, tiny):
        policy = tiny.finetuning(coupling="nearest", **FAST)
        batch = tiny.windows(policy.config, size=20)
        batch["action_is_pad"][:2, 5:] = True
        train(policy, batch)
        inputs = []
        policy.ema_net.velocity.register_forward_pre_hook(lambda _, seen: inputs.append(seen[1]))
        logs = evaluate(policy, batch)[0]
        # Four calls each: the candidates of the loss, its chosen pairs, independent pairs, 8 noises of 16 rows.
        assert [len(x) for x in inputs] == [100] * 4 + [20] * 8 + [128] * 4
        policy.eval()
        chunk = policy.reconstruct(batch, inputs[8])
        expected = masked_mse(chunk, batch["action"], batch["action_is_pad"])
        assert logs["reconstruction_error"] == pytest.approx(expected.item(), rel=1e-5)
        rows = {name: value[:16] for name, value in batch.items()}
        samples = torch.stack([policy.reconstruct(rows, noise) for noise in inputs[12].view(8, 16, 16, 3)])
        expected = samples.var(dim=0).mean(dim=(1, 2)).sqrt().mean()
        assert logs["spread"] == pytest.approx(expected.item(), rel=1e-4)

    def test_a_policy_that_is_its_base_changes_no_mode(self, tiny):
        policy = tiny.finetuning()
        batch = tiny.windows(policy.config, size=20)
        assert evaluate(policy, batch)[0]["mode_changes"] == 0

    def test_without_a_base_there_are_no_changes_to_log(self, tiny):
        policy = tiny.policy(stage="finetune").train()
        row = evaluate(policy, tiny.windows(policy.config))[0]
        assert "mode_changes" not in row and {"reconstruction_error", "spread"} <= row.keys()
