"""Quality of coded feature maps: search for a compression ratio, and a sweep of accuracy against ratio.

A quality from 1 to 100 scales all quantization steps; 50 leaves them as their table says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
from cctool.operations.data import first_images, measured_or_run, serve
from cctool.operations.judge.task import judge_of
from cctool.options.common import DataOptions
from cctool.tasks.base import LOSS, Measure
from cctool.transforms.codec.figures import NetworkStatistics, TapFigures
from cctool.transforms.codec.taps import recording, set_quality, taps_of

QUALITIES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0)
"""Qualities that ``--sweep quality`` measures."""

LOWEST, HIGHEST = 1.0, 100.0
# The search ends where the ratio is met to this fraction, or the quality is known to this accuracy.
_NEAR = 0.005
_NARROW = 0.05


@dataclass(frozen=True)
class QualityTrial:
    """One quality that was tried.

    Attributes:
        quality: 1 to 100.
        ratio: bits of 8-bit maps over all coded bits, side information included.
        bits_per_element: coded bits per value of the maps.
    """

    quality: float
    ratio: float
    bits_per_element: float


@dataclass(frozen=True)
class SearchReport:
    """How a ratio was reached.

    Attributes:
        asked: the ratio against 8 bits that was asked for.
        found: the quality and ratio that were reached.
        split: whose images were coded.
        n: number of images.
        trials: all qualities that were tried, in order.
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
        split: that it was measured on.
        n: number of images.
        ratio_8bit: compression against 8 bits per value, side information included.
        ratio_float32: likewise against 32 bits per value.
        bits_per_element: coded bits per value of the maps.
        entropy_per_element: zero-order entropy of the symbols, in bits per value.
        values: the main metric of the network's task, by its name, and the mean loss; empty if nothing says
            how the network is judged.
    """

    quality: float
    split: str
    n: int
    ratio_8bit: float
    ratio_float32: float
    bits_per_element: float
    entropy_per_element: float
    values: Mapping[str, float] = field(metadata={"json": "inline"})


def search_quality(
    ratio: float, measure: Callable[[float], QualityTrial]
) -> tuple[QualityTrial, tuple[QualityTrial, ...]]:
    """Find the best quality whose ratio against 8 bits is at least ``ratio``, which is above 1.

    The ratio falls as the quality rises, so qualities are bisected until the ratio is exceeded by less than
    0.5 % or the quality is known to 0.05. ``measure`` codes images at a quality and counts bits.

    Returns:
        The quality found, and all trials in order. If even quality 1 does not reach the ratio, quality 1.
    """
    # The ends first: either may decide without bisection.
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
    """Find the best quality that compresses by ``ratio`` against 8 bits, and set it on all calibrated taps.

    Bits are counted on the first ``count`` validation images, else training images. Taps whose order of the
    code is calibrated count at their best order. Every map has passed all earlier codecs.

    Raises:
        TransformError: if no tap has steps that a quality scales.
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
    """Measure `QUALITIES` on the validation and test splits, or on the training split if there is neither.

    ``choose_orders`` sets the best orders of the code for the present steps. The taps get their quality and
    orders back at the end.
    """
    model = checkpoint.model
    codecs = {name: hook.codec for name, hook in taps_of(model).items()}
    splits = [split for split in ("validation", "test") if split in source.loaders] or ["train"]
    points, shown = [], (judge_of(checkpoint, context).main, LOSS)
    for quality in QUALITIES:
        set_quality(model, quality)
        choose_orders()
        for split in splits:
            statistics = NetworkStatistics(model)
            with recording(model, statistics):
                metrics = measured_or_run(checkpoint, source, data, context, split=split)
            points.append(_point(quality, metrics, shown, statistics.figures()))
    for name, hook in taps_of(model).items():
        # Configurations are immutable: the old one has the old quality and order.
        hook.codec = codecs[name]
    return tuple(points)


def refuse_sweep(context: Context, others: Sequence[Path]) -> None:
    """Refuse to start a sweep if its files could not be written; ``others`` are written, too.

    Raises:
        CheckpointError: if they exist.
        UsageError: if two would have one name.
    """
    refuse_existing((*_sweep_files(context), *others), context)


def write_sweep(
    points: Sequence[SweepPoint], before: Sequence[Metrics], title: str, main: Measure, context: Context
) -> tuple[str, ...]:
    """Write the table and the plot next to the product; returns their paths."""
    table, picture = _sweep_files(context)
    columns = [Column(key, name, meaning) for key, (name, meaning) in _SWEEP_COLUMNS.items()]
    rows = [[getattr(point, key) for key in _SWEEP_COLUMNS] for point in points]
    for measure in dict.fromkeys((main, LOSS)):
        if any(measure.name in point.values for point in points):
            columns.append(Column(measure.name, measure.heading, "Of the coded network."))
            for row, point in zip(rows, points, strict=True):
                row.append(point.values.get(measure.name))
    report = Report(title, Table("Sweep", tuple(columns), tuple(map(tuple, rows))))
    write_report(report, table, overwrite=context.force)
    curve = [
        CurvePoint(p.split, p.quality, p.ratio_8bit, p.values[main.name])
        for p in points
        if main.name in p.values
    ]
    if not curve:
        return (str(table),)
    uncoded = [
        (metrics.split, metrics.values[main.name]) for metrics in before if main.name in metrics.values
    ]
    drawn = draw_curve(title, curve, uncoded, f"{main.title}, {main.unit}" if main.unit else main.title)
    write_bytes(picture, drawn, overwrite=context.force)
    return str(table), str(picture)


_SWEEP_COLUMNS = {
    "quality": ("Quality", "1 to 100; 50 leaves the table's steps."),
    "split": ("Split", "What was measured on."),
    "n": ("n", "Images."),
    "ratio_8bit": ("vs 8 bit", "Eight bits a value over all coded bits, side information included."),
    "ratio_float32": ("vs float32", "32 bits a value over all coded bits."),
    "bits_per_element": ("Bits an element", "All coded bits over the values of all maps."),
    "entropy_per_element": ("Entropy bound", "Zero-order entropy over the values of all maps."),
}


def _sweep_files(context: Context) -> tuple[Path, Path]:
    return beside(context.output, ".sweep.csv"), beside(context.output, ".sweep.png")


def _bits(figures: Sequence[TapFigures], open_orders: Collection[str]) -> tuple[int, int]:
    """All bits, at the best order of taps in ``open_orders``, and the number of all values."""
    bits = sum(
        (min(tap.payload_bits) if tap.name in open_orders else tap.payload_bits[tap.k]) + tap.side_bits
        for tap in figures
    )
    return bits, sum(tap.elements for tap in figures)


def _point(
    quality: float, metrics: Metrics, shown: Sequence[Measure], figures: Sequence[TapFigures]
) -> SweepPoint:
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
        values={item.name: metrics.values[item.name] for item in shown if item.name in metrics.values},
    )
