"""Latency: counted runs, modes and devices; no time is ever asserted."""

import pytest
import torch
from torch import nn

from cctool.analysis.latency import compare, measure_latency
from cctool.base.errors import ArchitectureError


class Counting(nn.Module):
    """Counts its calls and remembers modes and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: list[tuple[tuple[int, ...], bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((tuple(x.shape), self.training))
        return self.layer(x.flatten(1))  # type: ignore[no-any-return]


def test_runs_are_counted_and_the_network_is_left_as_it_was() -> None:
    model = Counting().train()
    found = measure_latency(model, (1, 2, 2), batch=3, seconds=0.0)
    assert found.runs == 3
    assert len(model.seen) == 5  # two warm it up
    assert set(model.seen) == {((3, 1, 2, 2), False)}
    assert model.training
    assert (found.batch, found.device) == (3, "cpu")
    assert 0 < found.fastest <= found.milliseconds


def test_networks_take_turns() -> None:
    first, second = Counting(), Counting()
    one, other = compare([first, second], (1, 2, 2), seconds=0.0)
    assert one.runs == other.runs
    assert len(first.seen) == len(second.seen)


def test_the_number_of_runs_is_bounded() -> None:
    assert measure_latency(Counting(), (1, 2, 2), seconds=1e9).runs == 50


def test_a_wrong_size_says_which_option_sizes_it() -> None:
    with pytest.raises(ArchitectureError, match="--input"):
        measure_latency(Counting(), (1, 3, 3))
