"""A file of coded tensors: a header, a chunk for each tensor and an end, see docs/bitstream-format.md.

Every length follows from fields before it and is checked before that many bytes are read; every byte is
covered by a CRC-32. A chunk's size follows from its shape and number of bits, so reports can state it without
writing.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import BitstreamError, TransformError
from cctool.coding.exp_golomb import MAX_BLOCK, CodedIntegers, block_counts, block_size, decode, encode
from cctool.coding.symbols import MAX_K, check_k, code_length, symbol_limit

VERSION = 1
MAX_HEADER = 1 << 20
"""Bytes of the JSON text in a header, at most."""

_MAGIC = b"\x93CCTSEG\n"
_CHUNK, _END = b"CHNK", b"DONE"
# Magic, version, 0, bytes of JSON; mark, k, signed, type, dimensions, values per block, side bytes, bits;
# mark, number of chunks.
_FRONT = struct.Struct("<8sHHI")
_HEAD = struct.Struct("<4sBBBBIIQ")
_TAIL = struct.Struct("<4sI")
_CRC = struct.Struct("<I")
END_BYTES = _TAIL.size + _CRC.size
"""Bytes of a stream's end."""

# The file stores the index, so the order must not change.
_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)
_MAX_DIMS = 8
# The limit of docs/bitstream-format.md; see `_extent`.
_MAX_COUNT = (1 << 32) - 1
_PIECE = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """One tensor of a stream.

    Attributes:
        values: on the CPU, with the shape and type that were written.
        k: order of the code.
        signed: whether the signed code was used.
        side: the bytes that were written with it.
    """

    values: Tensor
    k: int
    signed: bool
    side: bytes


@dataclass(frozen=True)
class _Head:
    shape: tuple[int, ...]
    dtype: torch.dtype
    k: int
    signed: bool
    block: int
    side: int
    bits: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block)

    @property
    def width(self) -> int:
        """Bytes per entry of the block table: enough for the longest codewords, less the one bit each."""
        longest = code_length(symbol_limit(self.dtype, signed=self.signed), self.k)
        return -(-((longest - 1) * self.block).bit_length() // 8)

    @property
    def body(self) -> int:
        return self.blocks * self.width + self.side + -(-self.bits // 8)

    def pack(self) -> bytes:
        dims = len(self.shape)
        code = _DTYPES.index(self.dtype)
        head = _HEAD.pack(_CHUNK, self.k, self.signed, code, dims, self.block, self.side, self.bits)
        return _summed(head + struct.pack(f"<{dims}I", *self.shape))


def header_bytes(metadata: Mapping[str, JsonValue]) -> int:
    """Bytes of a stream's header with this metadata."""
    return len(_header(metadata))


def chunk_bytes(
    shape: Sequence[int], dtype: torch.dtype, bits: int, k: int, *, signed: bool, side: int = 0
) -> int:
    """Bytes of a chunk, without writing it.

    Shape and type (int8, uint8, int16 or int32) are those of the tensor, ``bits`` those of all codewords, as
    `code_bits` counts them, at order ``k``, 0 to 5; ``side`` is the number of side bytes.

    >>> chunk_bytes((2, 3), torch.int8, 6, 1, signed=True)
    43
    """
    head = _head(shape, dtype, k, signed, side, bits)
    return len(head.pack()) + head.body + _CRC.size


class Writer:
    """Writes a stream: the header immediately, a chunk for each tensor, and the end at `finish`.

    Args:
        file: open for writing bytes; it is not closed.
        metadata: any JSON with finite numbers.

    Attributes:
        written: bytes so far.

    Raises:
        TransformError: if the metadata are not JSON or too long.
    """

    def __init__(self, file: BinaryIO, metadata: Mapping[str, JsonValue]) -> None:
        self._file = file
        self._chunks = 0
        self.written = 0
        self._put(_header(metadata))

    def append(self, values: Tensor, k: int, *, signed: bool, side: bytes = b"") -> int:
        """Write a tensor with its side bytes; return the number of bytes written.

        Raises:
            TransformError: if the tensor cannot be coded (`encode`), or has more than 8 dimensions.
            UsageError: if ``k`` is out of range.
        """
        coded = encode(values, k, signed=signed)
        head = _head(values.shape, values.dtype, k, signed, len(side), coded.bits)
        # Sizes are stored less one bit per value, which every codeword has: the entries are smaller.
        surplus = coded.block_bits - _counts(head)
        table = surplus.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : head.width].tobytes()
        before = self.written
        self._put(head.pack())
        self._put(_summed(table + side + coded.payload))
        self._chunks += 1
        return self.written - before

    def finish(self) -> None:
        """Write the end; without it a reader reports the stream as truncated."""
        self._put(_summed(_TAIL.pack(_END, self._chunks)))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.written += len(data)


class StreamReader:
    """Reads a stream chunk by chunk; at most one chunk is in memory.

    Args:
        file: open for reading bytes, at the beginning of a stream.

    Attributes:
        metadata: of the header.

    Raises:
        BitstreamError: here or while iterating, if the stream is truncated, altered, of another version or
            followed by other bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        front = self._take(_FRONT.size)
        magic, version, reserved, size = _FRONT.unpack(front)
        if magic != _MAGIC:
            raise BitstreamError("this is no stream of cctool: it does not begin as one")
        if version != VERSION or reserved:
            raise BitstreamError(f"stream of version {version}: this cctool reads version {VERSION}")
        if size > MAX_HEADER:
            raise BitstreamError(f"the stream's header claims {size} bytes, {MAX_HEADER} are allowed")
        text = self._take(size)
        self._check(front + text, "header")
        self.metadata = _parsed(text)

    def __iter__(self) -> Iterator[Chunk]:
        chunks = 0
        while (mark := self._take(4)) == _CHUNK:
            yield self._chunk(mark)
            chunks += 1
        if mark != _END:
            raise BitstreamError(f"the stream has neither a chunk nor its end after {chunks} chunks")
        tail = mark + self._take(_TAIL.size - 4)
        self._check(tail, "end")
        if _TAIL.unpack(tail)[1] != chunks:
            raise BitstreamError(f"the stream ends after {chunks} chunks, and says {_TAIL.unpack(tail)[1]}")
        if self._file.read(1):
            raise BitstreamError("something follows the end of the stream")

    def _chunk(self, mark: bytes) -> Chunk:
        fixed = mark + self._take(_HEAD.size - 4)
        dims = fixed[7]
        if dims > _MAX_DIMS:
            raise BitstreamError(f"a chunk of the stream has {dims} dimensions, {_MAX_DIMS} are allowed")
        shape = self._take(4 * dims)
        self._check(fixed + shape, "chunk's head")
        head = _unpacked(fixed, struct.unpack(f"<{dims}I", shape))
        body = self._take(head.body)
        self._check(body, "chunk")
        table, side = head.blocks * head.width, head.side
        surplus = np.zeros((head.blocks, 4), dtype=np.uint8)
        surplus[:, : head.width] = np.frombuffer(body, np.uint8, table).reshape(-1, head.width)
        sizes = surplus.reshape(-1).view("<u4").astype(np.uint32) + _counts(head)
        coded = CodedIntegers(body[table + side :], head.bits, sizes, head.count, head.block)
        values = decode(coded, head.k, signed=head.signed, dtype=head.dtype).reshape(head.shape)
        return Chunk(values, head.k, head.signed, body[table : table + side])

    def _check(self, data: bytes, part: str) -> None:
        (expected,) = _CRC.unpack(self._take(_CRC.size))
        if zlib.crc32(data) != expected:
            raise BitstreamError(f"the stream's {part} was altered: its checksum differs")

    def _take(self, size: int) -> bytes:
        """Read exactly ``size`` bytes, in pieces, so that a false length allocates no more than there is."""
        parts = []
        while size:
            part = self._file.read(min(size, _PIECE))
            if not part:
                raise BitstreamError(f"the stream is cut off: {size} bytes are missing, or more")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _summed(data: bytes) -> bytes:
    return data + _CRC.pack(zlib.crc32(data))


def _header(metadata: Mapping[str, JsonValue]) -> bytes:
    try:
        # Sorted, so that equal metadata give equal bytes.
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise TransformError(f"metadata of a stream: {error}") from None
    if len(text) > MAX_HEADER:
        raise TransformError(f"metadata of a stream: {len(text)} bytes, {MAX_HEADER} are allowed")
    return _summed(_FRONT.pack(_MAGIC, VERSION, 0, len(text)) + text)


def _parsed(text: bytes) -> dict[str, JsonValue]:
    try:
        found = json.loads(text.decode("ascii"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BitstreamError(f"the stream's header is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BitstreamError("the stream's header is no JSON object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _head(shape: Sequence[int], dtype: torch.dtype, k: int, signed: bool, side: int, bits: int) -> _Head:
    check_k(k)
    symbol_limit(dtype, signed=signed)
    if len(shape) > _MAX_DIMS:
        raise TransformError(f"{len(shape)} dimensions: a stream's tensors have at most {_MAX_DIMS}")
    if side >= 1 << 32 or _extent(shape) > _MAX_COUNT:
        raise TransformError(f"a tensor of shape {tuple(shape)} with {side} bytes beside it is too large")
    return _Head(tuple(shape), dtype, k, signed, block_size(math.prod(shape)), side, bits)


def _extent(shape: Sequence[int]) -> int:
    # A 0 would hide other sizes whose product overflows in torch's own arithmetic, so it counts as 1.
    return math.prod(max(size, 1) for size in shape)


def _unpacked(fixed: bytes, shape: tuple[int, ...]) -> _Head:
    """Parse a chunk's head; raise BitstreamError if its fields are out of range."""
    _, k, signed, dtype, _, block, side, bits = _HEAD.unpack(fixed)
    if k > MAX_K or signed > 1 or dtype >= len(_DTYPES) or (signed and _DTYPES[dtype] == torch.uint8):
        raise BitstreamError(f"a chunk of the stream has order {k}, sign {signed} and type {dtype}")
    if not 1 <= block <= MAX_BLOCK or _extent(shape) > _MAX_COUNT or math.prod(shape) > bits:
        raise BitstreamError(f"a chunk of shape {shape} in blocks of {block} has {bits} bits")
    return _Head(shape, _DTYPES[dtype], k, bool(signed), block, side, bits)


def _counts(head: _Head) -> NDArray[np.uint32]:
    """Values in each block: one bit each, which the block table leaves out."""
    return block_counts(head.count, head.block).astype(np.uint32)
