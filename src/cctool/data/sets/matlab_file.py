"""MATLAB files of version 5 with bounded memory; scipy reads them, and never unpickles anything."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cctool.base.errors import DataError

_HEADER = 128
_COMPRESSED = 15
_PIECE = 2**20


def read_variables(path: Path, names: tuple[str, ...], limit: int) -> Mapping[str, Any]:
    """The named variables, as `scipy.io.loadmat` gives them.

    Args:
        path: the file.
        names: of the variables.
        limit: bytes that its content may have, unpacked.

    Raises:
        DataError: it is missing, damaged, too large or of another format, or lacks a variable.
    """
    from scipy.io import loadmat

    _refuse_large(path, limit)
    try:
        found: Mapping[str, Any] = loadmat(str(path), variable_names=list(names))
    # scipy's reader may raise any exception on damaged files; sizes that lie may ask for any memory.
    except (Exception, MemoryError) as error:
        raise _damaged(path, error) from error
    _refuse_missing(path, names, found)
    return found


def shapes_of(path: Path, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the named variables, from their headers.

    Raises:
        DataError: as `read_variables`.
    """
    from scipy.io import whosmat

    try:
        found = {name: tuple(map(int, shape)) for name, shape, _ in whosmat(str(path))}
    except (Exception, MemoryError) as error:
        raise _damaged(path, error) from error
    _refuse_missing(path, names, found)
    return {name: found[name] for name in names}


def _refuse_missing(path: Path, names: tuple[str, ...], found: Mapping[str, Any]) -> None:
    lacking = [name for name in names if name not in found]
    if lacking:
        raise DataError(f"{path} has no variable {lacking[0]}; fetch it again")


def _damaged(path: Path, error: BaseException) -> DataError:
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path} cannot be read: {error.strerror}")
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{path} is damaged, or no MATLAB file of version 5 ({text}); fetch it again")


def _refuse_large(path: Path, limit: int) -> None:
    """Count the bytes that a file unpacks to, before anything of that size is allocated."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(_HEADER)
            total = 0
            while total <= limit and file.tell() < size:
                total += _element(file, limit - total)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, zlib.error) as error:
        raise DataError(
            f"{path} is damaged: its compressed parts cannot be unpacked; fetch it again"
        ) from error
    if total > limit:
        raise DataError(f"{path} is damaged: it unpacks to more than {limit:,} bytes; fetch it again")


def _element(file: BinaryIO, limit: int) -> int:
    """The unpacked size of the next element, or a number above ``limit``; the file stands behind it."""
    kind, length = struct.unpack("<II", file.read(8))
    if kind != _COMPRESSED:
        file.seek(length, 1)
        return int(length)
    unpacker, total = zlib.decompressobj(), 0
    while length > 0 and total <= limit:
        packed = file.read(min(length, _PIECE))
        if not packed:
            raise struct.error("the element ends before its length")
        length -= len(packed)
        while packed and total <= limit:
            total += len(unpacker.decompress(packed, _PIECE))
            packed = unpacker.unconsumed_tail
    return total
