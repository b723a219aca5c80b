"""Faults that move few samples, and steps that only look like one."""

import pytest
import torch
from torch import Tensor

from cctool.formats.rare import Off

SAMPLES, PLACES, TRIALS = 64, 3, 8


def off(count: int, stepping: int = 0, limits: float = 10.0) -> Off:
    """Errors of some limits at so many samples of place 1; so many others moved in one trial each."""
    errors, moved = torch.zeros(SAMPLES, PLACES), torch.zeros(TRIALS, SAMPLES, PLACES)
    errors[:count, 1] = limits**2
    for i in range(stepping):
        moved[i % TRIALS, SAMPLES - 1 - i] = 100.0
    return Off(errors.double(), moved.double(), torch.ones(PLACES, dtype=torch.float64))


def wanted() -> Tensor:
    return torch.zeros(SAMPLES, PLACES, 1, dtype=torch.float64)


def network_is_right(asked: Tensor) -> Tensor:
    return wanted()[asked]


@pytest.mark.parametrize(("count", "stepping", "found"), [(3, 0, False), (12, 0, True), (12, 24, False)])
def test_more_samples_than_steps_explain_are_a_fault(count: int, stepping: int, found: bool) -> None:
    fault = off(count, stepping).fault(wanted(), network_is_right)
    assert fault == ((1, 10.0) if found else None)


def test_samples_that_a_trial_moved_do_not_count() -> None:
    both = off(12)
    both.moved[0, :12] = 100.0
    assert not both.which.any()
    assert both.fault(wanted(), network_is_right) is None


def test_tails_of_rounding_are_no_fault() -> None:
    """Outputs that hardly vary are off by whole ulps, by more of them at some samples than at others."""
    assert off(40, limits=3.0).fault(wanted(), network_is_right) is None


def test_float64_may_take_the_side_of_the_file() -> None:
    """The network itself steps at half of the samples, as a program does that rounds like the file."""

    def halves(asked: Tensor) -> Tensor:
        values = network_is_right(asked)
        values[::2] = 10.0
        return values

    assert off(12).fault(wanted(), halves) is None
    assert off(12).fault(wanted(), lambda asked: None) is None


def test_at_most_sixteen_samples_are_asked_in_float64() -> None:
    asked = []

    def exact(which: Tensor) -> Tensor:
        asked.append(len(which))
        return network_is_right(which)

    assert off(40).fault(wanted(), exact) is not None
    assert asked == [16]
