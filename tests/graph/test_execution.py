"""How networks are run, and what is said of those that do not run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cctool.base.errors import ArchitectureError
from cctool.graph.execution import run_at_once


class OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(x.reshape(1, -1))
        return found


def test_a_network_of_single_inputs_is_told_from_one_of_another_size() -> None:
    assert run_at_once(OneAtATime(), torch.zeros(1, 3, 4, 4)).shape == (1, 3)
    with pytest.raises(
        ArchitectureError, match=r"^the network runs on one input of 3x4x4, but not on 5 at once"
    ):
        run_at_once(OneAtATime(), torch.zeros(5, 3, 4, 4))
    for count in (1, 5):
        with pytest.raises(ArchitectureError, match=r"does not run on inputs of 3x4x5 .*--input"):
            run_at_once(OneAtATime(), torch.zeros(count, 3, 4, 5))
