"""The checksum inside a file of ours, which reveals any flipped bit, even in headers and padding.

It follows `MARK`, at the end of a ``.pt`` (the zip's comment) or in the metadata of a ``.safetensors``, and
is the SHA-256 of the whole file with the checksum's own 64 digits replaced by zeros.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import IO

from cctool.base.errors import CorruptCheckpointError

MARK = b"cctool-sha256:"
DIGITS = 64
ZEROS = b"0" * DIGITS
_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000


def verify_checksum(path: Path) -> tuple[str, bool]:
    """Hash a file in one pass.

    Returns:
        SHA-256 of the whole file, and whether it holds a checksum of ours, which then is right.

    Raises:
        CorruptCheckpointError: if the checksum does not match the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        position = _position(stream, size)
        stream.seek(0)
        whole = hashlib.sha256()
        _update(stream, size if position is None else position, whole)
        if position is None:
            return whole.hexdigest(), False
        masked, digits = whole.copy(), stream.read(DIGITS)
        whole.update(digits)
        masked.update(ZEROS)
        _update(stream, size - position - DIGITS, whole, masked)
    if digits != masked.hexdigest().encode():
        raise CorruptCheckpointError(f"{path} is damaged: its checksum does not match its bytes")
    return whole.hexdigest(), True


def _position(stream: IO[bytes], size: int) -> int | None:
    """Offset of the checksum's digits; None if there is no checksum."""
    if size >= len(MARK) + DIGITS:
        stream.seek(size - len(MARK) - DIGITS)
        if stream.read(len(MARK)) == MARK:
            return size - DIGITS
    # Otherwise as .safetensors: the length of a JSON header as 8 bytes, then the header.
    stream.seek(0)
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(_MAX_HEADER, size - 8):
        return None
    found = stream.read(length).find(MARK)
    position = 8 + found + len(MARK)
    return None if found < 0 or position + DIGITS > 8 + length else position


def _update(stream: IO[bytes], count: int, *digests: hashlib._Hash) -> None:
    while count and (chunk := stream.read(min(_CHUNK, count))):
        count -= len(chunk)
        for digest in digests:
            digest.update(chunk)
