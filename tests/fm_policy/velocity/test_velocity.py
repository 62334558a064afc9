"""Velocity nets: sizes, LeRobot's U-Net with the same weights, conditioning, time."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalUnet1d
from torch import nn

from fm_policy.flow.solvers import call_times, integrate
from fm_policy.velocity import Transformer, Unet1d, interface, unet1d
from fm_policy.velocity.interface import MOST_ROWS, TimeEmbedding

ACTION_DIM, OBS_DIM, HORIZON = 3, 7, 16


def small_nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    nets = {
        "unet": Unet1d(ACTION_DIM, OBS_DIM, (16, 32), kernel_size=3, n_groups=4, time_embed_dim=8),
        "transformer": Transformer(ACTION_DIM, OBS_DIM, HORIZON, dim=16, layers=2, heads=2, dropout=0.1),
    }
    for parameter in nets["transformer"].parameters():  # away from its start, where it is zero
        nn.init.normal_(parameter, std=0.2)
    return {name: net.eval() for name, net in nets.items()}


@pytest.mark.parametrize(
    ("action_dim", "obs_dim", "millions"),
    [(9, 60, 66.08), (20, 50, 65.96), (2, 514, 72.58), (2, 2 * 514, 79.95)],
    ids=["kitchen", "transport", "pusht", "pusht-2-steps"],
)
def test_the_papers_unet_has_the_papers_size(action_dim, obs_dim, millions):
    with torch.device("meta"):
        net = Unet1d(action_dim, obs_dim)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_unet_computes_what_lerobots_computes():
    config = DiffusionConfig(
        down_dims=(16, 32, 64),
        diffusion_step_embed_dim=8,
        n_groups=4,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        device="cpu",
    )
    torch.manual_seed(0)
    theirs = DiffusionConditionalUnet1d(config, OBS_DIM)
    ours = Unet1d(ACTION_DIM, OBS_DIM, (16, 32, 64), kernel_size=5, n_groups=8, time_embed_dim=8)
    # LeRobot applies n_groups inside its blocks only and leaves 8 at the last one: use 8 throughout.
    theirs = DiffusionConditionalUnet1d(_with_groups(config, 8), OBS_DIM)
    _copy_weights(theirs, ours)
    x, o = torch.randn(5, HORIZON, ACTION_DIM), torch.randn(5, OBS_DIM)
    steps = torch.tensor([0, 1, 37, 500, 999])
    with torch.no_grad():
        expected = theirs(x, steps, global_cond=o)
        torch.testing.assert_close(ours(steps / 1000, x, o), expected, rtol=1e-4, atol=1e-5)


def _with_groups(config: DiffusionConfig, n_groups: int) -> DiffusionConfig:
    config.n_groups = n_groups
    return config


def _copy_weights(theirs: nn.Module, ours: Unet1d) -> None:
    """Copy by the order in which the data passes through the modules, block by block."""
    pairs = [(theirs.diffusion_step_encoder[1], ours.time_embedding.mlp[0])]
    pairs += [(theirs.diffusion_step_encoder[3], ours.time_embedding.mlp[2])]
    blocks = [(m[i], o[i]) for m, o in zip(theirs.down_modules, ours.down, strict=True) for i in (0, 1)]
    blocks += list(zip(theirs.mid_modules, ours.middle, strict=True))
    blocks += [(m[i], o[i]) for m, o in zip(theirs.up_modules, ours.up, strict=True) for i in (0, 1)]
    for block, mine in blocks:
        pairs += [(block.conv1.block[i], mine.first[i]) for i in (0, 1)]
        pairs += [(block.conv2.block[i], mine.second[i]) for i in (0, 1)]
        pairs += [(block.cond_encoder[1], mine.film), (block.residual_conv, mine.skip)]
    pairs += [(m[2], o) for m, o in zip(theirs.down_modules, ours.shrink, strict=False)]
    pairs += [(m[2], o) for m, o in zip(theirs.up_modules, ours.grow, strict=True)]
    pairs += [(theirs.final_conv[0].block[i], ours.out[0][i]) for i in (0, 1)]
    pairs += [(theirs.final_conv[1], ours.out[1])]
    for source, target in pairs:
        target.load_state_dict(source.state_dict())
    copied = sum(p.numel() for _, target in pairs for p in target.parameters())
    assert copied == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("name", ["unet", "transformer"])
class TestInterface:
    def test_shape_and_batch_equals_loop(self, name):
        net = small_nets()[name]
        x, o, t = torch.randn(4, HORIZON, ACTION_DIM), torch.randn(4, OBS_DIM), torch.rand(4)
        with torch.no_grad():
            v = net(t, x, o)
            rows = torch.cat([net(t[i : i + 1], x[i : i + 1], o[i : i + 1]) for i in range(4)])
        assert v.shape == x.shape
        torch.testing.assert_close(v, rows, rtol=1e-4, atol=1e-5)

    def test_scalar_time_equals_a_batch_of_that_time(self, name):
        net = small_nets()[name]
        x, o = torch.randn(3, HORIZON, ACTION_DIM), torch.randn(3, OBS_DIM)
        with torch.no_grad():
            expected = net(torch.full((3,), 0.25), x, o)
            torch.testing.assert_close(net(0.25, x, o), expected)
            torch.testing.assert_close(net(torch.tensor(0.25), x, o), expected)

    def test_depends_on_time_and_on_observation(self, name):
        net = small_nets()[name]
        x, o = torch.randn(2, HORIZON, ACTION_DIM), torch.randn(2, OBS_DIM)
        with torch.no_grad():
            v = net(0.3, x, o)
            assert (v - net(0.31, x, o)).abs().max() > 1e-4
            assert (v - net(0.3, x, o + 0.1)).abs().max() > 1e-4

    def test_times_that_are_known_are_embedded_at_once_and_change_nothing(self, name, monkeypatch):
        net = small_nets()[name]
        x, o, calls = torch.randn(3, HORIZON, ACTION_DIM), torch.randn(3, OBS_DIM), []
        condition = net.condition
        monkeypatch.setattr(net, "condition", lambda t, o: calls.append(len(t)) or condition(t, o))
        with torch.no_grad():
            expected = integrate(net.bind(o), x, "heun", 4)
            assert calls == [3] * 8
            calls.clear()
            solved = integrate(net.bind(o, call_times("heun", 4)), x, "heun", 4)
        assert calls == [3 * 5]  # 0, 1/4, ... 1
        torch.testing.assert_close(solved, expected, rtol=1e-4, atol=1e-5)

    def test_conditions_of_many_rows_are_computed_as_they_are_asked_for(self, name, monkeypatch):
        net, steps = small_nets()[name], 1 + MOST_ROWS // 3
        x, o, calls = torch.randn(3, HORIZON, ACTION_DIM), torch.randn(3, OBS_DIM), []
        condition = net.condition
        monkeypatch.setattr(net, "condition", lambda t, o: calls.append(len(t)) or condition(t, o))
        with torch.no_grad():
            integrate(net.bind(o, call_times("euler", steps)), x, "euler", steps)
        assert calls == [3] * steps

    def test_another_time_than_the_known_ones_may_be_asked_for(self, name):
        net = small_nets()[name]
        x, o = torch.randn(2, HORIZON, ACTION_DIM), torch.randn(2, OBS_DIM)
        with torch.no_grad():
            v = net.bind(o, (0.0, 0.5))
            for t in (0.3, torch.tensor(0.5), torch.tensor([0.5, 0.7])):
                assert torch.equal(v(t, x), net(t, x, o))

    @pytest.mark.parametrize("steps", [3, MOST_ROWS])
    def test_gradients_through_known_times(self, name, steps):
        net = small_nets()[name].double()
        x, o = torch.randn(2, HORIZON, ACTION_DIM).double(), torch.randn(2, OBS_DIM).double()

        def gradients(times):
            loss = integrate(net.bind(o, times), x, "euler", steps).square().mean()
            return torch.autograd.grad(loss, list(net.parameters()))

        for known, asked in zip(gradients(call_times("euler", steps)), gradients(()), strict=True):
            torch.testing.assert_close(known, asked)

    def test_few_rows_or_many_are_the_same_bit_for_bit(self, name, monkeypatch):
        net, times = small_nets()[name], call_times("euler", 4)
        x, o = torch.randn(48, HORIZON, ACTION_DIM), torch.randn(48, OBS_DIM)
        with torch.no_grad():
            at_once = integrate(net.bind(o, times), x, "euler", 4)
            monkeypatch.setattr(interface, "MOST_ROWS", 0)
            assert torch.equal(integrate(net.bind(o, times), x, "euler", 4), at_once)
            assert torch.equal(integrate(net.bind(o[:16], times), x[:16], "euler", 4), at_once[:16])


def test_time_embedding_tells_close_times_apart():
    embedding = TimeEmbedding(32)
    angles = torch.tensor([0.5, 0.5 + 1 / 64])[:, None] * embedding.frequencies
    features = torch.cat([angles.sin(), angles.cos()], dim=1)
    assert (features[0] - features[1]).norm() > 1  # unscaled times would differ by less than 0.02
    with pytest.raises(ValueError, match="even dimension of at least 4, got 7"):
        TimeEmbedding(7)


def test_transformer_starts_at_zero_velocity():
    net = Transformer(ACTION_DIM, OBS_DIM, HORIZON, dim=16, layers=2, heads=2)
    assert net(0.5, torch.randn(2, HORIZON, ACTION_DIM), torch.randn(2, OBS_DIM)).abs().max() == 0


class TestConvolutionAsProduct:
    """For few rows, and for any where the weights lie channels last, it is torch's convolution, to rounding."""

    @pytest.fixture(autouse=True)
    def _any_processor(self, monkeypatch):
        monkeypatch.setattr(unet1d, "AVX512", False)

    @pytest.mark.parametrize(("inputs", "outputs", "width", "stride"), [(7, 6, 5, 1), (4, 4, 3, 2), (3, 5, 1, 1)])
    @pytest.mark.parametrize(("rows", "laid"), [(1, False), (unet1d.FEW_ROWS, False), (1, True), (9, True)])
    def test_equals_torchs_and_so_does_its_gradient(self, rows, laid, inputs, outputs, width, stride, monkeypatch):
        ours = unet1d.Conv1d(inputs, outputs, width, stride=stride, padding=width // 2).double()
        its = nn.Conv1d(inputs, outputs, width, stride=stride, padding=width // 2).double()
        its.load_state_dict(ours.state_dict())
        unet1d.lay_weights(ours, laid)
        x = torch.randn(rows, inputs, 8, dtype=torch.double, requires_grad=True)
        expected = its(x)
        gradients = torch.autograd.grad(expected.sin().sum(), (x, *its.parameters()))
        monkeypatch.setattr(nn.Conv1d, "forward", lambda *_: pytest.fail("that is torch's"))
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(torch.autograd.grad(ours(x).sin().sum(), (x, *ours.parameters())), gradients)

    def test_many_rows_are_torchs_unless_the_weights_lie_channels_last(self):
        conv, x = unet1d.Conv1d(4, 6, 3, padding=1), torch.randn(unet1d.FEW_ROWS + 1, 4, 8)
        assert torch.equal(conv(x), nn.Conv1d.forward(conv, x))

    def test_laid_weights_are_the_same_weights(self):
        net, x, o = small_nets()["unet"], torch.randn(16, HORIZON, ACTION_DIM), torch.randn(16, OBS_DIM)
        weights = {name: value.clone() for name, value in net.state_dict().items()}
        parameters, conv = list(net.parameters()), net.down[0][0].second[0]
        with torch.no_grad():
            expected = net(0.3, x, o)
            unet1d.lay_weights(net, channels_last=True)
            assert conv.weight.transpose(1, 2).is_contiguous() and not conv.weight.is_contiguous()
            torch.testing.assert_close(net(0.3, x, o), expected, atol=1e-5, rtol=1e-4)
            net.load_state_dict(weights)  # into weights that lie so
            assert conv.weight.transpose(1, 2).is_contiguous()
            assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
            unet1d.lay_weights(net, channels_last=False)
            assert all(value.is_contiguous() for value in net.state_dict().values())
            assert torch.equal(net(0.3, x, o), expected)
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))

    def test_weights_laid_in_inference_mode_can_be_trained(self):
        net, x, o = small_nets()["unet"], torch.randn(16, HORIZON, ACTION_DIM), torch.randn(16, OBS_DIM)
        with torch.inference_mode():
            unet1d.lay_weights(net, channels_last=True)
        net(0.3, x, o).sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    def test_a_row_has_the_same_bits_in_any_multiple_of_16_rows(self):
        net, x, o = small_nets()["unet"], torch.randn(48, HORIZON, ACTION_DIM), torch.randn(48, OBS_DIM)
        unet1d.lay_weights(net, channels_last=True)
        with torch.no_grad():
            assert torch.equal(net(0.3, x[16:32], o[16:32]), net(0.3, x, o)[16:32])

    def test_with_avx_512_the_weights_stay_as_they_lie(self, monkeypatch):
        monkeypatch.setattr(unet1d, "AVX512", True)
        net = small_nets()["unet"]
        unet1d.lay_weights(net, channels_last=True)
        assert all(value.is_contiguous() for value in net.state_dict().values())

    def test_a_row_alone_is_what_it_is_among_many(self):
        net = Unet1d(3, 5, down_dims=(16, 32), n_groups=4, time_embed_dim=16).eval()
        x, o = torch.randn(16, 16, 3), torch.randn(16, 5)
        with torch.no_grad():
            torch.testing.assert_close(net(0.3, x[:1], o[:1]), net(0.3, x, o)[:1], atol=1e-5, rtol=1e-4)

    def test_an_exported_graph_keeps_the_convolution(self):
        conv = unet1d.Conv1d(4, 4, 3, padding=1).eval()
        graph = torch.export.export(conv, (torch.randn(1, 4, 8),)).graph
        assert [node.target for node in graph.nodes if "conv1d" in str(node.target)]
