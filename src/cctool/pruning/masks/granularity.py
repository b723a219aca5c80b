"""Masks of one weight: which elements form a group, what a group is worth, and which groups are kept.

A weight is treated as [O, I / groups, K]: O output channels, their input channels, and the elements of a
kernel (1 for a matrix); flattened to O rows of I / groups * K columns it is the matrix that `analyze` counts.
The worth of a group is the sum over its elements, so magnitudes rank groups by their l1 norm and squares by
their l2 norm. Exactly k groups are removed, equal ones in the order of their index; at least one is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd

from cctool.options.prune.choices import Granularity
from cctool.options.prune.patterns import Block, Pattern

_FUZZ = 1e-9  # added before rounding down: 0.29 * 100 is 28.999999999999996


def as_filters(tensor: Tensor, module: nn.Module) -> Tensor:
    """A weight of ``module``, or a tensor of its shape, as [O, I / groups, K].

    A transposed convolution's [I, O / groups, ...] is transposed, group by group.
    """
    if tensor.dim() == 2:
        return tensor[:, :, None]
    flat = tensor.flatten(2)
    if isinstance(module, _ConvNd) and module.transposed:
        grouped = flat.reshape(module.groups, -1, *flat.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)
    return flat


def from_filters(filters: Tensor, module: nn.Module, shape: Sequence[int]) -> Tensor:
    """Undo `as_filters` for a weight of this shape."""
    if isinstance(module, _ConvNd) and module.transposed:
        grouped = filters.reshape(module.groups, -1, *filters.shape[1:])
        filters = grouped.transpose(1, 2).flatten(0, 1)
    return filters.reshape(tuple(shape))


@dataclass(frozen=True)
class WeightGroups:
    """The groups of one weight [O, I, K] at one granularity.

    Attributes:
        shape: (O, I, K).
        granularity: which elements form a group; any but channel and nm.
        block: rows and columns of a block; blocks at the edges are smaller.
    """

    shape: tuple[int, int, int]
    granularity: Granularity
    block: Block

    def sums(self, values: Tensor) -> Tensor:
        """Sum of ``values`` [O, I, K] over each group; shape [groups], in the order of the matrix."""
        if self.granularity is Granularity.ELEMENT:
            return values.flatten()
        values = values.double()  # sums of many float32 would tie or swap groups of nearly equal worth
        if self.granularity is Granularity.KERNEL:
            return values.sum(2).flatten()
        if self.granularity is Granularity.ROW:
            return values.sum((1, 2))
        if self.granularity is Granularity.COLUMN:
            return values.sum(0).flatten()
        rows, columns = self._blocks()
        missing = (columns * self.block.columns - values[0].numel(), rows * self.block.rows - self.shape[0])
        matrix = pad(values.flatten(1), (0, missing[0], 0, missing[1]))
        tiles = matrix.reshape(rows, self.block.rows, columns, self.block.columns)
        return tiles.sum((1, 3)).flatten()

    def spread(self, groups: Tensor) -> Tensor:
        """For each element the value of its group in ``groups`` [groups]; shape (O, I, K)."""
        outputs, inputs, kernel = self.shape
        if self.granularity is Granularity.ELEMENT:
            return groups.reshape(self.shape)
        if self.granularity is Granularity.KERNEL:
            return groups.reshape(outputs, inputs, 1).expand(self.shape)
        if self.granularity is Granularity.ROW:
            return groups.reshape(outputs, 1, 1).expand(self.shape)
        if self.granularity is Granularity.COLUMN:
            return groups.reshape(1, inputs, kernel).expand(self.shape)
        tiles = groups.reshape(self._blocks())
        rows = tiles.repeat_interleave(self.block.rows, 0)[:outputs]
        return rows.repeat_interleave(self.block.columns, 1)[:, : inputs * kernel].reshape(self.shape)

    def _blocks(self) -> tuple[int, int]:
        outputs, inputs, kernel = self.shape
        return -(-outputs // self.block.rows), -(-inputs * kernel // self.block.columns)


def groups_of(filters: Tensor, granularity: Granularity, block: Block | None = None) -> WeightGroups:
    """The groups of a weight [O, I, K]; see `WeightGroups`."""
    outputs, inputs, kernel = filters.shape
    return WeightGroups((outputs, inputs, kernel), granularity, block or Block())


def keep_highest(worth: Tensor, rate: float) -> Tensor:
    """Keep all but the floor(rate * n) groups of the lowest worth.

    Args:
        worth: [n], finite; -inf for groups that are removed already, which n does not count.
        rate: fraction of the remaining groups to remove, in [0, 1).

    Returns:
        Bool [n], True is kept.

    >>> keep_highest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.5).tolist()
    [True, False, True, False]
    """
    return keep_highest_together({"": worth}, rate)[""]


def keep_highest_together(worths: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """`keep_highest` over the groups of several weights together; each weight keeps at least its best.

    Groups of equal worth are removed in the order of the weights, then of their index.
    """
    if not worths:
        return {}
    left = {name: worth > -math.inf for name, worth in worths.items()}
    remove = math.floor(rate * sum(int(there.sum()) for there in left.values()) + _FUZZ)
    candidates = []
    for name, worth in worths.items():
        # +inf excludes a group: the best one of each weight, and those that are removed already.
        rivals = worth.clone().masked_fill_(left[name].logical_not(), math.inf)
        if bool(left[name].any()):
            rivals[int(worth.argmax())] = math.inf
        candidates.append(rivals)
    gone = _lowest(torch.cat(candidates), remove)
    kept, start = {}, 0
    for name, there in left.items():
        kept[name] = there.logical_and(gone[start : start + len(there)].logical_not())
        start += len(there)
    return kept


def _lowest(values: Tensor, count: int) -> Tensor:
    """True for the ``count`` lowest values, equal ones in the order of their index; never for +inf."""
    count = min(count, int((values < math.inf).sum()))
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    chosen = values < threshold
    ties = (values == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def pattern_misfit(filters: Tensor, pattern: Pattern) -> str:
    """Why an N:M pattern does not fit a weight [O, I, K]; "" where it does."""
    inputs = filters.shape[1]
    if inputs == 1:
        return f"one input channel for each output: nothing for {pattern.keep}:{pattern.of} to choose among"
    if inputs % pattern.of:
        return f"its input dim of {inputs} is not a multiple of {pattern.of}"
    return ""


def keep_pattern(worth: Tensor, pattern: Pattern) -> Tensor:
    """Of every M neighbours along the input dim keep the N of the highest worth, for each kernel element.

    Args:
        worth: [O, I, K], I a multiple of M; of equal elements the first are removed.
        pattern: N and M.

    Returns:
        Bool [O, I, K], True is kept (Mishra et al. 2021, arXiv 2104.08378, section 3, for 2:4).
    """
    outputs, inputs, kernel = worth.shape
    fours = worth.reshape(outputs, inputs // pattern.of, pattern.of, kernel)
    order = fours.argsort(dim=2, stable=True)  # stable: the same choice on every machine
    kept = torch.ones_like(fours, dtype=torch.bool)
    kept.scatter_(2, order[:, :, : pattern.of - pattern.keep], False)
    return kept.reshape(worth.shape)


def pattern_holds(filters: Tensor, pattern: Pattern) -> bool:
    """Whether at most N of every M neighbours along the input dim of a weight [O, I, K] are non-zero."""
    outputs, inputs, kernel = filters.shape
    if inputs % pattern.of:
        return False
    fours = (filters != 0).reshape(outputs, inputs // pattern.of, pattern.of, kernel)
    return bool((fours.sum(2) <= pattern.keep).all())
