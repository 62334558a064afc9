"""What is drawn is a function of the key and the process's rank, and leaves torch's own generator alone."""

import pytest
import torch

from fm_policy.repeatable import repeatable

CPU = torch.device("cpu")


def drawn(key: tuple[int, ...]) -> torch.Tensor:
    with repeatable(key, CPU):
        return torch.randn(5)


@pytest.fixture
def rank(monkeypatch):
    """Makes this process one of several."""

    def be(number: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: number)

    return be


def test_equal_keys_draw_alike_and_others_do_not():
    assert torch.equal(drawn((1, 2)), drawn((1, 2)))
    assert not torch.equal(drawn((1, 2)), drawn((1, 3)))


def test_every_process_of_a_training_draws_its_own(rank):
    alone = drawn((1, 2))
    rank(0)
    assert torch.equal(drawn((1, 2)), alone)
    rank(1)
    assert not torch.equal(drawn((1, 2)), alone)


def test_what_is_drawn_outside_goes_on_as_if_nothing_had_been():
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    drawn((1, 2))
    assert torch.equal(torch.randn(3), expected)
