"""Texts as zlib streams whose length is declared: nothing is inflated that a small file blew up."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import torch
from torch import Tensor

from cctool.base.errors import CheckpointError, CorruptCheckpointError

__all__ = ["compressed", "inflated"]

_HEAD = struct.Struct("<I")
_MAX_TEXT = 16 * 2**20
_MAX_RATIO = 64
_FREE = 2**20
"""Bytes of text that a stream of any length may hold."""


def compressed(text: str) -> Tensor:
    """A text as uint8 (bytes,): its length in UTF-8 as 4 bytes, little endian, and a zlib stream (RFC 1950).

    Raises:
        CheckpointError: if it is longer than 16 MiB.
    """
    data = text.encode()
    if len(data) > _MAX_TEXT:
        raise CheckpointError(f"spec, history and index are {len(data):,} bytes; {_MAX_TEXT:,} are allowed")
    stream = zlib.compress(data, 9)
    if len(data) > _allowed(len(stream)):
        stream = zlib.compress(data, 0)
    return torch.frombuffer(bytearray(_HEAD.pack(len(data)) + stream), dtype=torch.uint8)


def inflated(stored: Any) -> str:
    """Read what `compressed` wrote.

    Args:
        stored: uint8 (bytes,).

    Raises:
        CorruptCheckpointError: if it is malformed, or claims a length above 16 MiB, or above 1 MiB and 64
            times its own; that is seen before anything is inflated.
    """
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.dim() != 1:
        raise CorruptCheckpointError("the compressed text is not a row of bytes")
    data = stored.contiguous().numpy().tobytes()
    if len(data) < _HEAD.size:
        raise CorruptCheckpointError("the compressed text is cut off")
    (length,) = _HEAD.unpack_from(data)
    if length > _allowed(len(data) - _HEAD.size):
        raise CorruptCheckpointError(f"the compressed text claims {length:,} bytes, more than is allowed")
    inflater = zlib.decompressobj()
    try:
        # One byte more than declared is asked for: 0 would mean no limit, and a longer text is seen.
        found = inflater.decompress(data[_HEAD.size :], length + 1)
        if len(found) != length or not inflater.eof or inflater.unused_data:
            raise CorruptCheckpointError("the compressed text has another length than it declares")
        return found.decode()
    except (zlib.error, UnicodeDecodeError):
        raise CorruptCheckpointError("the compressed text is damaged") from None


def _allowed(stream: int) -> int:
    return min(_MAX_TEXT, max(_FREE, _MAX_RATIO * stream))
