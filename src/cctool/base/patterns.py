"""Glob patterns that name modules, parameters or families on the command line."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from cctool.base.errors import UsageError


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
