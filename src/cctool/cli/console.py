"""The only place that prints.

stdout gets a command's product: paths, a table, or one JSON document. Notes, warnings and progress go to
stderr, progress only if stderr is a terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Turn records, enums, tuples and paths into JSON types; NaN and infinities become None.

    A field whose metadata says ``json=False`` is left out; the items of one that says ``json="inline"`` take
    its place.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for item in dataclasses.fields(value):
            how = item.metadata.get("json", True)
            if how == "inline":
                found |= plain(getattr(value, item.name))
            elif how:
                found[item.name] = plain(getattr(value, item.name))
        return found
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    # x - x is 0 for finite numbers only; JSON has no NaN and no infinity.
    if isinstance(value, float) and value - value != 0:
        return None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value)


_CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "?")


def _harmless(text: str) -> str:
    """Replace control characters, by which a name in an untrusted file could control the terminal."""
    return text.translate(_CONTROL)


class Console:
    """Prints for one command; also the `Reporter` that operations speak to."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, debug: bool = False) -> None:
        self.quiet = quiet
        self.as_json = as_json
        self.debug = debug
        self._products: TextIO = sys.stdout

    # -- stderr ---------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Print a note, unless quiet."""
        if not self.quiet:
            print(_harmless(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning, quiet or not."""
        print(f"warning: {_harmless(text)}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Print in one line why the command failed."""
        print(f"error: {' '.join(_harmless(text).split())}", file=sys.stderr, flush=True)

    def progress(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Pass on ``items``, with a progress bar if stderr is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
            if total is None and isinstance(items, Sized):
                total = len(items)
            yield from bar.track(items, total=total, description=description)

    def talk_table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show a table on stderr, unless quiet."""
        if not self.quiet:
            _draw(title, headers, rows, sys.stderr)

    def tell(self, item: Any) -> None:
        """Print a sentence, or a table of (title, columns, rows), on stderr."""
        self.note(item) if isinstance(item, str) else self.talk_table(*item)

    # -- stdout ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def products_only(self) -> Iterator[None]:
        """Keep everything but products off stdout; libraries print there, some from C++."""
        try:
            descriptor = sys.stdout.fileno()
        except (AttributeError, OSError, io.UnsupportedOperation):
            # The stream of a test or notebook has no descriptor: redirect in Python.
            with contextlib.redirect_stdout(sys.stderr):
                yield
            return
        sys.stdout.flush()
        saved = os.dup(descriptor)
        products = os.fdopen(saved, "w", encoding="utf-8")
        # On descriptors, because C++ code writes to number 1 whatever sys.stdout is.
        os.dup2(sys.stderr.fileno(), descriptor)
        self._products = products
        try:
            yield
        finally:
            sys.stdout.flush()
            products.flush()
            os.dup2(saved, descriptor)
            self._products = sys.stdout
            products.close()

    def path(self, path: object) -> None:
        """Print the path of a product."""
        if not self.as_json:
            print(path, file=self._products, flush=True)

    def table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table that is the command's product."""
        if not self.as_json:
            _draw(title, headers, rows, self._products)

    def text(self, text: str) -> None:
        """Print text that is the command's product."""
        if not self.as_json:
            print(_harmless(text), file=self._products, flush=True)

    def document(self, value: Any, *, always: bool = False) -> None:
        """Print one JSON document with ``--json``, or always."""
        if self.as_json or always:
            print(json.dumps(plain(value), indent=2, allow_nan=False), file=self._products, flush=True)


def _draw(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", header_style="bold")
    for column, header in enumerate(headers):
        numeric = bool(cells) and all(_numeric(row[column]) for row in cells)
        table.add_column(header, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in cells:
        # As Text, because rich would read brackets in a name as markup.
        table.add_row(*(Text(_harmless(cell)) for cell in row))
    if stream.isatty():
        RichConsole(file=stream).print(table)
        return
    # A file or pipe has no width: each row stays on one line.
    unbounded = RichConsole(file=stream, width=100_000)
    RichConsole(file=stream, width=unbounded.measure(table).maximum).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _numeric(cell: str) -> bool:
    stripped = cell.replace(",", "").replace("%", "").replace("x", "").strip()
    if stripped in ("", "-"):
        return True
    try:
        float(stripped)
    except ValueError:
        return False
    return True
