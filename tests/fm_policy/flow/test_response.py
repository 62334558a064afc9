"""Responses of maps whose factors are known."""

import pytest
import torch

from fm_policy.flow.response import directions, response, rms

SIZES = [0.01, 0.3, 2.0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rms_is_per_number_of_a_row():
    assert rms(torch.tensor([[[3.0], [4.0]], [[0.0], [2.0]]])) == pytest.approx([12.5**0.5, 2**0.5])


def test_directions_have_size_one_and_are_those_of_the_seed():
    drawn = directions((50, 16, 2), generator())
    assert rms(drawn) == pytest.approx(torch.ones(50))
    assert torch.equal(drawn, directions((50, 16, 2), generator()))
    assert not torch.equal(drawn, directions((50, 16, 2), generator(1)))


def test_factor_of_a_linear_map_is_that_of_its_matrix_whatever_the_size():
    a = torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    x, d = torch.randn(2, 8, 6, generator=generator(1), dtype=torch.float64)
    measured = response(lambda size: (x + size * d) @ a.T + 3, SIZES)
    factor = (d @ a.T).square().mean(dim=1).sqrt()
    for size, change in zip(SIZES, measured, strict=True):
        assert change / size == pytest.approx(factor, rel=1e-10)


def test_mean_square_factor_over_directions_is_the_mean_square_singular_value():
    singular = torch.tensor([3.0, 1.0, 0.1, 0.0])
    measured = response(lambda size: size * directions((4000, 4), generator()) * singular, [0.5])[0] / 0.5
    assert measured.square().mean().item() == pytest.approx(singular.square().mean().item(), rel=0.05)


def test_what_leads_nowhere_changes_nothing():
    x = torch.randn(5, 3, generator=generator())
    assert response(lambda size: (x + size).sin(), [0.0]).tolist() == [[0.0] * 5]
    assert response(lambda size: x.clone(), SIZES).tolist() == [[0.0] * 5] * 3
