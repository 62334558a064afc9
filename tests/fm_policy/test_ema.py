"""The moving average: its recursion by hand, and diffusers' EMAModel beside it."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from fm_policy.ema import ema_decay, ema_update


def test_first_update_copies_and_the_next_follow_the_schedule():
    assert ema_decay(1) == 0.0
    assert ema_decay(2) == pytest.approx(1 - 2**-0.75)
    assert ema_decay(10_000_000) == 0.9999
    with pytest.raises(ValueError, match="counted from 1, got 0"):
        ema_decay(0)


def test_recursion_by_hand():
    live, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    expected = average.weight.item()
    for update, weight in enumerate([2.0, -1.0, 5.0, 0.5], start=1):
        nn.init.constant_(live.weight, weight)
        decay = ema_decay(update)
        ema_update(average, live, decay)
        expected = decay * expected + (1 - decay) * weight
        assert average.weight.item() == pytest.approx(expected, rel=1e-6)


def test_equals_diffusers():
    torch.manual_seed(0)
    live = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    average = copy.deepcopy(live)
    reference = EMAModel(live.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)
    for update in range(1, 40):
        for parameter in live.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        reference.step(live.parameters())
        ema_update(average, live, ema_decay(update))
    for ours, theirs in zip(average.parameters(), reference.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_buffers_are_copied():
    live, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    live(torch.randn(8, 2))
    ema_update(average, live, 0.9)
    assert torch.equal(average.running_mean, live.running_mean)
    assert average.num_batches_tracked == 1
