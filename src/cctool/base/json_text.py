"""JSON that people write: a key that is there twice is an error, not the last one's value."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def read_json(text: str | bytes) -> Any:
    """What JSON text means.

    Raises:
        ValueError: if it is no JSON, or an object has a key twice.

    >>> read_json('{"a": 1, "b": {"a": 2}}')
    {'a': 1, 'b': {'a': 2}}
    >>> read_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    cctool.base.json_text.DoubledKeyError: the key 'a' is there twice
    """
    return json.loads(text, object_pairs_hook=_without_doubles)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if doubled := twice(key for key, _ in pairs):
        raise DoubledKeyError(f"the key {doubled[0]!r} is there twice")
    return dict(pairs)


class DoubledKeyError(ValueError):
    """An object of otherwise good JSON has a key twice."""


def twice(names: Iterable[str]) -> list[str]:
    """The names that occur more than once.

    >>> twice(["a", "b", "a"])
    ['a']
    """
    names = list(names)
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]
