"""How much of what a network says about its inputs a quantization left, whatever may have gone wrong.

The outputs of the network that came in and of the product are compared on a few images. The signal is how the
outputs vary from image to image: a constant network has none, however near its outputs are to the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.detectors import before_boxes
from cctool.base.networks import in_eval_mode
from cctool.base.outputs import as_numbers, is_measured, named_tensors
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Signal
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.judge.task import judge_of
from cctool.operations.keep.images import some_images, split_of
from cctool.options.common import DataOptions
from cctool.tasks.base import Task

SAMPLES, SAMPLES_OF_LARGE, LARGE = 64, 32, 128
"""Images that are looked at, and fewer of those with more than `LARGE` pixels a side."""

LEAST_DB = 3.0
"""Below this, more than half as much error as signal: a working int4 network has 8 dB and more."""

HARDLY_ANY_DB = 1.5
"""Below this, less than a sixth of the variance is more than error."""

LEAST_KEPT, ALMOST_ALL_KEPT = 0.5, 0.9
"""Of the decisions that tell images apart, the share that must stay where the signal is below `LEAST_DB`, and
below `HARDLY_ANY_DB`, where it can be another scale alone."""


@dataclass
class _Sums:
    """Running sums over samples of one output, float64: of each element, and pooled."""

    n: int = 0
    # The first sample, near which sums lose no digits to a large mean.
    first: Tensor | None = None
    total: Tensor | None = None
    apart: float = 0.0
    squares: float = 0.0
    errors: float = 0.0
    lost: int = 0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Add a batch (B, ...); elements that are not finite in the float network say nothing."""
        a, b = as_numbers(wanted), as_numbers(found)
        known, zeros = a.isfinite(), torch.zeros_like(a)
        self.lost += int((known & ~b.isfinite()).sum())
        a = a.where(known, zeros)
        if self.first is None or self.total is None:
            self.first, self.total = a[0], zeros[0]
        shifted = (a - self.first).where(known, zeros)
        self.n += len(a)
        self.total = self.total + shifted.sum(0)
        self.apart += float(shifted.square().sum())
        self.squares += float(a.square().sum())
        self.errors += float((a - b).where(known & b.isfinite(), zeros).square().sum())

    @property
    def varying(self) -> float:
        """Sum over elements and samples of the squared distance from the element's mean."""
        if self.total is None or not self.n:
            return 0.0
        varying = self.apart - float(self.total.square().sum()) / self.n
        # What rounding alone makes of equal outputs is no signal.
        return varying if varying > 1e-12 * self.squares else 0.0


@dataclass
class _Comparison:
    """All that is known of two networks' outputs after some batches."""

    outputs: dict[str, _Sums] = field(default_factory=dict)
    uncompared: set[str] = field(default_factory=set)
    chosen: list[Tensor] = field(default_factory=list)
    agreeing: list[Tensor] = field(default_factory=list)
    main: str | None = None

    def add(self, task: Task, wanted: Any, found: Any, count: int) -> None:
        """Compare what two networks return for a batch of ``count`` images."""
        theirs = named_tensors(found)
        ours = {name: value for name, value in named_tensors(wanted).items() if is_measured(value)}
        for name, value in ours.items():
            other, sums = theirs.get(name), self.outputs.setdefault(name, _Sums())
            batched = value.dim() > 0 and len(value) == count
            same = other is not None and other.shape == value.shape
            grown = sums.total is not None and as_numbers(value).shape[1:] != sums.total.shape
            if not batched or not same or grown or other is None:
                self.uncompared.add(name)
            elif name not in self.uncompared:
                sums.add(value, other)
        if task.agreement is not None and task.fits(wanted) and task.fits(found):
            main = task.main_output(wanted)
            self.main = next((name for name, value in ours.items() if value is main), None)
            first, second = (task.agreement.choices(task.main_output(value)) for value in (wanted, found))
            self.chosen.append(first.flatten().cpu())
            self.agreeing.append((first == second).flatten().cpu())


def signal_kept(
    before: Checkpoint,
    after: Checkpoint,
    source: DataSource | None,
    options: DataOptions,
    context: Context,
    *,
    trained: bool = False,
) -> Signal | None:
    """Compare a product's outputs with those of the network that came in.

    At least 64 images (32 of inputs above 128 pixels) are taken evenly from the test split, else validation,
    else training; all of them if there are fewer. Nothing is drawn at random. A training (``trained``)
    changes outputs anyhow: of its decisions `LEAST_KEPT` is enough.

    Returns:
        The figures; None without images, or if no floating-point output has a fixed shape for each image.
    """
    if source is None or not source.loaders:
        return None
    split = split_of(source)
    task = judge_of(before, context).task
    models = before.model.to(context.device), after.model.to(context.device)
    found, n = _Comparison(), 0
    with torch.no_grad(), in_eval_mode(models[0]), in_eval_mode(models[1]), before_boxes(*models):
        large = max(before.spec.input_shape[1:]) > LARGE
        wanted = SAMPLES_OF_LARGE if large else SAMPLES
        for images in some_images(before, source, split, wanted, options, context):
            first, second = (_run(model, images, context) for model in models)
            found.add(task, first, second, len(images))
            n += len(images)
    compared = {name: sums for name, sums in found.outputs.items() if name not in found.uncompared}
    if not compared or not n:
        return None
    lost = dict(_lost(found, compared, LEAST_KEPT if trained else ALMOST_ALL_KEPT))
    return Signal(
        split=split,
        n=n,
        snr_db=_pooled(compared.values(), centred=True),
        snr_db_with_mean=_pooled(compared.values(), centred=False),
        nonfinite=sum(sums.lost for sums in compared.values()),
        agreement=_percent(found.agreeing),
        commonest=_commonest(found.chosen),
        agreement_of=task.agreement.title if task.agreement is not None and found.agreeing else None,
        lost=tuple(lost),
        lost_db=lost,
        uncompared=tuple(sorted(found.uncompared)),
    )


def _run(model: nn.Module, images: Tensor, context: Context) -> Any:
    # A network that draws numbers even in eval mode draws the same ones before and after.
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.runtime.seed)
        return model(images)


def _pooled(outputs: Any, *, centred: bool) -> float | None:
    """Signal-to-noise in dB over all elements of all outputs; None without noise or signal."""
    outputs = list(outputs)
    signal = sum(sums.varying if centred else sums.squares for sums in outputs)
    return _decibels(signal, sum(sums.errors for sums in outputs))


def _decibels(signal: float, noise: float) -> float | None:
    if noise <= 0 or signal <= 0:
        return None
    return 10 * math.log10(signal / noise)


def _lost(
    found: _Comparison, compared: dict[str, _Sums], enough: float
) -> Iterator[tuple[str, float | None]]:
    """Outputs of which most of the signal is gone: noise is more than half of it, or they are no numbers.

    With the signal-to-noise ratio of each. ``enough`` is the share of the decisions that must be kept where
    hardly any signal is left.
    """
    kept = _decisions_kept(_percent(found.agreeing), _commonest(found.chosen))
    for name, sums in compared.items():
        # An output that does not vary over images is judged by its size.
        ratio = _decibels(sums.varying or sums.squares, sums.errors)
        least = LEAST_KEPT if ratio is not None and ratio >= HARDLY_ANY_DB else enough
        decides = kept is not None and kept >= least and name == found.main
        if (
            sums.lost
            or (ratio is not None and ratio < LEAST_DB and not decides)
            or (ratio is None and sums.errors > 0)
        ):
            yield name, ratio


def _percent(agreeing: Sequence[Tensor]) -> float | None:
    if not agreeing:
        return None
    return 100 * float(torch.cat(list(agreeing)).double().mean())


def _commonest(chosen: Sequence[Tensor]) -> float | None:
    """Percent of the choices before that are the commonest one, on which a constant network may agree."""
    if not chosen:
        return None
    together = torch.cat(list(chosen))
    _, counts = torch.unique(together, return_counts=True)
    return 100 * float(counts.max()) / max(1, len(together))


def _decisions_kept(agreement: float | None, commonest: float | None) -> float | None:
    """Share of the decisions beyond the commonest one that are alike; None if all decisions are the same."""
    if agreement is None or commonest is None or commonest >= 100:
        return None
    return (agreement - commonest) / (100 - commonest)
