"""Which range each element of a tensor belongs to: one for all, one for a slice, one for a run of a slice.

A slice is what one index of ``axis`` selects, or the whole tensor; its elements are numbered in C order of
the dimensions that are left. A run is ``group`` consecutive elements of a slice, the last one maybe fewer;
runs never cross slices, and all slices have the same ones. After a cut runs have lengths of their own: where
elements of one run are no longer neighbours, both pieces keep the range that they had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ScaleGroups"]


@dataclass(frozen=True)
class ScaleGroups:
    """How a tensor is divided.

    Attributes:
        shape: of the tensor.
        axis: dimension whose slices are divided on their own; None for one slice.
        group: elements of a run; None for slices in one piece.
        lengths: int64, of each run of a slice, where they are not those that ``group`` says.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    group: int | None = None
    lengths: Tensor | None = None

    @property
    def rest(self) -> tuple[int, ...]:
        """Shape of a slice."""
        return self.shape if self.axis is None else self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def runs(self) -> int | None:
        """Runs of a slice; None where slices are in one piece."""
        if self.lengths is not None:
            return len(self.lengths)
        return None if self.group is None else -(-math.prod(self.rest) // self.group)

    @property
    def ranges(self) -> tuple[int, ...]:
        """Shape of a tensor with one entry for each range: (), (slices,), (runs,) or (slices, runs)."""
        slices = () if self.axis is None else (self.shape[self.axis],)
        return slices if self.runs is None else (*slices, self.runs)

    def index(self) -> Tensor:
        """For each element the number of its range in C order of `ranges`; int64 of `shape`."""
        runs = self.runs
        found = torch.zeros((), dtype=torch.int64)
        if self.axis is not None:
            sizes = [-1 if dim == self.axis else 1 for dim in range(len(self.shape))]
            found = torch.arange(self.shape[self.axis]).view(sizes) * (1 if runs is None else runs)
        if runs is not None:
            run = self._run_of_element()
            found = found + (run if self.axis is None else run.unsqueeze(self.axis))
        return found.expand(self.shape)

    def _run_of_element(self) -> Tensor:
        """int64 of the shape of a slice."""
        count = math.prod(self.rest)
        if self.lengths is not None:
            run = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        else:
            run = torch.arange(count) // (self.group or 1)
        return run.reshape(self.rest)

    def taken(self, dim: int, indices: Tensor) -> tuple[ScaleGroups, Tensor]:
        """What is left where only some indices of a dimension stay.

        Returns:
            The division of the smaller tensor, and for each of its ranges the number of the range that it
            was, int64 of the smaller `ranges`.
        """
        dim %= len(self.shape)
        shape = (*self.shape[:dim], len(indices), *self.shape[dim + 1 :])
        before = torch.arange(math.prod(self.ranges)).reshape(self.ranges)
        if dim == self.axis:
            return ScaleGroups(shape, self.axis, self.group, self.lengths), before.index_select(0, indices)
        if self.runs is None:
            return ScaleGroups(shape, self.axis), before
        within = dim - (self.axis is not None and dim > self.axis)
        run = self._run_of_element().index_select(within, indices).reshape(-1)
        kept, lengths = torch.unique_consecutive(run, return_counts=True)
        # The shape of ranges ends in runs.
        regular = ScaleGroups(shape, self.axis, self.group)
        if regular.runs != len(lengths) or not bool((lengths[:-1] == self.group).all()):
            regular = ScaleGroups(shape, self.axis, self.group, lengths)
        return regular, before.index_select(-1, kept)
