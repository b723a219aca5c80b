"""Qualities of coded feature maps: the one that reaches a ratio, and the curve of accuracy and ratio."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from cctool.analysis.features.pictures import CurvePoint, draw_curve
from cctool.analysis.table import Column, Report, Table
from cctool.analysis.workbook import write_report
from cctool.base.errors import DataError, TransformError
from cctool.base.networks import in_eval_mode
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.atomic import write_bytes
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context, beside, refuse_existing
from cctool.operations.data import first_images, measured, serve
from cctool.options.common import DataOptions
from cctool.transforms.codec.figures import NetworkStatistics, TapFigures
from cctool.transforms.codec.taps import recording, set_quality, taps_of

__all__ = [
    "QUALITIES",
    "QualityTrial",
    "SearchReport",
    "SweepPoint",
    "reach_ratio",
    "refuse_sweep",
    "search_quality",
    "sweep_qualities",
    "write_sweep",
]

QUALITIES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0)
"""What ``--sweep quality`` measures."""

LOWEST, HIGHEST = 1.0, 100.0
_NEAR = 0.005
_NARROW = 0.05


@dataclass(frozen=True)
class QualityTrial:
    """One quality that was tried.

    Attributes:
        quality: 1 to 100.
        ratio: bits of 8-bit maps over all coded bits, side information included.
        bits_per_element: all coded bits over elements.
    """

    quality: float
    ratio: float
    bits_per_element: float


@dataclass(frozen=True)
class SearchReport:
    """How a ratio was reached.

    Attributes:
        asked: ratio against 8 bit.
        found: quality and ratio that it came to.
        split: whose images were counted.
        n: how many.
        trials: all that was tried, in their order.
    """

    asked: float
    found: QualityTrial
    split: str
    n: int
    trials: tuple[QualityTrial, ...]


@dataclass(frozen=True)
class SweepPoint:
    """One quality, measured on one split.

    Attributes:
        quality: 1 to 100.
        split: what it was measured on.
        n: images.
        ratio_8bit: eight bits a value over all coded bits, side information included.
        ratio_float32: likewise for 32 bits a value.
        bits_per_element: all coded bits over elements.
        entropy_per_element: zero-order entropy bound over elements.
        top1: percent; None where the network gives no logits.
        loss: mean.
    """

    quality: float
    split: str
    n: int
    ratio_8bit: float
    ratio_float32: float
    bits_per_element: float
    entropy_per_element: float
    top1: float | None
    loss: float


def search_quality(
    ratio: float, measure: Callable[[float], QualityTrial]
) -> tuple[QualityTrial, tuple[QualityTrial, ...]]:
    """Find the best quality whose ratio is at least ``ratio``.

    The ratio falls as the quality rises, so qualities are bisected, until one exceeds the ratio by less than
    0.5 % or is known to 0.05.

    Args:
        ratio: against 8 bit, above 1.
        measure: codes images at a quality and counts.

    Returns:
        The quality found, and all that were tried, in their order. Where even quality 1 does not reach the
        ratio, quality 1.
    """
    tried = [measure(HIGHEST)]
    if tried[0].ratio >= ratio:
        return tried[0], tuple(tried)
    tried.append(measure(LOWEST))
    found = tried[1]
    if found.ratio < ratio:
        return found, tuple(tried)
    low, high = LOWEST, HIGHEST
    while high - low > _NARROW and found.ratio > ratio * (1 + _NEAR):
        middle = (low + high) / 2
        tried.append(measure(middle))
        if tried[-1].ratio >= ratio:
            low, found = middle, tried[-1]
        else:
            high = middle
    return found, tuple(tried)


def reach_ratio(
    checkpoint: Checkpoint, source: DataSource, ratio: float, count: int, data: DataOptions, context: Context
) -> SearchReport:
    """Find the best quality that compresses by ``ratio``, and set it on all taps.

    Bits are counted on the first ``count`` validation images, or training images where there are none, at
    each tap's best order of the code where that is left open; the maps have been through all taps before.

    Args:
        checkpoint: with calibrated taps; their quality is changed.
        source: opened for the checkpoint.
        ratio: against 8 bit, above 1.
        count: images to count on.
        data: batch size and workers.
        context: device.

    Raises:
        TransformError: if there is nothing that a quality scales.
        DataError: if there are no images.
    """
    model = checkpoint.model
    if not any(hook.codec.transforms for hook in taps_of(model).values()):
        raise TransformError("--target ratio scales the steps behind a transform; --kernel identity has none")
    split = next((name for name in ("validation", "train") if name in source.loaders), None)
    if split is None:
        raise DataError(f"{source.reference} has no images to search on")

    open_orders = {name for name, hook in taps_of(model).items() if "k" in hook.codec.calibrated}

    def measure(quality: float) -> QualityTrial:
        set_quality(model, quality)
        statistics = NetworkStatistics(model)
        with recording(model, statistics), in_eval_mode(model):
            for images in first_images(serve(checkpoint, source, split, data, context), count):
                model(images)
        bits, elements = _bits(statistics.figures(), open_orders)
        return QualityTrial(quality, 8 * elements / bits, bits / elements)

    found, trials = search_quality(ratio, measure)
    set_quality(model, found.quality)
    if found.ratio < ratio:
        context.reporter.warn(
            f"--target ratio={ratio:g} is out of reach: even quality 1, which the product has, compresses "
            f"{found.ratio:.3g} times only against 8 bit, for no symbol takes less than a bit"
        )
    return SearchReport(ratio, found, split, min(count, len(source.split(split))), trials)


def sweep_qualities(
    checkpoint: Checkpoint,
    source: DataSource,
    data: DataOptions,
    context: Context,
    choose_orders: Callable[[], None],
) -> tuple[SweepPoint, ...]:
    """Measure `QUALITIES` on the validation and test splits, or the training split where there are none.

    Args:
        checkpoint: with calibrated taps; they end with the quality and orders that they have.
        source: opened for the checkpoint.
        data: batch size and workers.
        context: device and precision.
        choose_orders: sets the orders of the code for the steps as they are.
    """
    model = checkpoint.model
    codecs = {name: hook.codec for name, hook in taps_of(model).items()}
    splits = [split for split in ("validation", "test") if split in source.loaders] or ["train"]
    points = []
    for quality in QUALITIES:
        set_quality(model, quality)
        choose_orders()
        for split in splits:
            statistics = NetworkStatistics(model)
            with recording(model, statistics):
                metrics = measured(checkpoint, source, data, context, split=split)
            points.append(_point(quality, metrics, statistics.figures()))
    for name, hook in taps_of(model).items():
        hook.codec = codecs[name]
    return tuple(points)


def refuse_sweep(context: Context) -> None:
    """Refuse to start a sweep whose files could not be written. Raises CheckpointError if they exist."""
    refuse_existing(_sweep_files(context), context)


def write_sweep(
    points: Sequence[SweepPoint], before: Sequence[Metrics], title: str, context: Context
) -> tuple[str, ...]:
    """Write the table and the plot beside the product; returns their paths."""
    table, picture = _sweep_files(context)
    columns = tuple(Column(key, title, meaning) for key, (title, meaning) in _SWEEP_COLUMNS.items())
    rows = tuple(tuple(getattr(point, key) for key in _SWEEP_COLUMNS) for point in points)
    write_report(Report(title, Table("Sweep", columns, rows)), table, overwrite=context.force)
    curve = [CurvePoint(p.split, p.quality, p.ratio_8bit, p.top1) for p in points if p.top1 is not None]
    if not curve:
        return (str(table),)
    uncoded = [(metrics.split, metrics.values["top1"]) for metrics in before if "top1" in metrics.values]
    write_bytes(picture, draw_curve(title, curve, uncoded), overwrite=context.force)
    return str(table), str(picture)


_SWEEP_COLUMNS = {
    "quality": ("Quality", "1 to 100; 50 leaves the table's steps."),
    "split": ("Split", "What was measured on."),
    "n": ("n", "Images."),
    "ratio_8bit": ("vs 8 bit", "Eight bits a value over all coded bits, side information included."),
    "ratio_float32": ("vs float32", "32 bits a value over all coded bits."),
    "bits_per_element": ("Bits an element", "All coded bits over the values of all maps."),
    "entropy_per_element": ("Entropy bound", "Zero-order entropy over the values of all maps."),
    "top1": ("Top-1 (%)", "Of the coded network."),
    "loss": ("Loss", "Of the coded network."),
}


def _sweep_files(context: Context) -> tuple[Path, Path]:
    return beside(context.output, ".sweep.csv"), beside(context.output, ".sweep.png")


def _bits(figures: Sequence[TapFigures], open_orders: Collection[str]) -> tuple[int, int]:
    """All bits, at the best order where it is open, and all elements."""
    bits = sum(
        (min(tap.payload_bits) if tap.name in open_orders else tap.payload_bits[tap.k]) + tap.side_bits
        for tap in figures
    )
    return bits, sum(tap.elements for tap in figures)


def _point(quality: float, metrics: Metrics, figures: Sequence[TapFigures]) -> SweepPoint:
    elements = sum(tap.elements for tap in figures)
    bits = sum(tap.bits for tap in figures)
    return SweepPoint(
        quality=quality,
        split=metrics.split,
        n=metrics.n,
        ratio_8bit=8 * elements / bits,
        ratio_float32=32 * elements / bits,
        bits_per_element=bits / elements,
        entropy_per_element=sum(tap.entropy_bits for tap in figures) / elements,
        top1=metrics.values.get("top1"),
        loss=metrics.values["loss"],
    )
