"""Faults that move few samples, and steps that only look like one."""

import pytest
import torch
from torch import Tensor

from cctool.formats.verdict.rare import Far

SAMPLES, PLACES, TRIALS = 256, 3, 8
ALLOWED = torch.ones(PLACES, dtype=torch.float64)


def far(count: int, limits: float = 10.0) -> Far:
    """Errors of some limits at so many samples of place 1."""
    errors = torch.zeros(SAMPLES, PLACES, dtype=torch.float64)
    errors[:count, 1] = limits + torch.arange(count, 0, -1) / 1000
    return Far(errors, ALLOWED)


def movements(one: Far, moved: int = 0, by: float = 100.0) -> Tensor:
    """How far one trial moves the first of the samples that are far off."""
    found = torch.zeros(TRIALS, len(one.samples), PLACES, dtype=torch.float64)
    found[3, :moved] = by
    return found


def network_is_right(asked: Tensor, place: int) -> Tensor:
    return torch.zeros(len(asked), dtype=torch.float64)


def file_is_right(asked: Tensor, place: int) -> Tensor:
    return torch.full((len(asked),), 10.0, dtype=torch.float64)


def test_the_farthest_samples_come_first_and_only_those_beyond_four_limits() -> None:
    errors = torch.zeros(SAMPLES, PLACES)
    errors[7, 2], errors[9, 0], errors[11, 1] = 50.0, 90.0, 3.9
    assert Far(errors, ALLOWED.float()).samples.tolist() == [9, 7]
    assert len(far(100).samples) == 32


@pytest.mark.parametrize(("count", "moved", "found"), [(3, 0, False), (8, 0, True), (8, 5, False)])
def test_what_no_trial_moves_is_a_fault(count: int, moved: int, found: bool) -> None:
    one = far(count)
    coarse = movements(one, len(one.samples))
    fault = one.fault(movements(one, moved), coarse, ALLOWED, network_is_right)
    assert (fault is not None) == found
    if fault is not None:
        assert fault == (1, pytest.approx(10.0, rel=1e-3))


@pytest.mark.parametrize(("largest", "found"), [(2.0, True), (3.0, False)])
def test_what_is_farther_than_steps_go_is_a_fault_at_one_sample(largest: float, found: bool) -> None:
    one = far(1)
    small, large = movements(one, 1, 1.5), movements(one, 1, largest)
    for fine, coarse in ((small, large), (large, small)):
        assert (one.fault(fine, coarse, ALLOWED, network_is_right) is not None) == found


def test_some_limits_hold_whatever_steps_do() -> None:
    one = far(1)
    small = movements(one, 1, 1.5)
    assert one.fault(small, movements(one), ALLOWED, network_is_right) is not None
    assert one.fault(small, movements(one), 20 * ALLOWED, network_is_right) is None


def test_tails_of_rounding_are_no_fault() -> None:
    """Outputs that hardly vary are off by whole ulps, by more of them at some samples than at others."""
    assert not len(far(40, limits=3.0).samples)


def test_float64_may_take_the_side_of_the_file() -> None:
    """The network itself steps at half of the samples, as a program does that rounds like the file."""
    one = far(12)

    def halves(asked: Tensor, place: int) -> Tensor:
        values = network_is_right(asked, place)
        values[::2] = 10.0
        return values

    for sides in (halves, file_is_right, lambda asked, place: None):
        assert one.fault(movements(one), movements(one), ALLOWED, sides) is None


def test_at_most_sixteen_samples_are_asked_in_float64() -> None:
    one, asked = far(40), []

    def sides(which: Tensor, place: int) -> Tensor:
        asked.append(len(which))
        return network_is_right(which, place)

    assert one.fault(movements(one), movements(one), ALLOWED, sides) is not None
    assert asked == [16]
