"""Observation encoders: crops, keypoints, sharing, and no download ever."""

import pytest
import torch
from torch import nn

from fm_policy.encoders import ImageEncoder, ObservationEncoder, SpatialSoftmax, random_crop


def test_random_crop_takes_true_windows_at_different_places():
    torch.manual_seed(0)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij"))  # pixel = its place
    crops = random_crop(grid.expand(64, 2, 8, 9), (5, 4))
    assert crops.shape == (64, 2, 5, 4)
    corners = crops[:, :, 0, 0]
    offsets = grid[:, :5, :4]
    torch.testing.assert_close(crops, corners[:, :, None, None] + offsets)
    assert corners[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert corners[:, 1].unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_crop_is_central_and_steady_outside_training():
    encoder = ImageEncoder(crop_shape=(24, 24)).eval()
    image = torch.randn(1, 3, 32, 32)
    border = image.clone()
    border[..., :4, :] = border[..., -4:, :] = border[..., :4] = border[..., -4:] = 99.0
    with torch.no_grad():
        assert torch.equal(encoder(image), encoder(border))
        encoder.train()
        assert not torch.equal(encoder(image), encoder(border))


def test_weights_lie_channels_last_on_the_robot_alone_and_nothing_else_changes():
    encoder, images = ImageEncoder(), torch.randn(3, 3, 48, 48)
    trained = {name: value.clone() for name, value in encoder.state_dict().items()}
    weight = encoder.trunk[0].weight
    with torch.no_grad():
        expected = encoder(images)
        assert torch.allclose(encoder.eval()(images), expected, rtol=0, atol=1e-5)
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert encoder.train().trunk[0].weight is weight and weight.is_contiguous()
    assert all(torch.equal(value, trained[name]) for name, value in encoder.state_dict().items())


def test_spatial_softmax_finds_the_place_of_a_peak():
    pool = SpatialSoftmax(channels=1, keypoints=1)
    nn.init.constant_(pool.to_keypoints.weight, 1.0)
    nn.init.zeros_(pool.to_keypoints.bias)
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, 1, 6] = 100.0
    torch.testing.assert_close(pool(features), torch.tensor([[-0.5, 0.5]]))  # (row, column) in [-1, 1]


@pytest.mark.parametrize(("keypoints", "dim"), [(0, 512), (32, 64)])
def test_output_dim_and_group_norm(keypoints, dim):
    encoder = ImageEncoder(keypoints=keypoints)
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, dim)
    assert encoder.output_dim == dim
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


def test_images_of_any_size_after_a_resize():
    encoder = ImageEncoder(resize_shape=(64, 64))
    assert encoder(torch.rand(1, 3, 48, 80)).shape == (1, 512)


@pytest.mark.parametrize(("separate", "encoders"), [(False, 1), (True, 2)])
def test_cameras_share_an_encoder_or_have_their_own(separate, encoders):
    cameras = ["observation.images.top", "observation.images.wrist"]
    encoder = ObservationEncoder({"observation.state": 2}, cameras, n_obs_steps=2, separate=separate).eval()
    assert len(encoder.images) == encoders
    assert encoder.output_dim == 2 * (2 + 2 * 512)
    batch = {name: torch.randn(3, 2, 3, 32, 32) for name in cameras} | {"observation.state": torch.randn(3, 2, 2)}
    with torch.no_grad():
        o = encoder(batch)
        swapped = encoder({**batch, cameras[0]: batch[cameras[1]], cameras[1]: batch[cameras[0]]})
    assert o.shape == (3, encoder.output_dim)
    halves = o.view(3, 2, 2 + 1024)[..., 2:].chunk(2, dim=-1)
    equal = torch.allclose(swapped.view(3, 2, 2 + 1024)[..., 2:], torch.cat(halves[::-1], dim=-1), atol=1e-5)
    assert equal is not separate


def test_history_keeps_its_order():
    encoder = ObservationEncoder({"observation.state": 2}, [], n_obs_steps=2)
    state = torch.arange(8.0).view(2, 2, 2)
    assert torch.equal(encoder({"observation.state": state}), state.flatten(1))
