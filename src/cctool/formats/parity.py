"""Checks that a written model computes what the model computes.

Every output is compared by itself: numbers by their difference, whole numbers and truth values by the share
that differs. Errors are measured relative to the range of the output over the inputs: an absolute error has
no scale, and relative to the outputs themselves, a common offset would hide errors. Two float32 programs for
the same function differ by rounding, which grows with depth and with badly scaled statistics. If the error
exceeds the tolerance, both are compared with the model in float64, from which the written one may be at most
a few times as far away as the model itself.

A network that rounds its activations (a codec of feature maps) turns a difference in the last digit into a
whole step; such steps are rare and large. Then the written model may be a few times as far from the model as
the model's outputs move when its inputs change in their sixth digit.

If quantizers round, an integer runtime rounds biases as well, to the step of the products. Then the written
model may be twice as far from the model as the model's outputs move when the inputs of each quantizer change
by up to 1/32 of its step. A sample whose class changes under that is undecided: the written model may choose
another class for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError, TrainingError
from cctool.base.outputs import OUTPUT, is_measured, named_tensors, other_inputs, varying_shapes
from cctool.formats.records import Agreement, ChoiceAgreement
from cctool.formats.rounding import (
    AGREED,
    Judge,
    Run,
    beyond_rounding,
    beyond_shakes,
    beyond_steps,
    left_by,
    returned,
    too_many,
    undecided_choices,
)
from cctool.formats.tally import ChoiceTally, OutputTally
from cctool.tasks.base import Agreeing, Task
from cctool.tasks.classification import Classification

TOLERANCE = 1e-5
"""Allowed difference of two float32 programs, as a fraction of the output range; 1e-7 is usual."""

BATCH_SIZES = (1, 5)
"""Of the random inputs: one, and an odd number, so that no width written into a reshape divides it."""

_ROUNDS = 3  # random batches of each size

_LOGITS = 2  # dimensions of scores of classes


def random_batches(
    shape: tuple[int, ...], seed: int, sizes: tuple[int, ...] = BATCH_SIZES
) -> Iterator[Tensor]:
    """Standard normal inputs, three of each batch size; the same for the same seed, on every machine."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes * _ROUNDS:
        yield torch.randn((size, *shape), generator=generator)


def compare(
    model: nn.Module,
    candidate: Run,
    batches: Iterable[Tensor],
    inputs: str,
    *,
    tolerance: float = TOLERANCE,
    allow_nonfinite: bool = False,
    coded: bool = False,
    quantized: bool = False,
    task: Task | None = None,
) -> Agreement:
    """Compare a candidate's outputs with the model's, each output by its own range.

    Args:
        model: the reference, on any device.
        candidate: gives its outputs for a batch on the CPU, in the order of `named_tensors`.
        batches: inputs [B, ...], on any device.
        inputs: description of the inputs, for the report.
        tolerance: allowed difference as a fraction of an output's range.
        allow_nonfinite: whether outputs may be NaN or infinite, in the same places as the model's.
        coded: whether codecs round activations.
        quantized: whether quantizers round activations.
        task: what the network is for; None asks classification if the first output is (N, C).

    Raises:
        ExportError: if shapes differ that do not depend on the data, values are not finite, the error of an
            output exceeds the tolerance, or too many whole numbers differ.
    """
    found = _Comparison(model, candidate, inputs, allow_nonfinite=allow_nonfinite, task=task)
    for batch in batches:
        found.add(batch)
    if not found.n:
        raise ExportError(f"there are no inputs to compare on: {inputs}")
    failing = [i for i, one in enumerate(found.tallies) if one.error > tolerance * one.range]
    judges: list[tuple[str, Judge]] = []
    if quantized:
        judges.append(("shaken", partial(beyond_shakes, model, candidate)))
    largest = [one.largest for one in found.tallies]
    judges.append(("rounding", partial(beyond_rounding, model, candidate, largest)))
    if coded:
        judges.append(("steps", partial(beyond_steps, model, candidate)))
    passed = set()
    for name, judge in judges:
        left = left_by(judge, failing, found.tallies)
        if len(left) < len(failing):
            passed.add(name)
        failing = left
    undecided = undecided_choices(model, found.choices) if "shaken" in passed else 0
    agreement = found.agreement(tolerance)
    if failing:
        raise ExportError(_too_far(found, failing, tolerance, agreement))
    found.refuse_other_numbers(model, shaken=quantized)
    return replace(
        agreement,
        judged_in_float64="rounding" in passed,
        judged_by_steps=bool(passed & {"shaken", "steps"}),
        undecided=undecided,
    )


class _Comparison:
    """The outputs of two programs over the batches so far."""

    def __init__(
        self, model: nn.Module, candidate: Run, inputs: str, *, allow_nonfinite: bool, task: Task | None
    ) -> None:
        self.model, self.candidate, self.inputs = model, candidate, inputs
        self.allow_nonfinite, self.task = allow_nonfinite, task
        self.agreeing: Agreeing | None = None
        self.choices: ChoiceTally | None = None
        self.whole: dict[str, ChoiceTally] = {}
        self._named: dict[str, OutputTally] = {}
        self._sizes: set[int] = set()
        self.n = 0

    @property
    def tallies(self) -> list[OutputTally]:
        return list(self._named.values())

    def add(self, batch: Tensor) -> None:
        """Run both on a batch and compare every output."""
        outputs = returned(self.model, batch)
        named = {name: value.detach().cpu() for name, value in named_tensors(outputs).items()}
        found = self.candidate(batch.detach().cpu())
        others = _other_shapes(self.model, list(named.values()), found, batch, self.inputs)
        if not self.n:
            self._ask(outputs)
        for index, (name, expected) in enumerate(named.items()):
            tally = self._named.setdefault(name, OutputTally(name))
            if index in others:
                tally.missed += 1
                continue
            other = found[index]
            _check_finite(expected, other, self.inputs, self.allow_nonfinite)
            tally.add(batch, expected, other)
            if not tally.measured:
                self.whole.setdefault(name, ChoiceTally(_itself, index)).add(batch, expected, other)
            if self.choices is not None and index == self.choices.index:
                self.choices.add(batch, expected, other)
        self.n += len(batch)
        self._sizes.add(len(batch))

    def _ask(self, outputs: Any) -> None:
        """Ask the task what is to be chosen alike, and of which output."""
        named = named_tensors(outputs)
        tensors = list(named.values())
        main: Tensor | None = tensors[0]
        if self.task is not None:
            with contextlib.suppress(TrainingError):  # the task finds no output that it is about
                main = self.task.main_output(outputs)
            self.agreeing = self.task.agreement
        elif OUTPUT in named and tensors[0].dim() == _LOGITS and is_measured(tensors[0]):
            self.agreeing = Classification().agreement
        index = next((i for i, value in enumerate(tensors) if value is main), None)
        if self.agreeing is None or index is None:
            self.agreeing = None
            return
        self.choices = ChoiceTally(self.agreeing.choices, index)

    def agreement(self, tolerance: float) -> Agreement:
        """What is known before the errors are judged."""
        choices = None
        if self.agreeing is not None and self.choices is not None and self.choices.n:
            n, same = self.choices.n, self.choices.n - self.choices.different
            what = self.agreeing
            choices = ChoiceAgreement(what.name, what.title, what.things, n, 100 * same / n)
        tallies = self.tallies
        by_class = choices is not None and choices.name == Classification().agreement.name
        return Agreement(
            inputs=self.inputs,
            n=self.n,
            batch_sizes=tuple(sorted(self._sizes)),
            max_abs_error=max((one.error for one in tallies), default=0.0),
            output_range=max((one.range for one in tallies), default=0.0),
            largest_output=max((one.largest for one in tallies), default=0.0),
            top1_agreement=choices.percent if choices is not None and by_class else None,
            tolerance=tolerance,
            choices=choices,
            outputs=tuple(one.record(self.whole.get(one.name)) for one in tallies),
        )

    def refuse_other_numbers(self, model: nn.Module, *, shaken: bool) -> None:
        """Refuse an output of whole numbers that differs in more elements than rounding explains."""
        for name, tally in self.whole.items():
            different = tally.different
            if shaken and too_many(different, tally.n):
                different -= undecided_choices(model, tally)
            if too_many(different, tally.n):
                raise ExportError(
                    f"the exported model does not compute what the model does: on {self.inputs} "
                    f"{different:,} of {tally.n:,} elements of its output {name} differ"
                )


def _itself(value: Tensor) -> Tensor:
    return value


def _too_far(found: _Comparison, failing: list[int], tolerance: float, agreement: Agreement) -> str:
    """The sentence about the output whose error is largest for its range."""
    tallies = found.tallies
    one = max((tallies[i] for i in failing), key=lambda tally: tally.error / max(tally.range, 1e-30))
    whose = f"its output {one.name} is" if len(tallies) > 1 else "its outputs are"
    chosen = agreement.choices
    return (
        f"the exported model does not compute what the model does: on {found.inputs} {whose} off by up to "
        f"{one.error:.3g}; {tolerance:.0e} of their range of {one.range:.3g} is allowed"
        + (f"; {chosen.title} agrees on {chosen.percent:.1f} % of {chosen.n}" if chosen is not None else "")
    )


def require_agreement(agreement: Agreement) -> None:
    """Refuse a written model whose choices agree significantly less often than 99 %, undecided ones apart.

    It is refused if a model that agrees on 99 % of all choices would differ on as many with a probability
    below 5 % (one-sided binomial test). One choice may always differ.

    Raises:
        ExportError: in that case.
    """
    chosen = agreement.choices
    if chosen is None:
        return
    different = round(chosen.n * (100 - chosen.percent) / 100) - agreement.undecided
    if too_many(different, chosen.n):
        raise ExportError(
            f"the exported model chooses another class than the model for {different} of {chosen.n} "
            f"{'inputs' if chosen.n == agreement.n else chosen.things} ({agreement.inputs}), "
            f"{agreement.undecided} undecided ones apart: {chosen.title} agreement {chosen.percent:.2f} %, "
            f"{100 * AGREED:.0f} % is asked for"
        )


def _other_shapes(
    model: nn.Module, expected: list[Tensor], found: list[Tensor], batch: Tensor, inputs: str
) -> set[int]:
    """The outputs whose shapes differ because they depend on the data.

    Raises:
        ExportError: if others differ, or there is no output.
    """
    left, right = [list(t.shape) for t in expected], [list(t.shape) for t in found]
    differ = {i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b}
    if left and len(left) == len(right) and differ <= (_depending(model, batch) if differ else set()):
        return differ
    raise ExportError(
        f"the exported model puts out {right} for a batch of {len(batch)} ({inputs}), the model {left}"
    )


def _depending(model: nn.Module, batch: Tensor) -> set[int]:
    """The outputs whose shapes change when the inputs of a batch do."""
    runs = [named_tensors(returned(model, other)) for other in other_inputs(batch)]
    depending = varying_shapes(runs)
    return {i for i, name in enumerate(runs[0]) if name in depending}


def _check_finite(expected: Tensor, found: Tensor, inputs: str, allowed: bool) -> None:
    if not expected.is_floating_point():
        return
    if not allowed and not bool(torch.isfinite(expected).all()):
        raise ExportError(
            f"the model puts out NaN or infinities on {inputs}; `cctool analyze` lists weights that are "
            "not finite, --allow-nonfinite exports all the same"
        )
    if not torch.equal(torch.isfinite(expected), torch.isfinite(found)):
        raise ExportError(
            f"the exported model puts out NaN or infinities where the model does not ({inputs})"
        )
