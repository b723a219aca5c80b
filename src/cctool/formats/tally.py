"""Running comparisons of two programs' outputs over batches: errors, ranges, and what differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cctool.base.outputs import as_numbers, differences, is_measured
from cctool.formats.records import OutputAgreement


class OutputTally:
    """One output over the batches so far.

    Args:
        name: of the output.

    Attributes:
        measured: whether it holds real numbers, so that differences have a size; None before the first batch.
        error: largest difference.
        largest: largest magnitude of the model's values.
        worst: the batch with the largest difference.
        elements: number of values that were compared.
        missed: number of batches that were not compared because the shapes differed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.measured: bool | None = None
        self.error = self.largest = 0.0
        self.worst = torch.empty(0)
        self.elements = self.missed = self.batches = 0
        self._any_finite = False
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def add(self, batch: Tensor, expected: Tensor, found: Tensor) -> None:
        """Compare the output of a batch; both of one shape and finite in the same places."""
        self.batches += 1
        self.measured = is_measured(expected) or is_measured(found)
        self.elements += expected.numel()
        if not self.measured or not expected.numel():
            return
        error = float(differences(expected, found).max())
        if error > self.error or not self.worst.numel():
            self.worst = batch
        self.error = max(self.error, error)
        self._any_finite |= bool(expected.isfinite().any())
        values = as_numbers(expected).nan_to_num(0, 0, 0)
        self.largest = max(self.largest, float(values.abs().max()))
        per_sample = values.dim() and len(values) == len(batch)
        self._widen(*((values.amin(0), values.amax(0)) if per_sample else (values, values)))

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if self._low is None or self._high is None:
            self._low, self._high = low, high
            return
        if low.shape != self._low.shape:
            # Lengths that depend on the batch have no places to follow: one range for all values.
            low, high = low.min(), high.max()
            self._low, self._high = self._low.min(), self._high.max()
        self._low, self._high = torch.minimum(low, self._low), torch.maximum(high, self._high)

    @property
    def range(self) -> float:
        """Largest minus smallest value over the inputs, at the place where that is largest."""
        return 0.0 if self._low is None or self._high is None else float((self._high - self._low).max())

    def not_compared(self) -> str:
        """Why nothing of it was compared; empty if something was."""
        if not self.batches:
            return "its shape depends on the data, and was another one for every batch"
        if not self.elements:
            return "it has no elements on any of these inputs"
        if self.measured and not self._any_finite:
            return "it holds nothing but NaN and infinities"
        return ""

    def record(self, choices: ChoiceTally | None = None) -> OutputAgreement:
        """The result; ``choices`` are the values of an output that is not measured."""
        different = None if choices is None or not choices.n else 100 * choices.different / choices.n
        return OutputAgreement(
            name=self.name,
            max_abs_error=self.error if self.measured else None,
            output_range=self.range if self.measured else None,
            different=None if self.measured else different,
            elements=self.elements,
            other_shapes=self.missed,
            not_compared=self.not_compared(),
        )


class ChoiceTally:
    """Whole numbers that two programs should choose alike: classes, indices, truth values.

    Args:
        choose: makes the choices, of any shape, of the output tensor.
        index: number of that output.

    Attributes:
        n: number of choices that were compared.
        different: number of those that differ.
    """

    def __init__(self, choose: Callable[[Tensor], Tensor], index: int) -> None:
        self.choose, self.index = choose, index
        self.n = self.different = 0
        self._samples: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, batch: Tensor, expected: Tensor, found: Tensor) -> None:
        """Compare the choices of a batch."""
        differs = self.choose(expected) != self.choose(found)
        self.n += differs.numel()
        self.different += int(differs.sum())
        if differs.dim() and len(differs) == len(batch):
            which = differs.flatten(1).any(1) if differs.dim() > 1 else differs
            self._samples.append(batch.detach().cpu()[which])
            self._masks.append(differs[which])

    def undecided(self, changes: Callable[[Tensor, Callable[[list[Tensor]], Tensor]], Tensor]) -> int:
        """The number of differing choices that ``changes`` says the model itself may make otherwise.

        ``changes`` gets the samples on which choices differ, and what makes choices of a list of outputs; it
        returns bool of the choices' shape.
        """
        if not self._samples or not sum(map(len, self._samples)):
            return 0
        changed = changes(torch.cat(self._samples), lambda outputs: self.choose(outputs[self.index]))
        return int((changed & torch.cat(self._masks)).sum())
