"""Pictures of coded feature maps: histograms of symbols, and accuracy against compression ratio."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cctool.analysis.features.bands import Band, grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR, _ZERO, _LINE, _REFERENCE = "#1f6fb2", "#8a97a6", "#1f6fb2", "#8a97a6"
_SPLITS = ("#1f6fb2", "#c8641e", "#3f8f4f")
_ACROSS, _PANEL, _TALL = 4, 2.6, 2.2
_TAIL = 0.002
"""Share of the non-zero symbols that may be outside the axis."""

_MOST_BARS, _MOST_PANELS = 121, 16


@dataclass(frozen=True)
class CurvePoint:
    """Measurements at one quality.

    Attributes:
        split: of the data set.
        quality: 1 to 100.
        ratio: bits of an 8-bit map over the coded bits, including side information.
        value: the network's main metric.
    """

    split: str
    quality: float
    ratio: float
    value: float


def draw_histograms(title: str, bands: Sequence[Band], *, zero_bar: bool = False) -> bytes:
    """Draw one panel per sub-band; returns the bytes of a PNG.

    Args:
        title: above the picture.
        bands: in the order of the panels, at least one; if there are many, neighbours share a panel.
        zero_bar: also draw the bar of zeros, which is much higher than the others.
    """
    from matplotlib.figure import Figure

    bands = grouped(bands, _MOST_PANELS)
    across = min(_ACROSS, len(bands))
    down = math.ceil(len(bands) / across)
    size = (max(_PANEL * across, 5.2), _TALL * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, band in zip(panels, bands, strict=False):
        _panel(axes, band, zero_bar)
    for axes in panels[len(bands) :]:  # the last row may not be full
        axes.set_axis_off()
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=10)
    figure.supxlabel("symbol", fontsize=8)
    figure.supylabel("% of the band", fontsize=8)
    return _png(figure)


def draw_curve(
    title: str, points: Sequence[CurvePoint], uncoded: Sequence[tuple[str, float]], label: str
) -> bytes:
    """Draw the main metric against compression ratio; returns the bytes of a PNG.

    Args:
        title: above the picture.
        points: measured qualities.
        uncoded: (split, metric) of the network without codecs, drawn as dashed lines.
        label: the metric and its unit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    splits = list(dict.fromkeys([point.split for point in points]))
    for split, colour in zip(splits, _SPLITS, strict=False):
        line = sorted((point for point in points if point.split == split), key=lambda point: point.ratio)
        axes.plot(
            [point.ratio for point in line],
            [point.value for point in line],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.4,
            label=split,
        )
        if split == splits[-1]:
            _name_qualities(axes, line)
        for name, accuracy in uncoded:
            if name == split:
                axes.axhline(accuracy, color=colour, linestyle="--", linewidth=0.9, label=f"{split}, uncoded")
    axes.set_xlabel("ratio against 8 bit, side information included")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6eaee", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.set_title(_plain(title), loc="left", fontsize=10)
    return _png(figure)


def _name_qualities(axes: Axes, line: Sequence[CurvePoint]) -> None:
    for point in line:
        axes.annotate(
            f"{point.quality:g}",
            (point.ratio, point.value),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            color="#50606f",
        )


def _panel(axes: Axes, band: Band, zero_bar: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    total, zeros = band.total, band.zeros
    counts = zip(band.symbols, band.counts, strict=True)
    shown = {symbol: count for symbol, count in counts if count and (symbol or zero_bar)}
    low, high = _span(shown)
    # Odd, so that a bar is centred at a symbol, and one of them at zero.
    width = math.ceil((high - low + 1) / _MOST_BARS) // 2 * 2 + 1
    bars: dict[int, int] = {}
    for symbol, count in shown.items():
        if low <= symbol <= high:
            place = (symbol + width // 2) // width * width
            bars[place] = bars.get(place, 0) + count
    axes.bar(
        list(bars),
        [100 * count / total for count in bars.values()],
        width=width * 0.92,
        color=[_ZERO if place == 0 and zero_bar else _BAR for place in bars],
    )
    share = f"{_percent(zeros, total)} % zero" if total else "no symbols"
    beyond = sum(count for symbol, count in shown.items() if not low <= symbol <= high)
    tail = f", {100 * beyond / total:.2g} % beyond" if beyond else ""
    axes.set_title(_plain(f"{band.name}: {share}{tail}"), fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    # Every axis includes zero, also without a bar for it.
    axes.set_xlim(min(low, -1) - 0.7 * width, max(high, 1) + 0.7 * width)
    if not shown:
        axes.set_yticks([])


def _span(counts: dict[int, int]) -> tuple[int, int]:
    """Ends of the axis; outliers too few to be visible are outside."""
    if not counts:
        return 0, 0
    symbols = sorted(counts)
    allowed = _TAIL * sum(counts.values()) / 2
    low, high, below, above = 0, len(symbols) - 1, 0, 0
    while low < high and below + counts[symbols[low]] <= allowed:
        below += counts[symbols[low]]
        low += 1
    while high > low and above + counts[symbols[high]] <= allowed:
        above += counts[symbols[high]]
        high -= 1
    return symbols[low], symbols[high]


def _percent(part: int, whole: int) -> str:
    """Percent with one decimal; 100.0 only if it is exact."""
    return ">99.9" if part < whole and 100 * part / whole >= 99.95 else f"{100 * part / whole:.1f}"


def _plain(text: str) -> str:
    """Escape dollar signs, which would start a formula."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
