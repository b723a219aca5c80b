"""Checks that a written model computes what the model computes.

Every output is compared by itself: numbers by the root mean square of their differences at each channel,
relative to how much that channel depends on the inputs, and whole numbers and truth values by the share that
differs. An absolute error has no scale, and relative to the outputs themselves, a common offset would hide
errors. `limits.py` says what is allowed. Samples are drawn until the verdict would be the same for others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError
from cctool.formats.records import Agreement
from cctool.formats.verdict.comparison import Comparison
from cctool.formats.verdict.limits import (
    SHARE,
    TOLERANCE,
    Limit,
)
from cctool.formats.verdict.own_rounding import References
from cctool.formats.verdict.rounding import (
    AGREED,
    SMALL,
    Run,
    too_many,
    undecided_choices,
)
from cctool.tasks.base import Task

BATCH_SIZES = (1, 5)
"""Of the random inputs: one, and an odd number, so that no width written into a reshape divides it."""

LEAST, LEAST_SMALL = 32, 256
"""Samples that a comparison takes at least; the second where an input has at most 64 x 64 pixels."""

_GROWTH = 4  # times the least number, at most
_BATCH_PIXELS = 32 * 224 * 224  # in one batch at most
_PRIMES = (251, 127, 61, 31, 13, 7, 3, 1)
_SEARCHED = 2**32  # added to the seed of inputs to search among
_ROUNDS = 3  # random batches of each size


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


def many_batches(shape: tuple[int, ...], seed: int, *, free_batch: bool) -> Iterator[Tensor]:
    """Standard normal inputs to search among: eight times the least number of small ones, or four times.

    They are others than those of `growing_batches`, in batches of `prime_size`.
    """
    generator, least = torch.Generator().manual_seed(_SEARCHED + seed), least_of(shape)
    size = prime_size(shape, free_batch=free_batch)
    for _ in range((8 if least == LEAST_SMALL else 4) * least // size):
        yield torch.randn((size, *shape), generator=generator)


def prime_size(shape: tuple[int, ...], *, free_batch: bool) -> int:
    """A size of batches of (C, H, W) that hardly any width in a network equals; 1 without a free batch."""
    most = max(_BATCH_PIXELS // (shape[-1] * shape[-2]), 1) if free_batch else 1
    return next(prime for prime in _PRIMES if prime <= most)


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
    found = Comparison(model, candidate, inputs, allow_nonfinite=allow_nonfinite, task=task)
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


def _too_far(found: Comparison, index: int, limits: dict[int, Limit], agreement: Agreement) -> str:
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
