"""The velocity of images, and heads behind it."""

import pytest
import torch

from fm_policy.images.net import HEAD_SPAN, HEAD_STEPS, HEADS, ImageFlow, Shape, Unet2d
from fm_policy.images.recipes import PLANS

SMALL = Shape((8,), groups=4)
IMAGE = (4, 6, 2)


def noise(count=3):
    return torch.randn(count, 24, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestUnet2d:
    def test_pixels_lie_row_by_row_and_times_are_scaled(self):
        net, x = Unet2d(IMAGE, SMALL), noise()
        pictures = x.view(3, 4, 6, 2).permute(0, 3, 1, 2)
        expected = net.net(pictures, torch.full((3,), 700.0)).sample.permute(0, 2, 3, 1).reshape(3, 24, 2)
        torch.testing.assert_close(net(0.7, x), expected)
        assert not torch.allclose(net(0.1, x), expected)

    def test_a_time_for_all_or_for_each(self):
        net, x = Unet2d(IMAGE, SMALL), noise()
        each = torch.tensor([0.0, 0.3, 1.0])
        one_by_one = torch.cat([net(t.item(), x[n : n + 1]) for n, t in enumerate(each)])
        torch.testing.assert_close(net(each, x), one_by_one)

    def test_refuses_an_attention_without_a_whole_head(self):
        with pytest.raises(ValueError, match=r"levels that attend need multiples of 64 channels, got \(64, 32\)"):
            Shape((64, 32), attention=(0,))

    def test_cifar10_has_the_paper_s_size(self):
        """Tong et al.'s net has 35.7 million parameters; diffusers' of the same settings is near it."""
        with torch.device("meta"):
            net = Unet2d((32, 32, 3), PLANS["cifar10"].shape)
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(35.7e6, rel=0.03)


class TestImageFlow:
    @pytest.mark.parametrize("head", ["", *HEADS])
    def test_counts_the_flow_s_calls_alone(self, head):
        model = ImageFlow(IMAGE, SMALL, head)
        with torch.no_grad():
            assert model.solve_counted(noise(), "euler", 5)[1] == 5
            assert model.solve_counted(noise(), "dopri5", 1)[1] > 10

    def test_the_unet_head_starts_as_the_flow_itself(self):
        torch.manual_seed(0)
        plain = ImageFlow(IMAGE, SMALL)
        headed = ImageFlow(IMAGE, SMALL, "unet")
        headed.flow.load_state_dict(plain.flow.state_dict())
        with torch.no_grad():
            assert torch.equal(headed.solve(noise(), "euler", 3), plain.solve(noise(), "euler", 3))

    def test_control_synth_couples_all_pixels_of_a_small_image_and_starts_near_the_flow(self):
        model = ImageFlow(IMAGE, SMALL, "control_synth")
        assert model.head.system().n == 48
        with torch.no_grad():
            before = ImageFlow.solve(model, noise(), "euler", 3)
            model.head = None
            after = model.solve(noise(), "euler", 3)
        assert 0 < (before - after).abs().max() < 0.3 * after.abs().max()

    def test_of_a_large_image_each_pixel_follows_its_own_system(self):
        assert ImageFlow((32, 32, 3), SMALL, "control_synth").head.system().n == 3

    @pytest.mark.parametrize("head", HEADS)
    def test_behind_a_head_the_flow_learns_nothing(self, head):
        model = ImageFlow(IMAGE, SMALL, head)
        model.solve(noise(), "euler", 2).square().mean().backward()
        assert all(p.grad is None for p in model.flow.parameters())
        assert any(p.grad is not None and p.grad.any() for p in model.head.parameters())

    def test_the_head_runs_from_one_to_its_span(self):
        """dx/dt = A x of a ControlSynth without its other terms: `HEAD_STEPS` Euler steps over `HEAD_SPAN`."""
        model = ImageFlow(IMAGE, SMALL, "control_synth")
        with torch.no_grad():
            x = noise()
            end = model.solve(x, "euler", 1)
            v, state = model.head.bind(torch.zeros(1, 1)), x + model.flow(0.0, x)
            for n in range(HEAD_STEPS):
                state = state + HEAD_SPAN / HEAD_STEPS * v(1 + n * HEAD_SPAN / HEAD_STEPS, state)
        torch.testing.assert_close(end, state)

    def test_refuses_an_unknown_head(self):
        with pytest.raises(ValueError, match=r"head must be one of \['unet', 'control_synth'\], got 'mlp'"):
            ImageFlow(IMAGE, SMALL, "mlp")
