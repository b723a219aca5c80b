"""Which range each element of a tensor belongs to: one for all, one per slice, or one per run of a slice.

A slice is what one index of ``axis`` selects, or the whole tensor; its elements are numbered in C order of
the other dimensions. A run is ``group`` consecutive elements of a slice; the last one may be shorter. Runs
never cross slices, and are the same in all slices. After a cut runs have individual lengths: where elements
of a run are no longer adjacent, both pieces keep the range of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleGroups:
    """How a tensor is divided.

    Attributes:
        shape: of the tensor.
        axis: dimension whose slices are divided separately; None for one slice.
        group: elements of a run; None for undivided slices.
        lengths: int64, of each run of a slice, if they are not those that follow from ``group``.
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
        """Runs per slice; None for undivided slices."""
        if self.lengths is not None:
            return len(self.lengths)
        return None if self.group is None else -(-math.prod(self.rest) // self.group)

    @property
    def ranges(self) -> tuple[int, ...]:
        """Shape of a tensor with one entry per range: (), (slices,), (runs,) or (slices, runs)."""
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
        """int64 in the shape of a slice."""
        count = math.prod(self.rest)
        if self.lengths is not None:
            run = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        else:
            run = torch.arange(count) // (self.group or 1)
        return run.reshape(self.rest)

    def taken(self, dim: int, indices: Tensor) -> tuple[ScaleGroups, Tensor]:
        """The division after a cut to some indices of a dimension.

        Returns:
            The division of the smaller tensor, and for each of its ranges the number of its former range,
            int64 in the shape of the smaller `ranges`.
        """
        dim %= len(self.shape)
        shape = (*self.shape[:dim], len(indices), *self.shape[dim + 1 :])
        before = torch.arange(math.prod(self.ranges)).reshape(self.ranges)
        if dim == self.axis:
            return ScaleGroups(shape, self.axis, self.group, self.lengths), before.index_select(0, indices)
        if self.runs is None:
            return ScaleGroups(shape, self.axis), before
        # The dimension's number within a slice, which lacks ``axis``.
        within = dim - (self.axis is not None and dim > self.axis)
        run = self._run_of_element().index_select(within, indices).reshape(-1)
        kept, lengths = torch.unique_consecutive(run, return_counts=True)
        # Lengths are only stored where they differ from what ``group`` says.
        regular = ScaleGroups(shape, self.axis, self.group)
        if regular.runs != len(lengths) or not bool((lengths[:-1] == self.group).all()):
            regular = ScaleGroups(shape, self.axis, self.group, lengths)
        return regular, before.index_select(-1, kept)
