"""What `cctool evaluate` sees of coded feature maps while it measures: figures, bitstreams, reports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cctool.checkpoint.atomic_folder import folder_atomically, refuse_existing_folder
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Metrics
from cctool.data.batches import Batch
from cctool.errors import UsageError
from cctool.operations.bitstreams import Bitstreams, StreamFigures
from cctool.operations.context import Context
from cctool.operations.stream_index import Index, is_ours, made_with, write_index
from cctool.operations.tap_reports import refuse_reports, write_reports
from cctool.options.evaluate import EvaluateOptions
from cctool.transforms.codec import Symbols
from cctool.transforms.statistics import NetworkStatistics, TapFigures
from cctool.transforms.taps import recording, taps_of

__all__ = ["Seen", "Watch", "refuse_unwatched", "stream_tables", "tap_tables", "watched"]

Tables = Sequence[tuple[str, Sequence[str], Sequence[Sequence[object]]]]


@dataclass(frozen=True)
class Seen:
    """What was seen of taps.

    Attributes:
        taps: figures, without histograms.
        streams: sizes of bitstreams.
        written: folders and files.
    """

    taps: tuple[TapFigures, ...] = ()
    streams: tuple[StreamFigures, ...] = ()
    written: tuple[str, ...] = ()


def refuse_unwatched(checkpoint: Checkpoint, options: EvaluateOptions, context: Context) -> None:
    """Refuse to start work that has nothing to look at, or whose files could not be written.

    Raises:
        UsageError: if the network has no taps and something of them is asked for.
        CheckpointError: if a file or folder exists and may not be replaced.
    """
    if options.asks_for_taps and not taps_of(checkpoint.model):
        raise UsageError(
            "--bitstream, --through-bitstream, --report-file and --histograms are about coded feature maps, "
            "and this network has none: `cctool transform --target features` puts codecs in"
        )
    refuse_reports(options, context)
    if options.bitstream is not None:
        refuse_existing_folder(Path(options.bitstream), overwrite=context.force, ours=is_ours)


class Watch:
    """Looks at every pass through a tap, once on the way of a split through the network."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: str,
        split: str,
        options: EvaluateOptions,
        context: Context,
        folder: Path | None,
    ) -> None:
        self._checkpoint, self._data, self._split = checkpoint, data, split
        self._options, self._context, self._folder = options, context, folder
        self._statistics = NetworkStatistics(checkpoint.model)
        self._streams: Bitstreams | None = None
        if options.through_bitstream or folder is not None:
            self._streams = Bitstreams(checkpoint.model, folder, through=options.through_bitstream)

    def __call__(self, name: str, symbols: Symbols, x: Tensor, y: Tensor) -> Tensor | None:
        """Count one pass, and write it; what it decodes to, where that goes on."""
        self._statistics(name, symbols, x, y)
        return None if self._streams is None else self._streams(name, symbols, x, y)

    def batches(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Pass the batches of the split on."""
        return batches if self._streams is None else self._streams.batches(batches)

    def finish(self, metrics: Metrics | None) -> Seen:
        """Write everything that was asked for, once all batches have passed."""
        figures = self._statistics.figures()
        options, written = self._options, []
        streams: tuple[StreamFigures, ...] = ()
        if self._streams is not None:
            streams, entries = self._streams.finish(
                None if options.bitstream is None else Path(options.bitstream)
            )
            if self._folder is not None:
                index = Index(
                    network=self._checkpoint.spec.architecture,
                    data=self._data,
                    split=self._split,
                    made_with=made_with(self._context.device),
                    streams=entries,
                )
                write_index(index, self._folder)
                written.append(str(options.bitstream))
        measured_on = f"{self._data}, {self._split} split"
        after = () if metrics is None else (metrics,)
        written += write_reports(figures, options, self._checkpoint, measured_on, (), after, self._context)
        return Seen(tuple(replace(tap, bands=()) for tap in figures), streams, tuple(written))

    def close(self) -> None:
        """Close all files, also where something failed."""
        if self._streams is not None:
            self._streams.close()


@contextlib.contextmanager
def watched(
    checkpoint: Checkpoint, data: str, split: str, options: EvaluateOptions, context: Context
) -> Iterator[Watch]:
    """Look at all passes through taps within; the folder of streams gets its name at the end.

    Args:
        checkpoint: the network, with or without taps.
        data: reference of the data set.
        split: that is passed.
        options: what is to be written.
        context: device, and whether files may be replaced.
    """
    with contextlib.ExitStack() as stack:
        folder = None
        if options.bitstream is not None:
            folder = stack.enter_context(
                folder_atomically(Path(options.bitstream), overwrite=context.force, ours=is_ours)
            )
        watch = Watch(checkpoint, data, split, options, context, folder)
        stack.callback(watch.close)
        stack.enter_context(recording(checkpoint.model, watch))
        yield watch


_TAPS = (
    "tap", "map", "elements", "zeros %", "zero symbols %", "k", "best k", "bits/element", "vs 8 bit",
    "vs float32", "SQNR dB", "clamped", "saturated",
)  # fmt: skip


def tap_tables(taps: Sequence[TapFigures], split: str) -> Tables:
    """A table with a row a tap and one for all; none without taps."""
    if not taps:
        return []
    rows: list[Sequence[object]] = [
        (
            tap.name,
            "x".join(map(str, tap.shape)),
            tap.elements,
            f"{tap.zeros:.1f}",
            f"{tap.zero_symbols:.1f}",
            tap.k,
            tap.best_k,
            f"{tap.bits_per_element:.3f}",
            f"{tap.ratio_8bit:.2f}",
            f"{tap.ratio_float32:.2f}",
            None if tap.sqnr_db is None else f"{tap.sqnr_db:.1f}",
            tap.clamped_values,
            tap.clamped_symbols,
        )
        for tap in taps
    ]
    elements, bits = sum(tap.elements for tap in taps), sum(tap.bits for tap in taps)
    ratios = (f"{bits / elements:.3f}", f"{8 * elements / bits:.2f}", f"{32 * elements / bits:.2f}")
    clamped = sum(tap.clamped_values for tap in taps), sum(tap.clamped_symbols for tap in taps)
    rows.append(("all", None, elements, None, None, None, None, *ratios, None, *clamped))
    return [(f"coded feature maps, {split} split", _TAPS, rows)]


_STREAMS = (
    "tap", "elements", "payload bits", "side bits", "file bytes", "bits/element", "vs 8 bit", "vs float32",
)  # fmt: skip


def stream_tables(streams: Sequence[StreamFigures]) -> Tables:
    """A table with a row a stream and one for all; none without streams."""
    if not streams:
        return []
    rows = [_stream_row(s.tap, s.elements, s.payload_bits, s.side_bits, s.file_bytes) for s in streams]
    sums = [
        sum(getattr(stream, key) for stream in streams)
        for key in ("elements", "payload_bits", "side_bits", "file_bytes")
    ]
    return [("bitstreams", _STREAMS, [*rows, _stream_row("all", *sums)])]


def _stream_row(name: str, elements: int, payload: int, side: int, size: int) -> Sequence[object]:
    bits = f"{8 * size / elements:.3f}"
    return name, elements, payload, side, size, bits, f"{elements / size:.2f}", f"{4 * elements / size:.2f}"
