"""Glob patterns that name modules, parameters or families on the command line."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from cctool.base.errors import UsageError


def refuse_shadowed(patterns: Sequence[str], known: Collection[str], who: str) -> None:
    """Refuse a pattern that never counts where the first that matches does: others before it take all names.

    ``*`` at the end is a default, and may be left without names.

    Raises:
        UsageError: naming ``who`` has the patterns, and the pattern.
    """
    taken: set[str] = set()
    for number, pattern in enumerate(patterns):
        found = {name for name in known if fnmatchcase(name, pattern)}
        default = pattern == "*" and number == len(patterns) - 1
        if found and found <= taken and not default:
            raise UsageError(
                f"{who}: {pattern} never counts, because a pattern before it matches the same names; "
                "put it first, or leave it out"
            )
        taken |= found


def refuse_unmatched(patterns: Sequence[str], known: Collection[str], kinds: str) -> None:
    """Refuse a glob pattern that matches none of the ``known`` names of ``kinds``, and suggest similar ones.

    Raises:
        UsageError: if a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = get_close_matches(pattern, sorted(known), n=3, cutoff=0.4)
            hint = f"; near: {', '.join(near)}" if near else "; `cctool analyze` lists the names"
            raise UsageError(f"pattern {pattern!r} matches no {kinds}{hint}")
