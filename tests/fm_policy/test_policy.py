"""The policy: training, inference, and LeRobot's contract."""

import copy

import pytest
import torch

from fm_policy.ema import ema_decay
from fm_policy.flow.losses import masked_mse
from fm_policy.flow.noise import sample_noise
from fm_policy.velocity import unet1d


def train(policy, batch, steps=3, lr=1e-2):
    optimizer = torch.optim.SGD(policy.get_optim_params(), lr=lr)
    for _ in range(steps):
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.update()


class TestTraining:
    @pytest.mark.parametrize("net", ["unet", "transformer"])
    def test_loss_falls_on_one_batch(self, tiny, net):
        policy = tiny.policy(velocity_net=net, transformer_dropout=0.0)
        batch = tiny.windows(policy.config, size=8)
        optimizer = torch.optim.Adam(policy.get_optim_params(), lr=5e-3)
        losses = []
        for _ in range(250):
            loss, logs = policy.forward(batch)
            losses.append(logs["cfm_loss"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])

    def test_every_trained_parameter_gets_a_gradient_and_the_average_none(self, tiny):
        policy = tiny.policy(input_features={**tiny.VECTORS, **tiny.CAMERAS})
        policy.forward(tiny.windows(policy.config, size=2))[0].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.get_optim_params())
        assert all(p.grad is None for p in policy.ema_net.parameters())

    def test_a_step_is_a_function_of_seed_and_step_alone(self, tiny):
        policy, other = (tiny.policy(velocity_net="transformer", transformer_dropout=0.3) for _ in range(2))
        batch = tiny.windows(policy.config)
        torch.nn.init.normal_(policy.net.velocity.out.weight)
        other.load_state_dict(policy.state_dict())
        first = policy.forward(batch)[0]
        state = torch.get_rng_state()
        second = policy.forward(batch)[0]
        assert first != second
        assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
        other.forward(batch)
        torch.rand(3)  # what LeRobot's loader does when a run is resumed
        assert other.forward(batch)[0] == second
        other.training_steps -= 1
        torch.manual_seed(1)
        assert other.forward(batch)[0] != second

    def test_per_sample_losses_average_to_the_loss(self, tiny):
        policy = tiny.policy().eval()
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][:2, 5:] = True
        mean, _ = policy.forward(batch)
        per_sample, _ = policy.forward(batch, reduction="none")
        assert per_sample.shape == (4,)
        torch.testing.assert_close(per_sample.mean(), mean)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_no_gradient_comes_from_padding(self, tiny, reduction):
        policy = tiny.policy()
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][:, -3:] = True
        velocities = []
        policy.net.velocity.register_forward_hook(lambda _, __, v: (v.retain_grad(), velocities.append(v))[0])
        loss, _ = policy.forward(batch, reduction=reduction)
        loss.sum().backward()
        gradient = velocities[0].grad.abs().sum(dim=(0, 2))
        assert gradient[-3:].max() == 0
        assert gradient[:-3].min() > 0

    def test_padding_reaches_no_loss_of_forward(self, tiny):
        policy = tiny.policy().eval()
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][:] = True
        with pytest.raises(ValueError, match="nothing to learn from"):
            policy.forward(batch)

    def test_forward_leaves_the_batch_alone(self, tiny):
        policy = tiny.policy()
        batch = tiny.windows(policy.config)
        before = copy.deepcopy(batch)
        policy.forward(batch)
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[name], before[name]) for name in batch)

    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_evaluation_mode_logs_what_the_deployed_solver_produces(self, tiny, scale):
        policy = tiny.policy(noise_scale=scale).eval()
        batch = tiny.windows(policy.config)
        batch["action_is_pad"][0, 5:] = True
        starts = []
        hook = policy.ema_net.velocity.register_forward_pre_hook(lambda _, inputs: starts.append(inputs[:2]))
        _, logs = policy.forward(batch)
        hook.remove()
        # One call at random times for the loss; then from noise, for the error and for the spread of 8 noises.
        assert starts[0][0].shape == (4,)
        noise, noises = (x for t, x in starts[1:] if t == 0)
        assert noises.std().item() == pytest.approx(scale, rel=0.1)
        chunk = policy.reconstruct(batch, noise / scale)
        expected = masked_mse(chunk, batch["action"], batch["action_is_pad"])
        assert logs["reconstruction_error"] == pytest.approx(expected.item(), rel=1e-5)
        samples = torch.stack([policy.reconstruct(batch, x0 / scale) for x0 in noises.view(8, 4, 16, 3)])
        assert logs["spread"] == pytest.approx(samples.var(dim=0).mean(dim=(1, 2)).sqrt().mean().item(), rel=1e-4)
        logs = policy.train().forward(batch)[1]
        assert logs["held_out_reconstruction_error"] == pytest.approx(expected.item(), rel=1e-5)
        assert "reconstruction_error" not in logs

    def test_evaluation_mode_draws_the_same_noise_for_ever(self, tiny):
        policy = tiny.policy()
        batch = tiny.windows(policy.config)
        loss, logs = policy.eval().forward(batch)
        torch.manual_seed(3)
        policy.train().forward(batch)
        again, same_logs = policy.eval().forward(batch)
        assert again == loss
        assert same_logs == logs
        assert logs["spread"] > 0

    def test_single_frames_are_refused(self, tiny):
        policy = tiny.policy()
        batch = tiny.windows(policy.config)
        with pytest.raises(ValueError, match=r"'action' must be a window \(B, 16, 3\), got \(4, 3\)"):
            policy.forward({**batch, "action": batch["action"][:, 0]})
        with pytest.raises(ValueError, match="lacks 'observation.state'"):
            policy.forward({name: value for name, value in batch.items() if name != "observation.state"})


class TestEma:
    def test_average_follows_its_recursion_and_serves_inference(self, tiny):
        policy = tiny.policy()
        batch = tiny.windows(policy.config)
        expected = next(policy.net.parameters()).detach().clone()
        for update in range(1, 4):
            train(policy, batch, steps=1)
            decay = ema_decay(update)
            expected = decay * expected + (1 - decay) * next(policy.net.parameters()).detach()
        torch.testing.assert_close(next(policy.ema_net.parameters()), expected)
        assert policy.ema_updates == 3
        assert policy.eval().active_net is policy.ema_net
        assert policy.train().active_net is policy.net

    def test_can_be_switched_off(self, tiny):
        policy = tiny.policy(use_ema=False)
        train(policy, tiny.windows(policy.config))
        assert not any(name.startswith("ema") for name in policy.state_dict())
        assert policy.eval().active_net is policy.net


class TestLayout:
    """Channels last is for acting: an optimiser's tensors lie as the weights do, and LeRobot saves contiguous ones."""

    @pytest.fixture(autouse=True)
    def _any_processor(self, monkeypatch):
        monkeypatch.setattr(unet1d, "AVX512", False)

    def test_a_policy_that_acts_has_it_and_one_in_training_has_not(self, tiny):
        policy = tiny.policy()
        weights = [net.velocity.down[0][0].second[0].weight for net in (policy.net, policy.ema_net)]
        assert all(weight.is_contiguous() for weight in weights)
        policy.eval()
        assert not any(weight.is_contiguous() for weight in weights)
        policy.train()
        assert all(weight.is_contiguous() for weight in weights)
        assert weights[0] is policy.net.velocity.down[0][0].second[0].weight

    def test_what_a_trainer_trains_never_has_it(self, tiny):
        policy = tiny.finetuning(use_ema=True)
        copies = policy.base_net, policy.ema_net
        for mode in (True, False, True):
            policy.train(mode)
            assert all(parameter.is_contiguous() for parameter in policy.get_optim_params())
            lie = [net.velocity.down[0][0].second[0].channels_last for net in copies]
            assert lie == [True, not mode]

    def test_a_checkpoint_of_either_is_the_same(self, tiny, tmp_path):
        policy = tiny.policy()
        policy.save_pretrained(tmp_path / "trained")
        policy.eval().save_pretrained(tmp_path / "acting")
        files = [tmp_path / name / "model.safetensors" for name in ("trained", "acting")]
        assert files[0].read_bytes() == files[1].read_bytes()


class TestInference:
    @pytest.mark.parametrize("net", ["unet", "transformer"])
    @pytest.mark.parametrize(("solver", "nfe"), [("euler", 4), ("heun", 8), ("rk4", 16)])
    def test_nfe_counts_the_calls_of_the_net(self, tiny, net, solver, nfe):
        policy = tiny.policy(velocity_net=net, solver=solver).eval()
        calls = []
        policy.ema_net.velocity.register_forward_hook(lambda *_: calls.append(1))
        encodings = []
        policy.ema_net.encoder.register_forward_hook(lambda *_: encodings.append(1))
        policy.predict_action_chunk(tiny.frame(policy.config))
        assert len(calls) == policy.nfe == policy.config.nfe == nfe
        assert len(encodings) == 1

    def test_dopri5_counts_too(self, tiny):
        policy = tiny.policy(solver="dopri5").eval()
        policy.predict_action_chunk(tiny.frame(policy.config))
        assert policy.nfe > 6

    def test_given_noise_or_seed_makes_it_deterministic(self, tiny):
        policy = tiny.policy().eval()
        frame = tiny.frame(policy.config)

        def chunk(seed):
            return policy.predict_action_chunk(frame, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(chunk(5), chunk(5))
        assert not torch.equal(chunk(5), chunk(6))
        noise = sample_noise((4, 16, 3), torch.Generator().manual_seed(5))
        assert torch.equal(policy.predict_action_chunk(frame, noise=noise), chunk(5))

    def test_the_noise_of_a_policy_that_acts_is_scaled_and_that_of_flow_matching_is_not(self, tiny):
        torch.manual_seed(0)
        policy = tiny.policy().eval()
        frame, windows, noise = tiny.frame(policy.config), tiny.windows(policy.config), torch.randn(4, 16, 3)

        def drawn():
            return policy.predict_action_chunk(frame, generator=torch.Generator().manual_seed(5))

        def loss():
            policy.training_steps.zero_()  # which with the seed decides what is drawn
            torch.manual_seed(1)
            return policy.train()(windows)[0].item()

        expected = policy.predict_action_chunk(frame, noise=0.5 * noise), policy.reconstruct(windows, 0.5 * noise)
        whole, before = drawn(), loss()
        policy.eval().config.noise_scale = 0.5
        assert torch.equal(policy.predict_action_chunk(frame, noise=noise), expected[0])
        assert torch.equal(policy.reconstruct(windows, noise), expected[1])
        assert not torch.equal(drawn(), whole)
        assert loss() == before

    @pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
    def test_a_scale_of_noise_that_none_is_is_refused(self, tiny, scale):
        with pytest.raises(ValueError, match=f"noise_scale must be finite and 0 or more, got {scale}"):
            tiny.policy(noise_scale=scale)

    def test_a_raw_frame_stands_for_the_whole_history(self, tiny):
        policy = tiny.policy(n_obs_steps=2).eval()
        frame = tiny.frame(policy.config)
        history = {name: torch.stack([frame[name]] * 2, dim=1) for name in policy.config.input_features}
        noise = torch.randn(4, 16, 3)
        chunk = policy.predict_action_chunk(frame, noise=noise)
        assert chunk.shape == (4, 15, 3)
        torch.testing.assert_close(chunk, policy.predict_action_chunk(history, noise=noise))

    def test_select_action_executes_chunks_of_the_true_history(self, tiny):
        policy = tiny.policy(n_obs_steps=2, n_action_steps=3).eval()
        frames = [tiny.frame(policy.config, seed=seed) for seed in range(5)]
        noise = [torch.randn(4, 16, 3) for _ in range(2)]
        names = list(policy.config.input_features)
        first = policy.predict_action_chunk(frames[0], noise=noise[0])
        history = {name: torch.stack([frames[2][name], frames[3][name]], dim=1) for name in names}
        second = policy.predict_action_chunk(history, noise=noise[1])
        policy.reset()
        actions = [policy.select_action(frame, noise=noise[step // 3]) for step, frame in enumerate(frames)]
        expected = torch.cat([first[:, :3], second[:, :2]], dim=1)
        torch.testing.assert_close(torch.stack(actions, dim=1), expected)

    def test_reset_forgets_history_and_queue(self, tiny):
        policy = tiny.policy(n_obs_steps=2).eval()
        noise = torch.randn(4, 16, 3)
        fresh = policy.select_action(tiny.frame(policy.config, seed=1), noise=noise)
        policy.reset()
        policy.select_action(tiny.frame(policy.config, seed=2))
        policy.reset()
        assert torch.equal(policy.select_action(tiny.frame(policy.config, seed=1), noise=noise), fresh)

    def test_builds_no_graph(self, tiny):
        policy = tiny.policy().eval()
        assert not policy.select_action(tiny.frame(policy.config)).requires_grad
        assert not policy.predict_action_chunk(tiny.frame(policy.config)).requires_grad

    @pytest.mark.parametrize("entry", ["select_action", "predict_action_chunk"])
    def test_bad_observations_are_refused_by_name(self, tiny, entry):
        policy = tiny.policy(input_features={**tiny.VECTORS, **tiny.CAMERAS}).eval()
        good = tiny.frame(policy.config)
        call = getattr(policy, entry)
        cases = {
            r"lacks \['observation.images.wrist'\]": {"observation.images.wrist": None},
            "'observation.state' must have the shape": {"observation.state": torch.zeros(4, 7)},
            "'observation.images.top' must have the shape": {"observation.images.top": torch.zeros(4, 3, 30, 32)},
            "'observation.environment_state' holds NaN": {
                "observation.environment_state": torch.full((4, 5), torch.nan)
            },
            "'observation.images.top' holds NaN": {"observation.images.top": torch.full((4, 3, 32, 32), torch.inf)},
        }
        for message, bad in cases.items():
            policy.reset()
            with pytest.raises(ValueError, match=message):
                call({**good, **bad})

    def test_a_refused_observation_is_no_part_of_the_history(self, tiny):
        policy = tiny.policy(n_obs_steps=2, n_action_steps=2).eval()
        good = tiny.frame(policy.config)
        chunk = torch.randn(4, 16, 3)
        first = policy.select_action(good, noise=chunk)
        for bad in (torch.full((4, 2), torch.nan), torch.zeros(4, 7)):  # in mid-chunk, where no net would meet it
            with pytest.raises(ValueError, match="'observation.state'"):
                policy.select_action(good | {"observation.state": bad})
        policy.select_action(good)
        assert torch.equal(policy.select_action(good, noise=chunk), first)

    def test_bad_noise_and_a_changed_batch_size_are_refused(self, tiny):
        policy = tiny.policy().eval()
        with pytest.raises(ValueError, match=r"noise must have the shape \(4, 16, 3\), got \(4, 8, 3\)"):
            policy.predict_action_chunk(tiny.frame(policy.config), noise=torch.randn(4, 8, 3))
        policy.select_action(tiny.frame(policy.config))
        with pytest.raises(ValueError, match="from 4 to 2"):
            policy.select_action(tiny.frame(policy.config, size=2))

    def test_two_cameras_of_any_size_after_a_resize(self, tiny):
        policy = tiny.policy(input_features=tiny.CAMERAS, resize_shape=(32, 32)).eval()
        frame = tiny.frame(policy.config) | {"observation.images.top": torch.rand(4, 3, 48, 64)}
        assert policy.predict_action_chunk(frame).shape == (4, 16, 3)
