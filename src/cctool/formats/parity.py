"""Checks that a written model computes what the model computes.

Every output is compared by itself: numbers by the root mean square of their differences at each channel,
relative to how much that channel depends on the inputs, and whole numbers and truth values by the share that
differs. An absolute error has no scale, and relative to the outputs themselves, a common offset would hide
errors. `verdict.py` says what is allowed. Samples are drawn until the verdict would be the same for others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError, TrainingError
from cctool.base.outputs import OUTPUT, is_measured, named_tensors, other_inputs, varying_shapes
from cctool.formats.records import Agreement, ChoiceAgreement, OutputAgreement
from cctool.formats.rounding import (
    AGREED,
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
from cctool.formats.samples import Chosen
from cctool.formats.steps import References, by_steps
from cctool.formats.tally import ChoiceTally, OutputTally
from cctool.formats.verdict import (
    COMPARED_INTENDED,
    LOST,
    SHARE,
    TOLERANCE,
    Limit,
    certain,
    in_float64,
    quick,
)
from cctool.tasks.base import Agreeing, Task
from cctool.tasks.classification import Classification

BATCH_SIZES = (1, 5)
"""Of the random inputs: one, and an odd number, so that no width written into a reshape divides it."""

LEAST, LEAST_SMALL = 32, 256
"""Samples that a comparison takes at least; the second where an input has at most 64 x 64 pixels."""

_GROWTH = 4  # times the least number, at most
_BATCH_PIXELS = 32 * 224 * 224  # in one batch at most
_ROUNDS = 3  # random batches of each size

_LOGITS = 2  # dimensions of scores of classes


def random_batches(
    shape: tuple[int, ...], seed: int, sizes: tuple[int, ...] = BATCH_SIZES
) -> Iterator[Tensor]:
    """Standard normal inputs, three of each batch size; the same for the same seed, on every machine."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes * _ROUNDS:
        yield torch.randn((size, *shape), generator=generator)


def least_of(shape: tuple[int, ...]) -> int:
    """Samples of (C, H, W) that a comparison takes at least."""
    return LEAST_SMALL if shape[-1] * shape[-2] <= SMALL else LEAST


def growing_batches(shape: tuple[int, ...], seed: int, *, free_batch: bool) -> Iterator[Tensor]:
    """Standard normal inputs in batches that grow, the least number of `least_of` to four times as many.

    Without a free batch size all batches have one sample.
    """
    generator, least = torch.Generator().manual_seed(seed), least_of(shape)
    most = max(_BATCH_PIXELS // (shape[-1] * shape[-2]), 1)
    drawn, sizes = 0, [*BATCH_SIZES] * _ROUNDS
    while drawn < _GROWTH * least:
        size = min(sizes.pop(0) if sizes else max(least - drawn, drawn), most) if free_batch else 1
        yield torch.randn((size, *shape), generator=generator)
        drawn += size


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
    references: References | None = None,
    least: int | None = None,
    offered: int | None = None,
) -> Agreement:
    """Compare a candidate's outputs with the model's, each channel of each output by its own signal.

    Args:
        model: the reference, on any device.
        candidate: gives its outputs for a batch on the CPU, in the order of `named_tensors`.
        batches: inputs [B, ...], on any device; as many are taken as the verdict needs.
        inputs: description of the inputs, for the report.
        tolerance: allowed error as a fraction of a channel's signal.
        allow_nonfinite: whether outputs may be NaN or infinite, in the same places as the model's.
        coded: whether codecs round activations.
        quantized: whether quantizers round activations.
        task: what the network is for; None asks classification if the first output is (N, C).
        references: what else the candidate is compared with where activations are rounded.
        least: stop after so many samples if the verdict is certain; None takes all batches.
        offered: number of inputs that there are, for the report; None if it is not known.

    Raises:
        ExportError: if shapes differ that do not depend on the data, values are not finite, the error of an
            output exceeds its limit, or too many whole numbers differ.
    """
    found = _Comparison(model, candidate, inputs, allow_nonfinite=allow_nonfinite, task=task)
    found.references = references or References()
    found.rounds, found.coded = quantized or coded, coded
    share = max(tolerance, SHARE) if found.rounds else tolerance
    for batch in batches:
        found.add(batch)
        if least is not None and found.n >= least and found.settled(share):
            break
    if not found.n:
        raise ExportError(f"there are no inputs to compare on: {inputs}")
    limits = found.judged(share)
    failing = [i for i, limit in limits.items() if limit.over > 1]
    agreement = found.agreement(share, limits)
    if failing:
        raise ExportError(_too_far(found, max(failing, key=lambda i: limits[i].over), limits, agreement))
    found.refuse_other_numbers()
    chosen = found.choices
    differs = quantized and chosen is not None and chosen.different
    undecided = undecided_choices(chosen, found.changed, found.as_written()) if differs else 0
    return replace(agreement, undecided=undecided, forward_passes=found.passes(), offered=offered)


class _Comparison:
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
        self.n = 0

    @property
    def tallies(self) -> list[OutputTally]:
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
                self.model, self.network, References(**runs), tallies, failing, growing,
                everything=self.chosen.all_kept, coded=self.coded,
            )  # fmt: skip
            self._others += sum(run.passes for run in runs.values())
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


def _too_far(found: _Comparison, index: int, limits: dict[int, Limit], agreement: Agreement) -> str:
    """The sentence about the output whose error is largest for its limit."""
    one, limit = found.tallies[index], limits[index]
    whose = f"its output {one.name} is" if len(found.tallies) > 1 else "its outputs are"
    chosen = agreement.choices
    return (
        f"the exported model does not compute what the model does: on {found.inputs} {whose} off by up to "
        f"{one.error:.3g} of a range of {one.range:.3g}; at channel {limit.place} by {limit.error:.3g} (root "
        f"mean square, against {limit.compared}), where {limit.limit:.3g} is allowed and the inputs make "
        f"{limit.signal:.3g}"
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
