"""Tables about coded feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from cctool.operations.context import ShownTables
from cctool.operations.transform.quality_search import SearchReport, SweepPoint
from cctool.operations.transform.write_streams import StreamFigures
from cctool.tasks.base import LOSS
from cctool.transforms.codec.figures import TapFigures

_TAPS = (
    "tap", "map", "elements", "zeros %", "zero symbols %", "k", "best k", "bits/element", "vs 8 bit",
    "vs float32", "SQNR dB", "clamped", "saturated",
)  # fmt: skip


def tap_tables(taps: Sequence[TapFigures], split: str, title: str = "coded feature maps") -> ShownTables:
    """A table with a row for each tap and one for all; no table without taps."""
    if not taps:
        return []
    rows: list[Sequence[object]] = [_tap_row(tap) for tap in taps]
    elements, bits = sum(tap.elements for tap in taps), sum(tap.bits for tap in taps)
    ratios = (f"{bits / elements:.3f}", f"{8 * elements / bits:.2f}", f"{32 * elements / bits:.2f}")
    clamped = sum(tap.clamped_values for tap in taps), sum(tap.clamped_symbols for tap in taps)
    rows.append(("all", None, elements, None, None, None, None, *ratios, None, *clamped))
    return [(f"{title}, {split} split", _TAPS, rows)]


def _tap_row(tap: TapFigures) -> Sequence[object]:
    zeros = f"{tap.zeros:.1f}", f"{tap.zero_symbols:.1f}"
    ratios = f"{tap.bits_per_element:.3f}", f"{tap.ratio_8bit:.2f}", f"{tap.ratio_float32:.2f}"
    sqnr = None if tap.sqnr_db is None else f"{tap.sqnr_db:.1f}"
    orders, clamped = (tap.k, tap.best_k), (tap.clamped_values, tap.clamped_symbols)
    return tap.name, "x".join(map(str, tap.shape)), tap.elements, *zeros, *orders, *ratios, sqnr, *clamped


_STREAMS = (
    "tap", "elements", "payload bits", "side bits", "file bytes", "bits/element", "vs 8 bit", "vs float32",
)  # fmt: skip


def stream_tables(streams: Sequence[StreamFigures]) -> ShownTables:
    """A table with a row for each stream and one for all; no table without streams."""
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


def quality_tables(search: SearchReport | None, sweep: Sequence[SweepPoint]) -> ShownTables:
    """Tables of the qualities that a search tried and that a sweep measured."""
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[object]]]] = []
    if search is not None:
        rows = [
            (f"{trial.quality:.4g}", f"{trial.ratio:.3f}", f"{trial.bits_per_element:.3f}")
            for trial in search.trials
        ]
        title = f"search for a ratio of {search.asked:g} on {search.n:,} {search.split} images"
        tables.append((title, ("quality", "vs 8 bit", "bits/element"), rows))
    if sweep:
        names = list(dict.fromkeys(name for point in sweep for name in point.values if name != LOSS.name))
        points = [
            (
                point.quality,
                point.split,
                point.n,
                f"{point.bits_per_element:.3f}",
                f"{point.ratio_8bit:.2f}",
                f"{point.ratio_float32:.2f}",
                *(point.values.get(name) for name in names),
            )
            for point in sweep
        ]
        columns = ("quality", "split", "n", "bits/element", "vs 8 bit", "vs float32", *names)
        tables.append(("qualities", columns, points))
    return tables


def search_notes(search: SearchReport | None) -> tuple[str, ...]:
    """The result of a search as a note; none without a search."""
    if search is None:
        return ()
    return (
        f"quality {search.found.quality:.4g} compresses {search.found.ratio:.3f} times against 8 bit on "
        f"{search.n:,} {search.split} images, {search.asked:g} was asked for",
    )
