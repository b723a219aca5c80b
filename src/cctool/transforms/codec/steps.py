"""Steps of the codec's second quantizer: default and published tables, table files, and quality.

A table of a block transform is one number (a flat step), 2 * block - 1 numbers (one for each anti-diagonal
i + j of a block, from low to high frequencies) or block * block (row by row). A table of a wavelet is one
number or levels + 1: details from the finest to the coarsest, then LL. Smaller blocks at the right and
bottom edges use the table's top left corner.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import UsageError
from cctool.base.json_text import read_json
from cctool.options.transform.choices import TransformPreset
from cctool.transforms.kernels.blocks import norm_scale
from cctool.transforms.kernels.by_name import is_wavelet
from cctool.transforms.kernels.matmul import constant
from cctool.transforms.kernels.spatial import block_sizes

NEVER = 1e6
"""A step larger than any coefficient, with which the published tables drop bands."""

USUAL_SPREAD = 8 / 0.6 / 255
"""Standard deviation of a map's integers, relative to the largest, that the default table is made for."""

_MAX_FILE = 2**22
_FINEST = 0.01


@dataclass(frozen=True)
class StepTable:
    """Steps of one tap.

    Attributes:
        steps: see the module docstring.
        original: whether they are in units of the map's own values, not of the integers before the transform.
        scaled: whether calibration scales them to the spread of the tap's maps; see `default_table`.
    """

    steps: tuple[float, ...]
    original: bool = False
    scaled: bool = False


@dataclass(frozen=True)
class TableChoice:
    """Tables of a network's taps.

    Attributes:
        table: of every tap to which none of the others applies.
        last: of the last tap.
        patterns: by glob pattern of the tap's name; the first match applies.
    """

    table: StepTable
    last: StepTable | None = None
    patterns: Mapping[str, StepTable] | None = None

    def of(self, name: str, *, last: bool) -> StepTable:
        """The table of one tap."""
        for pattern, table in (self.patterns or {}).items():
            if fnmatchcase(name, pattern):
                return table
        return self.last if last and self.last is not None else self.table


def default_table(kernel: str, block: int, levels: int, bits: int) -> StepTable:
    """Our own table: steps that grow linearly with frequency, to twice that of the mean.

    Symbols may be as wide as they need, so the step of the mean can be fine. The numbers are for maps whose
    integers have a standard deviation of `USUAL_SPREAD` times 2^bits - 1; calibration scales them to the
    tap's own, to 0.6 to 1.2 standard deviations. A tap's maximum alone says little about how large an error
    may be: deep layers have few large values among many small ones.
    """
    unit = (2**bits - 1) / 255
    if kernel == "identity":
        return StepTable((8 * unit,))
    count = levels + 1 if is_wavelet(kernel) else 2 * block - 1
    rising = [8 * unit * (1 + index / max(1, count - 1)) for index in range(count)]
    return StepTable(tuple(reversed(rising) if is_wavelet(kernel) else rising), scaled=True)


def preset_tables(preset: TransformPreset | None, block: int, levels: int) -> TableChoice | None:
    """The tables of a published procedure; None for procedures without tables.

    Source: the code of "feature-compression" as of 2019-05: its inference table, its training table, and the
        table
    of its wavelets, a step of 0.1 in the map's own units. The last tap, which is averaged afterwards, keeps
    only the means. Raises UsageError for blocks of another side than 8.
    """
    highest = 2 * block - 2
    if preset is TransformPreset.FEATURE_COMPRESSION_DCT:
        low = (25.0,) * 8 + (50.0,) * 6 + (100.0,)
        last = (25.0,) + (NEVER,) * highest
    elif preset is TransformPreset.FEATURE_COMPRESSION_DCT_RETRAIN:
        low = (150.0,) + (50.0,) * 7 + (100.0,) * 6 + (200.0,)
        last = (150.0,) + (NEVER,) * highest
    elif preset is TransformPreset.FEATURE_COMPRESSION_DWT:
        return TableChoice(
            StepTable((0.1,) * (levels + 1), True), StepTable((NEVER,) * levels + (1.0,), True)
        )
    else:
        return None
    if block != 8:
        raise UsageError(f"--preset {preset}: its table is of 8 x 8 blocks; --block {block} needs --q-table")
    return TableChoice(StepTable(low), StepTable(last))


def quality_scale(quality: float | None) -> float:
    """Factor of all steps, as in the Independent JPEG Group's library, but without its rounding.

    50 / quality below 50, else 2 - quality / 50, and at least 0.01, which quality 100 gives.

    >>> quality_scale(50), quality_scale(25), quality_scale(75), quality_scale(100)
    (1.0, 2.0, 0.5, 0.01)
    """
    if quality is None:
        return 1.0
    return 50 / quality if quality < 50 else max(2 - quality / 50, _FINEST)


def allowed_lengths(kernel: str, block: int, levels: int) -> tuple[int, ...]:
    """How many numbers a table may have."""
    if is_wavelet(kernel):
        return (1, levels + 1)
    return (1,) if kernel == "identity" else (1, 2 * block - 1, block * block)


def check_table(steps: Sequence[float], kernel: str, block: int, levels: int, who: str) -> None:
    """Raise UsageError, naming ``who`` and what is allowed, for a table that does not fit the kernel."""
    lengths = allowed_lengths(kernel, block, levels)
    if len(steps) not in lengths:
        several = " or ".join(map(str, lengths))
        raise UsageError(f"{who}: {len(steps)} steps; {several} are allowed for --kernel {kernel}")
    wrong = [step for step in steps if not (math.isfinite(step) and step > 0)]
    if wrong:
        raise UsageError(f"{who}: a step of {wrong[0]}; positive numbers are allowed")


def read_tables(
    path: str, taps: Collection[str] = (), lengths: Collection[int] = ()
) -> Mapping[str, tuple[float, ...]]:
    """Read tables from a file, by glob pattern of tap names; ``*`` for a table without a pattern.

    Args:
        path: JSON, a list or ``{"pattern": list}``; or CSV, the numbers of one table (a square of them row by
            row), or lines that begin with a pattern, all of them after a header whose first cell is ``tap``.
        taps: names of the taps, which may be numbers, too.
        lengths: how many numbers a table may have, which tells whether such a number is a name.

    Raises:
        UsageError: if it cannot be read, holds something else, or has a pattern twice.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_FILE:
            raise UsageError(f"--q-table {path}: larger than {_MAX_FILE // 2**20} MiB")
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
        found = _from_json(read_json(text)) if file.suffix == ".json" else _from_csv(text, taps, lengths)
    # RecursionError: deeply nested JSON.
    except (OSError, UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"--q-table {path}: {error}") from None
    if not found:
        raise UsageError(f"--q-table {path}: no numbers in it")
    return found


def _from_json(document: Any) -> dict[str, tuple[float, ...]]:
    tables = document if isinstance(document, dict) else {"*": document}
    return {pattern: tuple(_numbers(value)) for pattern, value in tables.items()}


def _numbers(value: Any) -> list[float]:
    """Numbers of a list, or of a list of rows."""
    if not isinstance(value, list):
        raise TypeError("a list of numbers is expected, or patterns with a list each")
    rows = [item if isinstance(item, list) else [item] for item in value]
    found = [item for row in rows for item in row]
    wrong = [item for item in found if isinstance(item, bool) or not isinstance(item, (int, float))]
    if wrong:
        raise TypeError(f"{json.dumps(wrong[0])} is no number")
    return [float(item) for item in found]


def _from_csv(text: str, taps: Collection[str], lengths: Collection[int]) -> dict[str, tuple[float, ...]]:
    lines = [_cells(line, number) for number, line in enumerate(csv.reader(text.splitlines()), start=1)]
    lines = [line for line in lines if line]
    if lines and lines[0][0] == "tap" and not any(map(_is_number, lines[0])):
        return _named(lines[1:], [line[0] for line in lines[1:]])
    words = [line[0] for line in lines if not _is_number(line[0])]
    numbers = [line[0] for line in lines if _is_number(line[0]) and line[0] in taps]
    if not numbers:
        return _named(lines, words)

    def fits(tables: Mapping[str, Sequence[float]]) -> bool:
        return all(len(steps) in lengths and min(steps) > 0 for steps in tables.values())

    plain = _named(lines, words)
    # A table's rows may begin with one number several times, which as names would be an error.
    if len(set(numbers)) < len(numbers) and fits(plain):
        return plain
    named = _named(lines, [*words, *numbers])
    if fits(plain) and fits(named):
        raise ValueError(
            f"{numbers[0]} is a tap, and may be a step, too: a first line tap,steps says that taps are named"
        )
    return named if fits(named) else plain


def _cells(line: Sequence[str], number: int) -> list[str]:
    """The cells of a line up to its last with text; spreadsheets make all lines equally long."""
    cells = [cell.strip() for cell in line]
    while cells and not cells[-1]:
        cells.pop()
    if not all(cells):
        raise ValueError(f"line {number} ({','.join(cells)}): cell {cells.index('') + 1} is empty")
    return cells


def _named(lines: Sequence[Sequence[str]], names: Collection[str]) -> dict[str, tuple[float, ...]]:
    """Numbers by the name that begins their line; all others in one table."""
    found: dict[str, list[float]] = {}
    for cells in lines:
        named = cells[0] in names
        if named and cells[0] in found:
            raise ValueError(f"{cells[0]} begins two lines: all its numbers stand in one")
        numbers = found.setdefault(cells[0] if named else "*", [])
        numbers += [float(cell) for cell in cells[named:]]
    return {pattern: tuple(numbers) for pattern, numbers in found.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def block_steps(
    steps: tuple[float, ...],
    kernel: str,
    norm: str,
    block: int,
    height: int,
    width: int,
    device: torch.device,
) -> Tensor:
    """Steps of the orthonormal coefficients of a map, float64 (height, width); shared, not to be changed.

    ``norm`` is ``none`` if the table is for coefficients of scipy's ``norm=None``, else ``ortho``; ``block``
    is the nominal side of a block.
    """
    like = torch.empty(0, dtype=torch.float64, device=device)
    return constant(_block_steps, steps, kernel, norm, block, height, width, like=like)


def _block_steps(
    steps: tuple[float, ...], kernel: str, norm: str, block: int, height: int, width: int
) -> NDArray[np.float64]:
    tall, wide = block_sizes(height, block), block_sizes(width, block)
    table = _square(steps, block)
    tiles = {(h, w): table[:h, :w] for h in set(tall) for w in set(wide)}
    if norm == "none":
        tiles = {size: tile / norm_scale(*size, kernel) for size, tile in tiles.items()}
    return torch.cat([torch.cat([tiles[h, w] for w in wide], 1) for h in tall]).numpy()


def _square(steps: tuple[float, ...], block: int) -> Tensor:
    """The steps of a whole block, (block, block), float64."""
    places = [(i, j) for i in range(block) for j in range(block)]
    if len(steps) == 1:
        chosen = [steps[0]] * len(places)
    elif len(steps) == 2 * block - 1:
        chosen = [steps[i + j] for i, j in places]
    else:
        chosen = list(steps)
    return torch.tensor(chosen, dtype=torch.float64).view(block, block)


def wavelet_steps(steps: tuple[float, ...], bands: int) -> tuple[float, ...]:
    """One step for each band of a pyramid, LL last; small maps have fewer levels, without the coarsest.

    >>> wavelet_steps((1.0, 2.0, 3.0, 4.0), 3)
    (1.0, 2.0, 4.0)
    """
    return steps * bands if len(steps) == 1 else (*steps[: bands - 1], steps[-1])
