"""The spreadsheet of coded feature maps, by tap (a module whose output a codec codes) and sub-band."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cctool.analysis.features.bands import Band, bands_of
from cctool.analysis.table import (
    Cell,
    Column,
    Report,
    Table,
    Total,
    counted,
    extreme,
    harmonic_mean_by,
    mean_by,
)
from cctool.transforms.codec.figures import TapFigures

Notes = Sequence[tuple[str, str]]

ORDERS = range(6)
_PERCENT, _REAL, _RATIO = "0.00", "0.0000", "0.00"


def _ratio(order: int, against: str, bits: int) -> Column:
    key = f"ratio{bits}_k{order}"
    return Column(
        key,
        f"k={order} vs {against}",
        f"Bits of the map at {bits} an element over all coded bits at order {order}, side information "
        "included; each tap's best order is marked.",
        _RATIO,
        harmonic_mean_by(key, "elements"),
    )


def _mean(key: str) -> Total:
    return mean_by(key, "elements")


TAP_COLUMNS = (
    Column("name", "Tap", "Module whose output is coded."),
    Column("shape", "Map", "Shape of the map of one sample, C x H x W."),
    counted("elements", "Elements", "Of all maps that were measured."),
    Column("minimum", "Min", "Smallest value of the map.", _REAL, extreme("minimum", largest=False)),
    Column("maximum", "Max", "Largest value of the map.", _REAL, extreme("maximum", largest=True)),
    Column("mean", "Mean", "Of all values of the map.", _REAL, _mean("mean")),
    Column("zeros", "Zeros (%)", "Values of the map that are zero.", _PERCENT, _mean("zeros")),
    Column(
        "transform_zeros",
        "Zero symbols (%)",
        "Quantized coefficients that are zero: the sparsity of the transform.",
        _PERCENT,
        mean_by("transform_zeros", "symbols"),
    ),
    counted("symbols", "Symbols", "Coded symbols; wavelets of odd sizes have more than elements."),
    counted(
        "clamped_values",
        "Clamped values",
        "Values beyond the calibrated range, which the quantizer before the transform clamped.",
    ),
    counted(
        "clamped_symbols",
        "Saturated symbols",
        "Coefficients that the quantizer behind the transform clamped to the symbols' bits.",
    ),
    Column("sqnr", "SQNR (dB)", "Energy of the map over that of its coding error, in decibel.", _PERCENT),
    Column(
        "entropy",
        "Entropy bound",
        "Zero-order entropy of the symbols, bits an element.",
        _REAL,
        _mean("entropy"),
    ),
    Column("k", "k", "Order that the tap codes with.", "0"),
    Column("best_k", "Best k", "Order that takes the fewest bits on these maps.", "0"),
    Column(
        "bits_per_element",
        "Bits an element",
        "Coded bits at the tap's order, side information included, over elements.",
        _REAL,
        _mean("bits_per_element"),
    ),
    counted("payload_bits", "Payload bits", "Of the symbols at the tap's order."),
    counted(
        "side_bits",
        "Side bits",
        "Headers, ranges, steps, bases, sample means, block tables, and the bits that fill the last byte.",
    ),
    *(_ratio(order, "8 bit", 8) for order in ORDERS),
    *(_ratio(order, "float32", 32) for order in ORDERS),
)

BAND_COLUMNS = (
    Column("tap", "Tap", "Module whose output is coded."),
    Column("band", "Sub-band", "Group of coefficients."),
    counted("symbols", "Symbols", "Coded symbols of the band."),
    Column("zeros", "Zeros (%)", "Symbols that are zero.", _PERCENT, mean_by("zeros", "symbols")),
    Column("minimum", "Min", "Smallest symbol.", "#,##0", extreme("minimum", largest=False)),
    Column("maximum", "Max", "Largest symbol.", "#,##0", extreme("maximum", largest=True)),
    Column("entropy", "Entropy", "Zero-order entropy, bits a symbol.", _REAL, mean_by("entropy", "symbols")),
)


def feature_report(figures: Sequence[TapFigures], notes: Notes) -> Report:
    """Build the sheets of coded feature maps: a row per tap, and a row per sub-band.

    Args:
        figures: of the taps, in the order of the forward pass.
        notes: what identifies the network and the data, and its accuracy before and after.
    """
    taps = Table(
        "Taps",
        TAP_COLUMNS,
        tuple(_row(tap) for tap in figures),
        marked=frozenset(
            (row, f"ratio{bits}_k{tap.best_k}") for row, tap in enumerate(figures) for bits in (8, 32)
        ),
    )
    bands = Table(
        "Sub-bands", BAND_COLUMNS, tuple(_band_row(tap, band) for tap in figures for band in bands_of(tap))
    )
    return Report("Coded feature maps", taps, (bands,), tuple(notes))


def _row(tap: TapFigures) -> tuple[Cell, ...]:
    coded = [payload + tap.side_bits for payload in tap.payload_bits]
    return (
        tap.name,
        "x".join(map(str, tap.shape)),
        tap.elements,
        tap.minimum,
        tap.maximum,
        tap.mean,
        tap.zeros,
        tap.zero_symbols,
        tap.symbols,
        tap.clamped_values,
        tap.clamped_symbols,
        tap.sqnr_db,
        tap.entropy_bits / tap.elements,
        tap.k,
        tap.best_k,
        tap.bits_per_element,
        tap.payload_bits[tap.k],
        tap.side_bits,
        *(bits * tap.elements / all_of_them for bits in (8, 32) for all_of_them in coded),
    )


def _band_row(tap: TapFigures, band: Band) -> tuple[Cell, ...]:
    return (
        tap.name,
        band.name,
        band.total,
        100 * band.zeros / band.total,
        band.symbols[0],
        band.symbols[-1],
        sum(count * math.log2(band.total / count) for count in band.counts) / band.total,
    )
