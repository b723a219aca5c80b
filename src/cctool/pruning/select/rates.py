"""A table of rates, family or layer -> rate, as users write it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cctool.base.errors import UsageError
from cctool.base.json_text import DoubledKeyError, read_json, twice
from cctool.base.networks import some
from cctool.graph.records import ChannelGraph
from cctool.pruning.select.order import names_of

_NAMES = ("family", "layer", "name", "module", "parameter", "tensor")
_LARGEST = 16 * 2**20  # bytes; a larger file is no table of rates


def read_rates(path: str) -> dict[str, float]:
    """Read a table of rates.

    JSON: ``{"conv1": 0.5}``, or a list of objects. CSV: a header that names the columns, each once, and rows
    of as many cells. The name is in one of the columns family, layer, name, module, parameter, tensor, the
    rate in ``rate``, of every row. Other columns are ignored, as are rows without any text.

    Args:
        path: of a ``.csv`` or ``.json`` file.

    Returns:
        Fraction to remove, in [0, 1), by name.

    Raises:
        UsageError: the file cannot be read, or a row is malformed; names the row.
    """
    file = Path(path)
    if file.suffix not in (".csv", ".json"):
        raise UsageError(f"--rates {path}: a .csv or .json file is expected")
    try:
        if file.stat().st_size > _LARGEST:
            raise UsageError(
                f"--rates {path}: {file.stat().st_size:,} bytes are more than a table of rates has"
            )
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--rates {path}: {getattr(error, 'strerror', None) or error}") from error
    rows = _json_rows(text, path) if file.suffix == ".json" else _csv_rows(text, path)
    rates: dict[str, float] = {}
    for number, (name, value) in enumerate(rows, start=1):
        rate = _rate(value)
        if not name or rate is None:
            raise UsageError(
                f"--rates {path}: row {number} ({name or 'without a name'}: {_shown(value)}): a name and a "
                "rate in [0, 1) are expected"
            )
        if rates.get(name, rate) != rate:
            raise UsageError(f"--rates {path}: {name} has two rates, {rates[name]:g} and {rate:g}")
        rates[name] = rate
    if not rates:
        raise UsageError(f"--rates {path}: holds no rates")
    return rates


def _json_rows(text: str, path: str) -> list[tuple[str, Any]]:
    try:
        document = read_json(text)
    except DoubledKeyError as error:
        raise UsageError(f"--rates {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--rates {path}: is no JSON ({error})") from None
    if isinstance(document, Mapping):
        return [(str(name), value) for name, value in document.items()]
    if isinstance(document, list) and all(isinstance(row, Mapping) for row in document):
        return [_row(row, f"--rates {path}: row {number}") for number, row in enumerate(document, start=1)]
    raise UsageError(f"--rates {path}: an object of name: rate, or a list of rows, is expected")


def _csv_rows(text: str, path: str) -> list[tuple[str, Any]]:
    try:
        lines = [[cell.strip() for cell in line] for line in csv.reader(text.splitlines())]
    except csv.Error as error:
        raise UsageError(f"--rates {path}: is no CSV ({error})") from None
    # Spreadsheets write rows of nothing but commas.
    header, *rows = [line for line in lines if any(line)] or [[]]
    columns = [column.lower() for column in header]
    if "rate" not in columns or not set(columns) & set(_NAMES):
        raise UsageError(
            f"--rates {path}: the header must name a column rate and one of {', '.join(_NAMES)}; it is "
            f"{', '.join(columns) or 'empty'}"
        )
    if doubled := [column for column in twice(columns) if column]:
        raise UsageError(f"--rates {path}: the header names the column {doubled[0]} twice")
    found = []
    for number, cells in enumerate(rows, start=1):
        where = f"--rates {path}: row {number}"
        if len(cells) != len(columns):
            hint = "; a number has a point, not a comma" if len(cells) > len(columns) else ""
            raise UsageError(
                f"{where} ({','.join(cells)}): the header has {len(columns)} cells, this row {len(cells)}"
                + hint
            )
        found.append(_row(dict(zip(columns, cells, strict=True)), where))
    return found


def _row(row: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """Name and rate of one row; ``where`` begins the error for a row that has several names."""
    names = {column: str(row[column]).strip() for column in _NAMES if row.get(column)}
    if len(set(names.values())) > 1:
        several = ", ".join(f"{column} {name}" for column, name in names.items())
        raise UsageError(f"{where} ({several}): has several names, one is expected")
    return next(iter(names.values()), ""), row.get("rate")


def _shown(value: Any) -> str:
    return "without a rate" if value is None or value == "" else repr(value)


def _rate(value: Any) -> float | None:
    if isinstance(value, bool):  # float(True) is 1.0
        return None
    try:
        rate = float(value)
    except (TypeError, ValueError):
        return None
    return rate if 0 <= rate < 1 else None


def family_rates(
    graph: ChannelGraph, rates: Mapping[str, float], path: str
) -> tuple[dict[int, float], tuple[str, ...]]:
    """Look up the rate of each family, by its name or by one of its layers.

    Args:
        graph: the coupled channels.
        rates: by name of a family, or of a module or tensor that produces its channels.
        path: of the table, for messages.

    Returns:
        Rates by number of the family, and notes. Families that the table does not name keep their width; if
        layers of one family have different rates, the smallest is used.

    Raises:
        UsageError: the network has no such name.
    """
    known = [names_of(family) for family in graph.families]
    everything = sorted(set().union(*known)) if known else []
    found: dict[int, dict[str, float]] = {}
    for name, rate in rates.items():
        # A family of exactly this name; otherwise every family that one of its layers belongs to.
        exact = [number for number, family in enumerate(graph.families) if family.name == name]
        numbers = exact or [number for number, names in enumerate(known) if name in names]
        if not numbers:
            near = get_close_matches(name, everything, n=3, cutoff=0.4)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise UsageError(f"--rates {path}: {name} is no family or layer whose width can be cut{hint}")
        for number in numbers:
            found.setdefault(number, {})[name] = rate
    notes = []
    for number, given in found.items():
        if len(set(given.values())) > 1:
            several = ", ".join(f"{name} {rate:g}" for name, rate in given.items())
            notes.append(
                f"{graph.families[number].name}: the smallest of its layers' rates counts ({several})"
            )
    silent = [family.name for number, family in enumerate(graph.families) if number not in found]
    if silent:
        notes.append(f"not named in {path}, so they keep their width: {some(silent)}")
    return {number: min(given.values()) for number, given in found.items()}, tuple(notes)
