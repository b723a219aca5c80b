"""A bar chart of each layer's width before and after a pruning."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cctool.base.errors import UsageError
from cctool.checkpoint.file.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE, _KEPT, _UNTOUCHED = "#d7dde4", "#1f6fb2", "#8a97a6"
_ROW, _MARGIN, _WIDE = 0.24, 1.5, 9.0  # inches
_NAMES_UP_TO = 150  # more rows than this are drawn without their names
_TALLEST = 60.0


@dataclass(frozen=True)
class WidthBar:
    """The bar of one family.

    Attributes:
        name: of the family.
        before: channels before.
        after: channels after.
        note: why it kept its width, "" if it did not.
    """

    name: str
    before: int
    after: int
    note: str = ""


def write_widths(widths: Sequence[WidthBar], path: Path, title: str, *, overwrite: bool = False) -> None:
    """Draw the widths and write the picture atomically.

    Args:
        widths: in the order of the forward pass.
        path: .png, .svg or .pdf.
        title: above the picture.
        overwrite: whether an existing file may be replaced.

    Raises:
        UsageError: the suffix is another one.
        CheckpointError: it exists, or cannot be written.
    """
    check_picture_suffix(path)
    picture = draw_widths(widths, title, path.suffix.lower()[1:])
    write_bytes(path, picture, overwrite=overwrite)


def check_picture_suffix(path: Path) -> None:
    """Refuse a file name that no picture can have.

    Raises:
        UsageError: naming the suffixes that are known.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: a picture ends in .png, .svg or .pdf, not {path.suffix or 'nothing'}")


def draw_widths(widths: Sequence[WidthBar], title: str, kind: str = "png") -> bytes:
    """Draw a bar per family, on a logarithmic axis if widths differ much; returns the picture's bytes."""
    # Not pyplot, which would look for a display and keep the figure in memory.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height = min(_MARGIN + _ROW * max(len(widths), 1), _TALLEST)
    figure = Figure(figsize=(_WIDE, height), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(widths))
    axes.barh(rows, [w.before for w in widths], color=_DENSE, height=0.85, label="before")
    axes.barh(
        rows,
        [w.after for w in widths],
        color=[_KEPT if w.after < w.before else _UNTOUCHED for w in widths],
        height=0.5,
        label="kept",
    )
    _label(axes, widths)
    figure.legend(
        handles=[
            Patch(color=_DENSE, label="before"),
            Patch(color=_KEPT, label="kept, some were cut"),
            Patch(color=_UNTOUCHED, label="untouched"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        frameon=False,
    )
    axes.set_title(title, loc="left", fontsize=10)
    stream = io.BytesIO()
    # Without creation dates and random ids, equal pictures are equal files.
    metadata: dict[str, Any] = (
        {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else {}
    )
    with rc_context({"svg.hashsalt": "widths"}):
        figure.savefig(stream, format=kind, dpi=110, metadata=metadata)
    return stream.getvalue()


def _label(axes: Axes, widths: Sequence[WidthBar]) -> None:
    largest = max((w.before for w in widths), default=1)
    smallest = min((w.before for w in widths), default=1)
    if largest > 20 * smallest:  # narrow families would be invisible on a linear axis
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("channels")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    if len(widths) <= _NAMES_UP_TO:
        axes.set_yticks(range(len(widths)), [w.name.replace("$", r"\$") for w in widths], fontsize=7)
        for row, width in enumerate(widths):
            text = f"{width.after} of {width.before}" if width.after < width.before else f"{width.before}"
            axes.annotate(
                text, (width.before, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6
            )
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(widths)} families, the first on top")
