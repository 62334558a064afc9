"""Small heads with weights of any size."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fm_policy.residual.control_synth import ControlSynth

ACTION_DIM, OBS_DIM, HORIZON = 3, 5, 4


def head(std: float | None = None, seed: int = 0, **changes) -> ControlSynth:
    """A head in double precision, at its start or with weights drawn anew with the standard deviation `std`."""
    torch.manual_seed(seed)
    made = ControlSynth(ACTION_DIM, OBS_DIM, HORIZON, **({"width": 6, "input_width": 8} | changes)).double()
    if std is not None:
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=std)
    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makers: `head`, `normal`; and the sizes `ACTION_DIM`, `OBS_DIM`, `HORIZON`."""
    return SimpleNamespace(head=head, normal=normal, ACTION_DIM=ACTION_DIM, OBS_DIM=OBS_DIM, HORIZON=HORIZON)
