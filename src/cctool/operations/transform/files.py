"""Reports on coded feature maps: a workbook, and pictures of histograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cctool.analysis.features.bands import bands_of
from cctool.analysis.features.pictures import draw_histograms
from cctool.analysis.features.sheets import feature_report
from cctool.analysis.workbook import check_suffix, write_report
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.atomic_folder import folder_atomically, refuse_existing_folder
from cctool.checkpoint.spec import Metrics
from cctool.operations.context import Context, header, refuse_existing
from cctool.transforms.codec.figures import TapFigures

# Common file systems allow names of 255 bytes, suffix included.
_LONGEST_STEM = 120


class Wanted(Protocol):
    """The options that commands with reports on taps share."""

    @property
    def report_file(self) -> str | None:
        """Path of the workbook or table."""

    @property
    def histograms(self) -> str | None:
        """Folder of the pictures."""

    @property
    def zero_bar(self) -> bool:
        """Whether pictures have a bar for zeros."""


def refuse_reports(wanted: Wanted, context: Context) -> None:
    """Refuse to start work if its report could not be written.

    Raises:
        UsageError: if the report's suffix is unknown.
        CheckpointError: if a file or folder exists and may not be replaced.
    """
    if wanted.report_file is not None:
        check_suffix(Path(wanted.report_file))
        refuse_existing((Path(wanted.report_file),), context)
    if wanted.histograms is not None:
        refuse_existing_folder(Path(wanted.histograms), overwrite=context.force, ours=_is_picture)


def write_reports(
    figures: Sequence[TapFigures],
    wanted: Wanted,
    checkpoint: Checkpoint,
    measured_on: str,
    before: Sequence[Metrics],
    after: Sequence[Metrics],
    context: Context,
) -> tuple[str, ...]:
    """Write the workbook and the pictures that the options ask for; returns their paths.

    Args:
        figures: of the taps, in the order of the forward pass.
        wanted: the options.
        checkpoint: the coded network.
        measured_on: data and split of the figures.
        before: metrics without codecs; empty if unknown.
        after: metrics with codecs.
        context: of the command.
    """
    written = []
    if wanted.report_file is not None:
        samples = max((tap.samples for tap in figures), default=0)
        measured = ("Measured on", f"{measured_on}, n={samples:,}")
        notes = (*header(checkpoint, measured), *_accuracy(before, after))
        write_report(feature_report(figures, notes), Path(wanted.report_file), overwrite=context.force)
        written.append(wanted.report_file)
    if wanted.histograms is not None:
        folder = Path(wanted.histograms)
        with folder_atomically(folder, overwrite=context.force, ours=_is_picture) as temporary:
            for stem, tap in zip(file_stems([tap.name for tap in figures]), figures, strict=True):
                title = f"{tap.name}: symbols of {tap.samples:,} maps {'x'.join(map(str, tap.shape))}"
                picture = draw_histograms(title, bands_of(tap), zero_bar=wanted.zero_bar)
                (temporary / f"{stem}.png").write_bytes(picture)
        written.append(wanted.histograms)
    return tuple(written)


def file_stems(names: Sequence[str]) -> list[str]:
    """File names for modules: the modules' names, with unsuitable characters replaced.

    >>> file_stems(["layer1.0", "a/b", "a:b"])
    ['layer1.0', 'a_b', 'a_b-2']
    """
    found: list[str] = []
    for name in names:
        kept = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
        stem = base = kept.strip(".")[:_LONGEST_STEM] or "network"
        number = 1
        # Some file systems do not distinguish upper and lower case.
        while stem.lower() in [other.lower() for other in found]:
            number += 1
            stem = f"{base}-{number}"
        found.append(stem)
    return found


def _is_picture(name: str) -> bool:
    return name.endswith(".png")


def _accuracy(before: Sequence[Metrics], after: Sequence[Metrics]) -> list[tuple[str, str]]:
    earlier = {metrics.split: metrics.values for metrics in before}
    return [
        (
            f"{name} on {metrics.split} (n={metrics.n:,})",
            f"{earlier[metrics.split][name]:.4f} without codecs, {value:.4f} with them"
            if name in earlier.get(metrics.split, {})
            else f"{value:.4f} with codecs",
        )
        for metrics in after
        for name, value in metrics.values.items()
    ]
