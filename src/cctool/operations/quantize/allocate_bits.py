"""Choosing the bits of each layer from the bytes and the damage of each choice, without any network.

The damage of several layers is taken as the sum of their damages. The Pareto frontier of bytes and damage
grows layer by layer: of all assignments to the layers so far, those are kept that no other beats in both.
The result is exact, not greedy, unless the frontier has to be thinned out.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cctool.base.errors import QuantizationError

# Assignments that are kept between two layers.
_MOST = 8192
_Indices = NDArray[np.intp]


@dataclass(frozen=True)
class LayerChoice:
    """One layer quantized to a number of bits.

    Attributes:
        layer: its name.
        bits: of its weights.
        damage: if only this layer is quantized; 0 or more.
        bytes: of its weights.
    """

    layer: str
    bits: int
    damage: float
    bytes: int


@dataclass(frozen=True)
class Assignment:
    """Bits of each layer by name, and damage and bytes summed over the layers."""

    bits: Mapping[str, int]
    damage: float
    bytes: int


@dataclass(frozen=True)
class MeasuredAssignment:
    """An assignment, and what of the metric was measured to be lost with it."""

    assignment: Assignment
    drop: float


def frontier(choices: Sequence[LayerChoice]) -> tuple[Assignment, ...]:
    """The assignments that no other beats in both bytes and damage, in the order of bytes.

    If there are more than 8,192 after a layer, the range of bytes is divided into as many parts, and each
    part keeps the assignment with the least damage. ``choices`` has at least one for each layer.
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
        # Both numbers of the pair that makes each kept assignment: of the earlier one, and of the choice.
        history.append((kept // len(several), kept % len(several)))
        sizes, damages = all_sizes[kept], all_damages[kept]
    return tuple(
        Assignment(_traced(number, history, list(by_layer.values())), float(damages[number]), int(size))
        for number, size in enumerate(sizes)
    )


def cheapest(choices: Sequence[LayerChoice], limit: int) -> Assignment:
    """The assignment with the least damage whose bytes do not exceed ``limit``.

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
    choices: Sequence[LayerChoice],
    drop: Callable[[Assignment], float],
    most: float,
    shown: Callable[[float], str] = "the metric falls by {:.2f} points".format,
) -> tuple[Assignment, tuple[MeasuredAssignment, ...]]:
    """The assignment of fewest bytes that bisecting the `frontier` finds within a drop of ``most``.

    ``drop`` measures what an assignment loses, and ``shown`` says it; it is called once for each assignment
    that is tried. Accuracy need not fall evenly along the frontier: the result keeps the budget, but an
    assignment with fewer bytes might, too. All trials are returned, in order.

    Raises:
        QuantizationError: if even the assignment with the least damage loses more.
    """
    found = frontier(choices)
    trials: list[MeasuredAssignment] = []

    def within(number: int) -> bool:
        trials.append(MeasuredAssignment(found[number], drop(found[number])))
        return trials[-1].drop <= most

    low, high = 0, len(found) - 1
    if not within(high):
        raise QuantizationError(
            f"--max-drop {most:g}: with the least damage that --choices allow, {shown(trials[-1].drop)}"
        )
    while low < high:
        middle = (low + high) // 2
        if within(middle):
            high = middle
        else:
            low = middle + 1
    return found[high], tuple(trials)


def _unbeaten(sizes: NDArray[np.int64], damages: NDArray[np.float64]) -> _Indices:
    """Indices of the points that no other beats in both, in the order of sizes."""
    # By size, then damage: a point is on the frontier if it damages less than all smaller ones.
    order = np.lexsort((damages, sizes))
    best = np.minimum.accumulate(damages[order])
    better = np.concatenate([[True], best[1:] < best[:-1]])
    kept: _Indices = order[better]
    if len(kept) <= _MOST:
        return kept
    low, high = int(sizes[kept[0]]), int(sizes[kept[-1]])
    part = (sizes[kept] - low) * (_MOST - 1) // max(1, high - low)
    # On the frontier the last of each part has the least damage. The smallest assignment is always kept,
    # so that whatever fits in bytes is found.
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
