"""Which class was taken for which: as a picture, and as a table of counts."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cctool.analysis.table import WHOLE, Column, Report, Table
from cctool.analysis.workbook import write_report
from cctool.checkpoint.file.atomic import write_bytes

_WITH_NUMBERS = 20  # classes up to which each cell shows its count
_MOST_NAMES = 250  # names on an axis; of more classes every second, third ... is named
_LONGEST = 24  # letters of a name
_TICKS = (0, 1, 5, 10, 25, 50, 100)


def write_confusion(
    counts: Tensor,
    names: Sequence[str],
    title: str,
    path: Path,
    notes: tuple[tuple[str, str], ...],
    *,
    overwrite: bool = False,
) -> None:
    """Write a confusion matrix atomically, as its file's suffix says.

    Args:
        counts: whole numbers (classes, classes), rows by label, columns by prediction.
        names: one for each class.
        title: above the picture.
        path: ends in .png, .csv or .xlsx.
        notes: what identifies network and data, for the workbook.
        overwrite: whether an existing file may be replaced.

    Raises:
        CheckpointError: the file exists, or cannot be written.
    """
    if path.suffix.lower() == ".png":
        write_bytes(path, draw_confusion(counts, names, title), overwrite=overwrite)
        return
    columns = (
        Column("label", "label", "What the data set says; each row is a label, each column a prediction."),
        *(Column(f"class{i}", name, "Taken for this class.", WHOLE) for i, name in enumerate(names)),
    )
    rows = tuple((name, *row) for name, row in zip(names, counts.tolist(), strict=True))
    write_report(Report(title, Table("Confusion", columns, rows), (), notes), path, overwrite=overwrite)


def draw_confusion(counts: Tensor, names: Sequence[str], title: str) -> bytes:
    """Draw a confusion matrix; returns the bytes of a PNG.

    Colours show the percentage of a row, on a scale of square roots, by which one in a hundred is still seen;
    rows without samples are grey. Up to 20 classes the counts stand in the cells.

    Args:
        counts: whole numbers (classes, classes), rows by label.
        names: one for each class.
        title: above the picture.
    """
    # Not pyplot, which would look for a display and keep the figure in memory.
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    matrix = counts.double().cpu().numpy()
    totals = matrix.sum(1, keepdims=True)
    shares = np.divide(100 * matrix, totals, out=np.full_like(matrix, np.nan), where=totals > 0)
    classes = len(names)
    # A cell holds a count of five digits, or a line of the smallest letters.
    side = 0.52 * classes if classes <= _WITH_NUMBERS else 0.12 * min(classes, _MOST_NAMES)
    side = max(side, 4.0)
    size = 10 if side < 12 else 16
    figure = Figure(figsize=(side + 2.6, side + 1.6), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["Blues"].with_extremes(bad="0.88")
    image = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, ticks=_TICKS, fraction=0.04, pad=0.02, shrink=min(1.0, 6 / side))
    bar.set_label("% of the label's row (square-root scale)", fontsize=size - 2)
    bar.ax.tick_params(labelsize=size - 2)
    axes.set_xlabel("predicted", fontsize=size)
    axes.set_ylabel("label", fontsize=size)
    axes.set_title(title, loc="left", fontsize=size, parse_math=False, wrap=True)
    _name_classes(axes, names)
    if classes <= _WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 40 else "black"
                axes.text(column, row, _short(count), ha="center", va="center", fontsize=7, color=colour)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Names may be in a script that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _name_classes(axes: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // _MOST_NAMES)
    places = range(0, len(names), step)
    texts = [names[i] if len(names[i]) <= _LONGEST else f"{names[i][: _LONGEST - 1]}…" for i in places]
    size = 8 if len(names) <= _WITH_NUMBERS else 6
    axes.set_xticks(places, texts, fontsize=size, rotation=90, parse_math=False)
    axes.set_yticks(places, texts, fontsize=size, parse_math=False)
    axes.tick_params(length=2, pad=1)


def _short(count: float) -> str:
    return f"{count:.0f}" if count < 1e5 else f"{count:.0e}".replace("e+0", "e")
