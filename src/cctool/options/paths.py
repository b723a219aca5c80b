"""Which files a command's options read and write; none may be written that is read, or written twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cctool.base.errors import CheckpointError, UsageError
from cctool.options.common import DataOptions
from cctool.options.fields import leaves

INPUT = "the input"
"""What messages call the file that a command reads first."""

PRODUCT = "-o"
"""What messages call the checkpoint that a command writes."""


@dataclass(frozen=True)
class NamedFile:
    """A file, and what names it: a flag, `INPUT`, or ``the product``."""

    by: str
    path: Path


def files_read(options: Any) -> Iterator[NamedFile]:
    """The files and folders that a verb's options name for reading, data sets included."""
    for flag, value in _values(options, "reads"):
        yield NamedFile(flag, Path(value))
    data = getattr(options, "data", None)
    if isinstance(data, DataOptions):
        for flag, reference in (
            ("--data", data.data),
            ("--val-data", data.val_data),
            ("--test-data", data.test_data),
        ):
            place = (reference or "").partition(":")[2]
            if place:
                yield NamedFile(flag, Path(place))


def files_written(options: Any) -> Iterator[NamedFile]:
    """The files and folders that a verb's options name for writing."""
    for flag, value in _values(options, "writes"):
        yield NamedFile(flag, Path(value))


def _values(options: Any, use: str) -> Iterator[tuple[str, str]]:
    for leaf in leaves(type(options)):
        value = leaf.value_in(options)
        if value is not None and getattr(leaf.spec, use):
            yield leaf.flag, str(value)


def refuse_same_files(read: Iterable[NamedFile], written: Iterable[NamedFile]) -> None:
    """Refuse to write a file that the command reads, or to write two files of one name.

    Links, relative paths and, where the file system takes them for one, upper and lower case are looked
    through.

    Raises:
        CheckpointError: for a file that is read.
        UsageError: for two that are written.
    """
    read, seen = tuple(read), list[NamedFile]()
    for file in written:
        for other in read:
            if is_same_file(file.path, other.path):
                whose = f"{INPUT} itself" if other.by == INPUT else f"the file of {other.by}"
                raise CheckpointError(f"{file.path} is {whose}; name another file")
        for other in seen:
            if is_same_file(file.path, other.path):
                raise UsageError(
                    f"two files would have one name: {other.path} of {other.by}, {file.path} of {file.by}"
                )
        seen.append(file)


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, whatever their spelling and whether it exists."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other))
