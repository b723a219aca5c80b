"""Write the tables of options into the pages: ``python docs/option_tables.py`` after an option was changed.

A page says where: between ``<!-- options: VERB | PANEL -->`` and ``<!-- end of options -->`` stands the table
of one verb's options under one heading of its help. The tests compare the pages with what this script makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from cctool.options.fields import Leaf
from cctool.options.verbs import VERBS

FOLDER = Path(__file__).parent
MARKED = re.compile(r"(<!-- options: (\w+) \| ([^>]+?) -->\n).*?(<!-- end of options -->)", re.DOTALL)
PLAIN = "Options"
HEAD = "| option | meaning | default |\n| --- | --- | --- |\n"


def row(leaf: Leaf) -> str:
    """One line of a table."""
    value = "" if leaf.kinds == (bool,) and leaf.spec.parse is None else leaf.spec.metavar or _kind(leaf)
    name = f"`{', '.join(leaf.flags)} {value}".rstrip() + "`"
    cells = (name, leaf.spec.help, leaf.spec.unset or _default(leaf))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _kind(leaf: Leaf) -> str:
    if leaf.enum is not None:
        return "|".join(str(item.value) for item in leaf.enum)
    return {int: "N", float: "X", str: "TEXT"}.get(leaf.kinds[0], "VALUE")


def _default(leaf: Leaf) -> str:
    value: Any = leaf.spec.shown or leaf.default
    if leaf.required:
        return "required"
    if value is MISSING or value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(verb: str, panel: str) -> str:
    """The table of one verb's options under one heading.

    Raises:
        KeyError: if there is no such verb, or no option under that heading.
    """
    rows = [row(leaf) for leaf in VERBS[verb].offered if (leaf.spec.panel or PLAIN) == panel]
    if not rows:
        raise KeyError(f"{verb} has no options under {panel!r}: {', '.join(sorted(panels(verb)))}")
    return HEAD + "".join(rows)


def panels(verb: str) -> set[str]:
    """The headings of one verb's options."""
    return {leaf.spec.panel or PLAIN for leaf in VERBS[verb].offered}


def filled(page: str) -> str:
    """A page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2], found[3])}{found[4]}", page)


def marked(page: str) -> Iterator[tuple[str, str]]:
    """The verb and heading of each table that a page has."""
    for found in MARKED.finditer(page):
        yield found[2], found[3]


def main() -> None:
    """Make the tables of all pages anew."""
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            path.write_text(filled(text), encoding="utf-8")
            sys.stdout.write(f"{path.name}\n")


if __name__ == "__main__":
    main()
