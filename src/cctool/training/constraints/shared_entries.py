"""Weights that share an entry of a codebook keep sharing it: the fine-tuning of Deep Compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cctool.base.errors import TrainingError
from cctool.training.constraints.base import Constraint


@dataclass(frozen=True)
class SharedWeights:
    """Which weights of a parameter share a value.

    Attributes:
        parameter: what is trained.
        entries: int64 of its shape: weights with the same number, from 0, share a value; those with -1 share
            theirs with none.
    """

    parameter: nn.Parameter
    entries: Tensor


class KeepCodebooks(Constraint):
    """Averages gradients of weights that share an entry, before clipping, and the weights after a step.

    Han et al. 2016 (section 3.3, figure 3) sum these gradients, which gives the gradient of the entry itself.
    The average is that sum divided by the number of weights that share the entry. Entries then move as fast
    as single weights, so that a learning rate for weights fits; optimizers that divide by the size of
    gradients, such as Adam, make nearly the same steps with either. Which weight has which entry never
    changes.

    Weights of one entry have the same value, gradient and optimizer state, and a step should keep them equal.
    Roundings of vectorised code, or an optimizer that mixes weights, may not: so the weights are averaged, as
    differences to one of them, which leaves equal values exactly as they are.

    Args:
        shared: parameters; `fit` trains these same objects.

    Raises:
        TrainingError: if entries have another shape than their parameter.
    """

    name = "codebooks"

    def __init__(self, shared: Sequence[SharedWeights]) -> None:
        self._tables = [_EntryTable(one) for one in shared]

    def epoch(self, epoch: int) -> None:
        """Move the numbers of the entries to the parameters' devices."""
        for table in self._tables:
            table.move()

    def gradients(self) -> None:
        """Average gradients."""
        for table in self._tables:
            gradient = table.parameter.grad
            if gradient is not None:
                table.average(gradient)

    def weights(self) -> None:
        """Average weights; called without gradients."""
        for table in self._tables:
            table.average(table.parameter, from_first=True)


class _EntryTable:
    """Members of the entries of one parameter; weights without one are put into an entry after the last."""

    def __init__(self, shared: SharedWeights) -> None:
        self.parameter = shared.parameter
        if shared.entries.shape != self.parameter.shape:
            raise TrainingError(
                f"entries of shape {list(shared.entries.shape)} for weights of {list(self.parameter.shape)}"
            )
        given = shared.entries.reshape(-1)
        alone = int(given.max()) + 1 if given.numel() else 0
        self.alone = shared.entries < 0
        self.index = torch.where(given < 0, alone, given)
        self.sizes = torch.bincount(self.index, minlength=alone + 1).clamp_(min=1)
        places = torch.arange(len(given), device=given.device)
        first = torch.zeros_like(self.sizes)
        self.first = first.scatter_reduce(0, self.index, places, "amin", include_self=False)

    def move(self) -> None:
        """Move to the parameter's device."""
        device = self.parameter.device
        self.alone, self.index = self.alone.to(device), self.index.to(device)
        self.sizes, self.first = self.sizes.to(device), self.first.to(device)

    def average(self, values: Tensor, *, from_first: bool = False) -> None:
        """Replace values in place by the means of their entries."""
        flat = values.detach().reshape(-1)
        if from_first:
            # Differences of nearly equal values are exact, so nothing is gained by float64 here.
            base = flat.index_select(0, self.first)
            means = base + self._means(flat - base.index_select(0, self.index)).to(base.dtype)
        else:
            means = self._means(flat.double()).to(flat.dtype)
        shared = means.index_select(0, self.index).view(values.shape)
        values.copy_(torch.where(self.alone, values, shared))

    def _means(self, flat: Tensor) -> Tensor:
        sums = flat.new_zeros(len(self.sizes)).index_add_(0, self.index, flat)
        return sums / self.sizes
