"""Write the tables of options into the pages: ``python docs/option_tables.py`` after an option was changed.

Between ``<!-- options: VERB | PANEL -->`` and ``<!-- end of options -->`` a page gets the table of one verb's
options under one heading of its help. ``common`` in place of a verb makes the table of what commands share. A
verb's table leaves out rows that another page has word for word: the page of what commands share, and for
``distill`` that of ``train``. The tests compare the pages with what this script makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from cctool.options.common import DataOptions, TaskOptions
from cctool.options.fields import Leaf, leaves
from cctool.options.verbs import VERBS, Frame

FOLDER = Path(__file__).parent
COMMON = "common"
PAGES: Mapping[str, tuple[str, ...]] = {
    **{verb: (f"{verb}.md", "common-options.md") for verb in VERBS},
    "distill": ("distill.md", "train.md", "common-options.md"),
    "transform": (
        "transform.md",
        "transform-basis.md",
        "transform-features.md",
        "transform-reports.md",
        "common-options.md",
    ),
}
"""Where the options of a verb stand."""

MARKED = re.compile(r"(<!-- options: (\w+) \| ([^|]+?) -->\n).*?(<!-- end of options -->)", re.DOTALL)
PLAIN = "Options"


def row(leaf: Leaf, *more: str) -> str:
    """One line of a table.

    Args:
        leaf: the option.
        more: further cells.
    """
    value = "" if leaf.kinds == (bool,) and leaf.spec.parse is None else leaf.spec.metavar or _kind(leaf)
    name = f"`{', '.join(leaf.flags)} {value}".rstrip() + "`"
    cells = (name, leaf.spec.help, leaf.spec.unset or default(leaf), *more)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _kind(leaf: Leaf) -> str:
    if leaf.enum is not None:
        return "|".join(str(item.value) for item in leaf.enum)
    return {int: "N", float: "X", str: "TEXT"}.get(leaf.kinds[0], "VALUE")


def default(leaf: Leaf) -> str:
    """What an option is where it is not given; empty where it then means nothing."""
    value: Any = leaf.spec.shown or leaf.default
    if leaf.required:
        return "required"
    if value is MISSING or value is None or value == ():
        return ""
    if isinstance(value, bool) and leaf.spec.parse is None:
        yes, pair, no = leaf.flags[0].partition("/")
        return (f"`{yes}`" if value else f"`{no}`") if pair else "on" if value else "off"
    if isinstance(value, bool):
        return "" if not value else "on"
    return f"{value:g}" if isinstance(value, float) else str(value)


def offered(verb: str) -> tuple[Leaf, ...]:
    """The options of a verb, or those that commands share."""
    return (
        (*leaves(Frame), *leaves(DataOptions), *leaves(TaskOptions))
        if verb == COMMON
        else VERBS[verb].offered
    )


def told_elsewhere(verb: str) -> set[str]:
    """Rows that a verb's tables leave out, because another page has them."""
    if verb == COMMON:
        return set()
    shared = (*offered(COMMON), *(offered("train") if verb == "distill" else ()))
    return {row(leaf) for leaf in shared}


def table(verb: str, panel: str) -> str:
    """The table of one verb's options under one heading.

    Raises:
        KeyError: if there is no such verb, or nothing to tell under that heading.
    """
    found = [leaf for leaf in offered(verb) if (leaf.spec.panel or PLAIN) == panel]
    left_out = told_elsewhere(verb)
    rows = [
        row(leaf, _commands(leaf)) if verb == COMMON else row(leaf)
        for leaf in found
        if row(leaf) not in left_out
    ]
    if not rows:
        known = sorted({leaf.spec.panel or PLAIN for leaf in offered(verb)})
        raise KeyError(f"{verb} has nothing to tell under {panel!r}; its headings are {', '.join(known)}")
    titles = ("option", "meaning", "default", *(("commands",) if verb == COMMON else ()))
    return f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}\n{''.join(rows)}"


def _commands(leaf: Leaf) -> str:
    """Which commands have an option of this name that takes the same kind of value."""
    having = [
        name
        for name, verb in VERBS.items()
        if any(other.keyword == leaf.keyword and other.kind == leaf.kind for other in verb.offered)
    ]
    lacking = [f"`{name}`" for name in VERBS if name not in having]
    if not lacking:
        return "all"
    if len(lacking) < len(having):
        return f"all but {', '.join(lacking)}"
    return ", ".join(f"`{name}`" for name in having)


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
