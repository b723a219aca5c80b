"""The outputs of a network and of its file, side by side, over as many samples as the verdict needs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError, TrainingError
from cctool.base.outputs import OUTPUT, is_measured, named_tensors, other_inputs, varying_shapes
from cctool.formats.records import Agreement, ChoiceAgreement, OutputAgreement
from cctool.formats.verdict.limits import COMPARED_INTENDED, LOST, Limit, certain, in_float64, quick
from cctool.formats.verdict.own_rounding import References
from cctool.formats.verdict.rounding import (
    COARSE,
    FINE,
    MOST,
    SMALL,
    Counted,
    Run,
    Shake,
    choices_settled,
    returned,
    runner_of,
    shaken_outputs,
    too_many,
    undecided_choices,
)
from cctool.formats.verdict.samples import Chosen
from cctool.formats.verdict.steps import by_steps
from cctool.formats.verdict.tally import ChoiceTally, OutputTally
from cctool.tasks.base import Agreeing, Task
from cctool.tasks.classification import Classification

_LOGITS = 2  # dimensions of scores of classes


class Comparison:
    """The outputs of two programs over the batches so far."""

    def __init__(
        self, model: nn.Module, candidate: Run, inputs: str, *, allow_nonfinite: bool, task: Task | None
    ) -> None:
        self.model, self.inputs = model, inputs
        self.network, self.candidate = Counted(runner_of(model)), Counted(candidate, single=True)
        self.allow_nonfinite, self.task = allow_nonfinite, task
        self.references, self.rounds, self.coded = References(), False, False
        self.agreeing: Agreeing | None = None
        self.choices: ChoiceTally | None = None
        self.whole: dict[str, ChoiceTally] = {}
        self.chosen = Chosen(self.candidate)
        self._named: dict[str, OutputTally] = {}
        self._sizes: set[int] = set()
        self._others = self._pixels = 0
        self._failed = ""
        self.n = 0

    @property
    def tallies(self) -> list[OutputTally]:
        """What was seen of each output, in order."""
        return list(self._named.values())

    def add(self, batch: Tensor) -> None:
        """Run both on a batch and compare every output."""
        outputs = returned(self.model, batch)
        self.network.passes += len(batch)
        named = {name: value.detach().cpu() for name, value in named_tensors(outputs).items()}
        batch = batch.detach().cpu()
        # References run it on other numbers of samples, which it must take if it took these.
        self.candidate.single = self.candidate.single and len(batch) == 1
        found = self.candidate(batch)
        others = _other_shapes(self.model, list(named.values()), found, batch, self.inputs)
        if not self.n:
            self._ask(outputs)
        errors = torch.zeros(len(batch), dtype=torch.float64)
        for index, (name, expected) in enumerate(named.items()):
            tally = self._named.setdefault(name, OutputTally(name))
            if index in others:
                tally.missed += 1
                continue
            other = found[index]
            _check_finite(expected, other, self.inputs, self.allow_nonfinite)
            off = tally.add(batch, expected, other)
            if off is not None:
                errors = torch.maximum(errors, off / max(tally.largest, 1e-30) ** 2)
            if not tally.measured:
                self.whole.setdefault(name, ChoiceTally(_itself, index)).add(batch, expected, other)
            if self.choices is not None and index == self.choices.index:
                self.choices.add(batch, expected, other)
        self.chosen.add(batch, errors, found)
        self.n += len(batch)
        self._pixels = math.prod(batch.shape[-2:])
        self._sizes.add(len(batch))

    def settled(self, share: float) -> bool:
        """Whether other samples would hardly give another verdict."""
        told = not self.rounds or choices_settled(self.choices)
        return told and all(certain(tally, share) for tally in self.tallies if tally.measured)

    def judged(self, share: float) -> dict[int, Limit]:
        """The place of each output of numbers that is closest to its limit, by its index."""
        limits = {i: quick(one, share) for i, one in enumerate(self.tallies) if one.measured and one.elements}
        failing = [i for i, limit in limits.items() if limit.over > 1]
        if not failing:
            return limits
        tallies, plain = self.tallies, failing
        if self.rounds:
            # Movements are measured in many passes, which take long on large inputs.
            small = self._pixels <= SMALL
            growing = self.chosen.first((MOST, 2 * MOST, 4 * MOST) if small else (MOST // 2, MOST))
            runs = {
                one.name: Counted(run, single=self.candidate.single)
                for one in fields(References)
                if (run := getattr(self.references, one.name)) is not None
            }
            limits |= by_steps(
                self.model, self.network, self.candidate, References(**runs), tallies, failing, growing,
                everything=self.chosen.all_kept, coded=self.coded,
            )  # fmt: skip
            self._others += sum(run.passes for run in runs.values())
            self._failed = next((run.failed for run in runs.values() if run.failed), "")
            plain = [i for i in failing if limits[i].over > 1] if not self.references.intended else []
        if plain:
            drawn = self.chosen.first_and_worst()
            exact = in_float64(self.model, self.network, tallies, plain, drawn)
            self._others += 2 * len(drawn.samples)
            limits |= {i: limit for i, limit in exact.items() if not self.rounds or limit.over <= 1}
        return limits

    def changed(self, samples: Tensor) -> Iterator[list[Tensor]]:
        """The model's outputs, then those of what computes the same function but for rounding."""
        yield self.network(samples)
        if self.references.intended is not None:
            yield self.references.intended(samples)
        shake = COARSE if self.rounds else Shake(0.0, FINE.inputs)
        yield from shaken_outputs(self.model, self.network, samples, shake)

    def as_written(self) -> Run | None:
        """Runs the file without the runtime's optimizations, in batches that it takes."""
        run = self.references.as_written
        return None if run is None else Counted(run, single=self.candidate.single)

    def passes(self) -> dict[str, int]:
        """Forward passes of one sample so far."""
        return {"network": self.network.passes, "file": self.candidate.passes, "references": self._others}

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

    def agreement(self, tolerance: float, limits: dict[int, Limit]) -> Agreement:
        """What was found."""
        choices = None
        told = self.choices is not None and not self.tallies[self.choices.index].not_compared()
        if told and self.agreeing is not None and self.choices is not None and self.choices.n:
            n, same = self.choices.n, self.choices.n - self.choices.different
            what = self.agreeing
            choices = ChoiceAgreement(what.name, what.title, what.things, n, 100 * same / n)
        tallies = self.tallies
        by_class = choices is not None and choices.name == Classification().agreement.name
        records = tuple(_record(one, limits.get(i), self.whole) for i, one in enumerate(tallies))
        return Agreement(
            inputs=self.inputs,
            n=self.n,
            batch_sizes=tuple(sorted(self._sizes)),
            max_abs_error=max((one.error for one in tallies), default=0.0),
            output_range=max((one.range for one in tallies), default=0.0),
            largest_output=max((one.largest for one in tallies), default=0.0),
            top1_agreement=choices.percent if choices is not None and by_class else None,
            tolerance=tolerance,
            judged_in_float64=any(limit.source == "float64" for limit in limits.values()),
            judged_by_steps=any(limit.source == "steps" for limit in limits.values()),
            choices=choices,
            outputs=records,
            without_float64=self._failed,
        )

    def refuse_other_numbers(self) -> None:
        """Refuse an output of whole numbers that differs in more elements than rounding explains."""
        for name, tally in self.whole.items():
            different = tally.different
            if too_many(different, tally.n):
                different -= undecided_choices(tally, self.changed)
            if too_many(different, tally.n):
                raise ExportError(
                    f"the exported model does not compute what the model does: on {self.inputs} "
                    f"{different:,} of {tally.n:,} elements of its output {name} differ"
                )


def _record(tally: OutputTally, limit: Limit | None, whole: dict[str, ChoiceTally]) -> OutputAgreement:
    record = tally.record(whole.get(tally.name))
    if limit is None:
        return record
    return replace(
        record,
        place=limit.place,
        place_error=limit.error,
        place_signal=limit.signal,
        limit=limit.limit,
        limit_from=limit.source,
        compared_with=limit.compared,
        insensitive=_insensitive(tally, limit),
        unchecked=limit.dull if limit.sensitive else (),
    )


def _insensitive(tally: OutputTally, limit: Limit) -> str:
    """Why the check of an output could hardly have failed; empty if it could."""
    if not tally.range:
        return "it is the same for all of these inputs"
    if limit.compared == COMPARED_INTENDED and tally.rms_error > LOST * tally.signal:
        return "rounding moves it by as much as its inputs do"
    if not limit.sensitive:
        return "it depends on the inputs hardly more than on rounding"
    return ""


def _itself(value: Tensor) -> Tensor:
    return value


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
