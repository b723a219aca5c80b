"""Choosing bits for each layer from what each choice costs and damages: no network is looked at here.

The damage of several layers is taken for the sum of their damages. What cannot be improved without more bytes
is found layer by layer: of all assignments of the layers so far, only those stay that no other beats in both
bytes and damage. So the choice is exact, not greedy, as long as few enough are left.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cctool.base.errors import QuantizationError

_MOST = 8192
_Indices = NDArray[np.intp]


@dataclass(frozen=True)
class LayerChoice:
    """One layer with so many bits.

    Attributes:
        layer: its name.
        bits: of its weights.
        damage: when only this layer is quantized; 0 or more.
        bytes: that its weights take then.
    """

    layer: str
    bits: int
    damage: float
    bytes: int


@dataclass(frozen=True)
class Assignment:
    """Bits of all layers.

    Attributes:
        bits: by layer.
        damage: sum over layers.
        bytes: sum over layers.
    """

    bits: Mapping[str, int]
    damage: float
    bytes: int


@dataclass(frozen=True)
class MeasuredAssignment:
    """An assignment whose accuracy was measured.

    Attributes:
        assignment: the bits.
        drop: percentage points that were lost.
    """

    assignment: Assignment
    drop: float


def frontier(choices: Sequence[LayerChoice]) -> tuple[Assignment, ...]:
    """The assignments that no other beats in both bytes and damage, by bytes.

    Where there are more than 8,192 while layers are added, the range of bytes is divided into so many parts
    and each keeps the one with the least damage.

    Args:
        choices: at least one for each layer.
    """
    by_layer: dict[str, list[LayerChoice]] = {}
    for choice in choices:
        by_layer.setdefault(choice.layer, []).append(choice)
    sizes, damages = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[_Indices, _Indices]] = []
    for several in by_layer.values():
        more = np.array([choice.bytes for choice in several], dtype=np.int64)
        harm = np.array([choice.damage for choice in several], dtype=np.float64)
        all_sizes = (sizes[:, None] + more).reshape(-1)
        all_damages = (damages[:, None] + harm).reshape(-1)
        kept = _unbeaten(all_sizes, all_damages)
        history.append((kept // len(several), kept % len(several)))
        sizes, damages = all_sizes[kept], all_damages[kept]
    return tuple(
        Assignment(_traced(number, history, list(by_layer.values())), float(damages[number]), int(size))
        for number, size in enumerate(sizes)
    )


def cheapest(choices: Sequence[LayerChoice], limit: int) -> Assignment:
    """The assignment of the least damage that fits.

    Args:
        choices: at least one for each layer.
        limit: bytes of all layers.

    Raises:
        QuantizationError: if none fits.
    """
    found = frontier(choices)
    fitting = bisect.bisect_right([assignment.bytes for assignment in found], limit)
    if not fitting:
        raise QuantizationError(
            f"even with the fewest bits of --choices the quantized weights take {found[0].bytes:,} bytes, "
            f"and {limit:,} are left for them"
        )
    return found[fitting - 1]


def fewest_bytes(
    choices: Sequence[LayerChoice], drop: Callable[[Assignment], float], most: float
) -> tuple[Assignment, tuple[MeasuredAssignment, ...]]:
    """The assignment of the fewest bytes that bisection finds within a measured drop.

    The assignments of `frontier` are bisected, from the one with the least damage to the one with the fewest
    bytes. Each that is looked at is really measured, once; accuracy need not fall evenly along them, so what
    is found holds the budget, but one with fewer bytes may, too.

    Args:
        choices: at least one for each layer.
        drop: measures how many percentage points an assignment loses.
        most: that may be lost.

    Returns:
        The assignment, and all trials in order.

    Raises:
        QuantizationError: if even the least damage loses more.
    """
    found = frontier(choices)
    trials: list[MeasuredAssignment] = []

    def within(number: int) -> bool:
        trials.append(MeasuredAssignment(found[number], drop(found[number])))
        return trials[-1].drop <= most

    low, high = 0, len(found) - 1
    if not within(high):
        raise QuantizationError(
            f"--max-drop {most:g}: with the least damage that --choices allow, validation top-1 falls by "
            f"{trials[-1].drop:.2f} points"
        )
    while low < high:
        middle = (low + high) // 2
        if within(middle):
            high = middle
        else:
            low = middle + 1
    return found[high], tuple(trials)


def _unbeaten(sizes: NDArray[np.int64], damages: NDArray[np.float64]) -> _Indices:
    """Indices of what nothing beats in both, by size."""
    order = np.lexsort((damages, sizes))
    best = np.minimum.accumulate(damages[order])
    better = np.concatenate([[True], best[1:] < best[:-1]])
    kept: _Indices = order[better]
    if len(kept) <= _MOST:
        return kept
    low, high = int(sizes[kept[0]]), int(sizes[kept[-1]])
    part = (sizes[kept] - low) * (_MOST - 1) // max(1, high - low)
    # Along the frontier the last of each part has the least damage; the smallest one stays reachable.
    last = np.concatenate([part[1:] != part[:-1], [True]])
    last[0] = True
    thinned: _Indices = kept[last]
    return thinned


def _traced(
    number: int, history: Sequence[tuple[_Indices, _Indices]], layers: Sequence[Sequence[LayerChoice]]
) -> dict[str, int]:
    bits: dict[str, int] = {}
    for (before, chosen), several in zip(reversed(history), reversed(layers), strict=True):
        choice = several[int(chosen[number])]
        bits[choice.layer] = choice.bits
        number = int(before[number])
    return dict(reversed(bits.items()))
