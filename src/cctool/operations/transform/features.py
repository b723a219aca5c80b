"""`cctool transform --target features`: calibrated codecs of feature maps behind selected modules.

A tap is a codec behind a module: the module's output, a feature map, passes it as it would pass a file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cctool.base.errors import UsageError
from cctool.base.networks import copied, some
from cctool.base.patterns import refuse_shadowed
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome, ShownTables
from cctool.operations.data import example, measured_or_run, measured_splits, require_source
from cctool.operations.judge.task import judge_of
from cctool.operations.keep.calibrate import calibration_images, put_taps, say_fewer
from cctool.operations.transform.files import refuse_reports, write_reports
from cctool.operations.transform.quality_search import (
    SearchReport,
    SweepPoint,
    reach_ratio,
    refuse_sweep,
    sweep_qualities,
    write_sweep,
)
from cctool.operations.transform.quality_tables import quality_tables, search_notes, tap_tables
from cctool.options.common import DataOptions
from cctool.options.transform.choices import Prequantizer
from cctool.options.transform.options import TransformOptions
from cctool.transforms.codec.calibrate import choose_orders
from cctool.transforms.codec.codec import CodecConfig
from cctool.transforms.codec.figures import NetworkStatistics, TapFigures
from cctool.transforms.codec.sites import Site, find_sites
from cctool.transforms.codec.steps import (
    StepTable,
    TableChoice,
    allowed_lengths,
    check_table,
    default_table,
    preset_tables,
    read_tables,
)
from cctool.transforms.codec.taps import drop_taps, recording, taps_of, with_taps
from cctool.transforms.kernels.by_name import check_kernel, is_wavelet

_MUCH = 0.01
"""Fraction of clamped values above which a note warns."""


@dataclass(frozen=True)
class FeaturesReport:
    """What the codecs of one network do.

    Attributes:
        kernel: of the spatial transform.
        split: on which the taps' figures were measured.
        taps: figures of each, in the order of the forward pass.
        ratio_8bit: compression of all maps against 8 bits per value, side information included.
        ratio_float32: likewise against 32 bits per value.
        metrics_before: of the input network.
        metrics_after: of the coded network.
        notes: for the history.
        search: how the ratio of ``--target ratio`` was reached.
        sweep: the measured qualities, each on each split.
        written: files next to the product.
    """

    kernel: str
    split: str
    taps: tuple[TapFigures, ...]
    ratio_8bit: float
    ratio_float32: float
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    notes: tuple[str, ...]
    search: SearchReport | None = None
    sweep: tuple[SweepPoint, ...] = ()
    written: tuple[str, ...] = ()

    def tables(self) -> ShownTables:
        """A row for each tap and one for all; and the qualities that were tried."""
        title = f"feature maps coded with {self.kernel}"
        return [*tap_tables(self.taps, self.split, title), *quality_tables(self.search, self.sweep)]


def run(checkpoint: Checkpoint, options: TransformOptions, context: Context) -> Iterator[Outcome]:
    """Calibrate codecs on training images, put them behind modules of a copy, and measure the result.

    Earlier taps of the network are replaced.

    Raises:
        UsageError: if a kernel, table or pattern is invalid, or options contradict each other.
        TransformError: if a module returns no maps.
        DataError: if there is no data to calibrate on.
    """
    check_kernel(options.kernel, klt=True)
    features = options.features
    _refuse_unused(options, context.given)
    refuse_reports(features, context)
    if features.sweep:
        refuse_sweep(context, [Path(features.report_file)] if features.report_file else [])
    source = require_source(options.data, checkpoint, context, "--target features")
    before = measured_splits(checkpoint, source, options.data, context)
    product = replace(checkpoint, model=copied(checkpoint.model), resume=None)
    replaced = drop_taps(product.model)
    images, used = calibration_images(product, source, features.calibration, options.data, context)
    say_fewer(features.calibration, used, context)
    sites = find_sites(product.model, example(product), features.taps)
    configs = codec_configs(options, sites, used)
    product = put_taps(product, sites, configs, images)
    search = None
    if features.ratio is not None:
        # The orders of the code depend on the steps, and these on the quality that was found.
        search = reach_ratio(product, source, features.ratio, features.calibration, options.data, context)
        choose_orders(product.model, images)
        product = replace(product, spec=with_taps(product.spec, product.model))
    sweep: tuple[SweepPoint, ...] = ()
    if features.sweep:
        orders = partial(choose_orders, product.model, images)
        sweep = sweep_qualities(product, source, options.data, context, orders)
    after, split, figures = measured_with_figures(product, source, options.data, context)
    notes = (*_notes(product, figures, options, used, len(replaced)), *search_notes(search))
    measured_on = f"{source.reference}, {split} split"
    written = write_reports(figures, features, product, measured_on, before, after, context)
    if sweep:
        main = judge_of(product, context).main
        title = (
            f"{product.spec.architecture} on {source.reference}: {options.kernel}, {main.title} against ratio"
        )
        written += write_sweep(sweep, before, title, main, context)
    notes += tuple(f"written: {path}" for path in written)
    report = FeaturesReport(
        kernel=options.kernel,
        split=split,
        taps=figures,
        ratio_8bit=_ratio(figures, 8),
        ratio_float32=_ratio(figures, 32),
        metrics_before=before,
        metrics_after=after,
        notes=notes,
        search=search,
        sweep=sweep,
        written=written,
    )
    yield Outcome(product, report, metrics_before=before, metrics_after=after, notes=notes)


def _refuse_unused(options: TransformOptions, given: Collection[str]) -> None:
    """Refuse options that were given and that the kernel has no use for.

    Raises:
        UsageError: naming them.
    """
    features, kernel = options.features, options.kernel
    wavelet = is_wavelet(kernel)
    problems = []
    if "levels" in given and not wavelet:
        problems.append(f"--levels {features.levels}: {kernel} has none; wavelets do")
    if "block" in given and (wavelet or kernel == "identity"):
        problems.append(f"--block {features.block}: {kernel} has no blocks; dct, dst, dft and klt do")
    if features.sweep and kernel == "identity" and not features.channel_klt:
        problems.append("--sweep quality scales the steps behind a transform; --kernel identity has none")
    if problems:
        raise UsageError("; ".join(problems))


def codec_configs(options: TransformOptions, sites: Sequence[Site], images: int) -> dict[str, CodecConfig]:
    """The codec of each site, given in the order of the forward pass, as the options say before calibration.

    ``images`` is the number of images of the calibration.

    Raises:
        UsageError: if options contradict each other, or a table does not fit the kernel.
    """
    features, kernel = options.features, options.kernel
    plain = kernel == "identity" and not features.channel_klt
    tables = None
    if not plain or features.q_table is not None:
        tables = _tables(options, [site.name for site in sites])
    # With auto, calibration changes unsigned to offset for maps with negative values.
    auto = features.prequantizer is Prequantizer.AUTO
    calibrated: list[Any] = ["k"] if features.k is None else []
    calibrated += ["prequantizer"] if auto else []
    shared: dict[str, Any] = {
        "kernel": kernel,
        "bits": features.bits,
        "symbol_bits": features.symbol_bits,
        "block": features.block,
        "levels": features.levels,
        "norm": str(features.norm),
        "mean_shift": is_wavelet(kernel) if features.mean_shift is None else features.mean_shift,
        "prequantizer": "unsigned" if auto else str(features.prequantizer),
        "k": features.k or 0,
        "quality": features.quality,
        "dead_zone": features.dead_zone,
        "channel_klt": features.channel_klt,
        "allocated": features.allocate,
        "images": images,
    }
    found = {}
    for site in sites:
        table = StepTable(()) if tables is None else tables.of(site.name, last=site is sites[-1])
        if features.allocate and not table.scaled and not plain:
            raise UsageError(f"--allocate chooses the steps that --preset {options.preset} gives")
        try:
            found[site.name] = CodecConfig(
                **shared,
                table=table.steps,
                original_units=table.original,
                calibrated=(*calibrated, "table") if table.scaled else tuple(calibrated),
            )
        except ValidationError as error:
            raise UsageError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
    return found


def _tables(options: TransformOptions, taps: Sequence[str]) -> TableChoice:
    features, kernel = options.features, options.kernel
    default = TableChoice(default_table(kernel, features.block, features.levels, features.bits))
    if features.q_table is None:
        return preset_tables(options.preset, features.block, features.levels) or default
    lengths = allowed_lengths(kernel, features.block, features.levels)
    found = read_tables(features.q_table, taps, lengths)
    for pattern, steps in found.items():
        who = f"--q-table {features.q_table}: {pattern}"
        check_table(steps, kernel, features.block, features.levels, who)
    named = [pattern for pattern in found if pattern != "*"]
    if lost := [pattern for pattern in named if not any(fnmatchcase(tap, pattern) for tap in taps)]:
        raise UsageError(
            f"--q-table {features.q_table}: {lost[0]} matches no tap; the taps are {some(list(taps))}"
        )
    refuse_shadowed(list(found), taps, f"--q-table {features.q_table}")
    return replace(default, patterns={pattern: StepTable(steps) for pattern, steps in found.items()})


def measured_with_figures(
    checkpoint: Checkpoint, source: DataSource, data: DataOptions, context: Context
) -> tuple[tuple[Metrics, ...], str, tuple[TapFigures, ...]]:
    """Measure a coded network on its splits, and its taps on the test split, else validation, else training.

    Returns:
        Metrics, the split of the taps' figures, and these figures.
    """
    splits = [split for split in ("validation", "test") if split in source.loaders]
    metrics, statistics = [], NetworkStatistics(checkpoint.model)
    shown = splits[-1] if splits else "train"
    for split in splits or [shown]:
        with recording(checkpoint.model, statistics) if split == shown else nullcontext():
            metrics.append(measured_or_run(checkpoint, source, data, context, split=split))
    return tuple(found for found in metrics if found.values), shown, statistics.figures()


def _ratio(figures: Sequence[TapFigures], bits: int) -> float:
    return bits * sum(tap.elements for tap in figures) / max(1, sum(tap.bits for tap in figures))


def _notes(
    product: Checkpoint, figures: Sequence[TapFigures], options: TransformOptions, used: int, replaced: int
) -> tuple[str, ...]:
    offsets = [name for name, hook in taps_of(product.model).items() if hook.codec.prequantizer == "offset"]
    notes = [f"calibrated on {used} training images"]
    if replaced:
        notes.append(f"{replaced} taps that were there were replaced")
    if offsets and options.features.prequantizer is Prequantizer.AUTO:
        notes.append(f"maps with negative values have an offset: {', '.join(offsets)}")
    for tap in figures:
        if tap.clamped_values > _MUCH * tap.elements:
            share = 100 * tap.clamped_values / tap.elements
            notes.append(
                f"{tap.name}: {share:.1f} % of the values lie outside of the integers' range; --prequantizer "
                "auto gives maps with negative values an offset, --calibration looks at more images"
            )
        if tap.clamped_symbols:
            share = 100 * tap.clamped_symbols / tap.symbols
            notes.append(
                f"{tap.name}: {tap.clamped_symbols} coefficients ({share:.2f} %) saturate the symbols' bits"
            )
    return tuple(notes)
