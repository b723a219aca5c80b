"""Running comparisons of two programs' outputs over batches: errors, signals, ranges, and what differs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cctool.base.outputs import as_numbers, differences, is_measured
from cctool.formats.records import OutputAgreement

_PLACES = 4096
"""Channels of an output that are judged one by one; an output of more is judged as a whole."""


def by_place(value: Tensor, batch: int) -> Tensor:
    """Numbers as float64 [samples, places, values of each].

    A place is an entry of dimension 1, so a channel or a class. An output whose first dimension is not the
    batch counts as one sample.
    """
    numbers = as_numbers(value)
    if not numbers.dim() or len(numbers) != batch or not numbers.numel():
        return numbers.reshape(1, 1, -1)
    places = numbers.shape[1] if numbers.dim() > 1 and numbers.shape[1] <= _PLACES else 1
    return numbers.reshape(batch, places, -1)


def squares(left: Tensor, right: Tensor, batch: int) -> Tensor:
    """Mean square difference at each place of each sample, float64 [samples, places]."""
    return by_place(differences(left, right), batch).square().mean(2)


class _Deviations:
    """The mean square deviation of an output from its mean over the inputs, at each place."""

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None
        self._squares = torch.zeros(())

    def add(self, values: Tensor) -> None:
        """Take in float64 [samples, places, values of each]; where shapes change, places are pooled."""
        if self._mean is not None and values.shape[1:] != self._mean.shape:
            values = values.reshape(-1, 1, 1)
            if self._mean.shape != (1, 1):
                inner = (self._mean - self._mean.mean()).square().mean() * self.n
                self._squares = (self._squares.mean() + inner).reshape(1, 1)
                self._mean = self._mean.mean().reshape(1, 1)
        n, mean = len(values), values.mean(0)
        within = (values - mean).square().sum(0)
        if self._mean is None:
            self.n, self._mean, self._squares = n, mean, within
            return
        # The mean squares of two parts, joined (Chan et al. 1979).
        apart, both = mean - self._mean, self.n + n
        self._squares = self._squares + within + apart.square() * (self.n * n / both)
        self._mean, self.n = self._mean + apart * (n / both), both

    def at_places(self) -> Tensor:
        """Standard deviations over the inputs, float64 [places]."""
        if self._mean is None:
            return torch.zeros(1, dtype=torch.float64)
        return (self._squares / max(self.n, 1)).mean(1).clamp(min=0).sqrt()


class OutputTally:
    """One output over the batches so far.

    Args:
        name: of the output.

    Attributes:
        measured: whether it holds real numbers, so that differences have a size; None before the first batch.
        error: largest difference.
        largest: largest magnitude of the model's values.
        elements: number of values that were compared.
        missed: number of batches that were not compared because the shapes differed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.measured: bool | None = None
        self.error = self.largest = 0.0
        self.elements = self.missed = self.batches = 0
        self._any_finite = False
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._errors: list[Tensor] = []
        self._deviations = _Deviations()
        self._magnitudes: Tensor | None = None

    def add(self, batch: Tensor, expected: Tensor, found: Tensor) -> Tensor | None:
        """Compare the output of a batch; both of one shape and finite in the same places.

        Returns:
            The mean square error of each sample [samples]; None if nothing was measured of each.
        """
        self.batches += 1
        self.measured = is_measured(expected) or is_measured(found)
        self.elements += expected.numel()
        if not self.measured or not expected.numel():
            return None
        self.error = max(self.error, float(differences(expected, found).max()))
        self._any_finite |= bool(expected.isfinite().any())
        values = as_numbers(expected).nan_to_num(0, 0, 0)
        self.largest = max(self.largest, float(values.abs().max()))
        per_sample = values.dim() and len(values) == len(batch)
        self._widen(*((values.amin(0), values.amax(0)) if per_sample else (values, values)))
        self._measure(by_place(values, len(batch)))
        found_errors = squares(expected, found, len(batch))
        self._errors.append(found_errors)
        return found_errors.mean(1) if per_sample else None

    def _measure(self, values: Tensor) -> None:
        """Take in float64 [samples, places, values of each]."""
        self._deviations.add(values)
        largest = values.abs().amax((0, 2))
        if self._magnitudes is None:
            self._magnitudes = largest
        elif len(self._magnitudes) == len(largest):
            self._magnitudes = torch.maximum(self._magnitudes, largest)
        else:
            self._magnitudes = torch.cat((self._magnitudes, largest)).amax().reshape(1)

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

    @property
    def signals(self) -> Tensor:
        """Standard deviation over the inputs at each place, float64 [places]."""
        return self._deviations.at_places()

    @property
    def magnitudes(self) -> Tensor:
        """Largest magnitude of the model's values at each place, float64 [places]."""
        found, places = self._magnitudes, len(self.signals)
        if found is None:
            return torch.zeros(1, dtype=torch.float64)
        return found if len(found) == places else found.amax().expand(places)

    @property
    def signal(self) -> float:
        """Root mean square of `signals`: how much the output depends on the inputs."""
        return float(self.signals.square().mean().sqrt())

    @property
    def errors(self) -> Tensor:
        """Mean square error of each sample at each place, float64 [samples, places]."""
        if not self._errors:
            return torch.zeros(0, 1, dtype=torch.float64)
        places = {len(part[0]) for part in self._errors} | {len(self.signals)}
        return torch.cat([e if len(places) == 1 else e.mean(1, keepdim=True) for e in self._errors])

    @property
    def rms_error(self) -> float:
        """Root mean square of all differences."""
        return float(self.errors.mean().sqrt()) if self._errors else 0.0

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
        measured = bool(self.measured) and not self.not_compared()
        return OutputAgreement(
            name=self.name,
            max_abs_error=self.error if measured else None,
            output_range=self.range if measured else None,
            different=None if self.measured else different,
            elements=self.elements,
            other_shapes=self.missed,
            not_compared=self.not_compared(),
            rms_error=self.rms_error if measured else None,
            signal=self.signal if measured else None,
            signal_to_noise=self._signal_to_noise() if measured else None,
        )

    def _signal_to_noise(self) -> float | None:
        """In dB; None if there is no error or no signal."""
        if not 0 < self.rms_error < math.inf or not self.signal:
            return None
        return 20 * math.log10(self.signal / self.rms_error)


class ChoiceTally:
    """Whole numbers that two programs should choose alike: classes, indices, truth values.

    Args:
        choose: makes the choices, of any shape, of the output tensor.
        index: number of that output.

    Attributes:
        n: number of choices that were compared.
        different: number of those that differ.
        alike: whether all choices of the model so far are the same one, so that agreeing says nothing.
    """

    def __init__(self, choose: Callable[[Tensor], Tensor], index: int) -> None:
        self.choose, self.index = choose, index
        self.n = self.different = 0
        self.alike = True
        self._first: Tensor | None = None
        self._samples: list[Tensor] = []
        self._masks: list[Tensor] = []

    def add(self, batch: Tensor, expected: Tensor, found: Tensor) -> None:
        """Compare the choices of a batch."""
        chosen = self.choose(expected)
        differs = chosen != self.choose(found)
        self.n += differs.numel()
        self.different += int(differs.sum())
        if chosen.numel():
            self._first = chosen.flatten()[0] if self._first is None else self._first
            self.alike = self.alike and bool((chosen == self._first).all())
        if differs.dim() and len(differs) == len(batch):
            which = differs.flatten(1).any(1) if differs.dim() > 1 else differs
            self._samples.append(batch.detach().cpu()[which])
            self._masks.append(differs[which])

    def undecided(
        self, changes: Callable[[Tensor, Callable[[list[Tensor]], Tensor]], Tensor], most: int
    ) -> int:
        """The number of differing choices that ``changes`` says the model itself may make otherwise.

        ``changes`` gets samples on which choices differ, and what makes choices of a list of outputs; it
        returns bool of the choices' shape. It sees at most ``most`` samples, whose share is taken for all.
        """
        if not self._samples or not sum(map(len, self._samples)):
            return 0
        samples, masks = torch.cat(self._samples), torch.cat(self._masks)
        changed = changes(samples[:most], lambda outputs: self.choose(outputs[self.index])) & masks[:most]
        return int(changed.sum() * masks.sum() / masks[:most].sum())
