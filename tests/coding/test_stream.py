"""The stream: what comes back, how long it is, and that no altered byte is believed."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cctool.base.errors import BitstreamError, TransformError
from cctool.coding.stream import END_BYTES, MAX_HEADER, Chunk, StreamReader, Writer, chunk_bytes, header_bytes
from cctool.coding.symbols import to_unsigned
from seg_reference import bit_string, bits_of, encoded

METADATA = {"tap": "layer1.0", "steps": [0.5, 2.0]}


def written(*tensors: Tensor, k: int = 1, side: bytes = b"") -> bytes:
    file = io.BytesIO()
    writer = Writer(file, METADATA)
    for tensor in tensors:
        writer.append(tensor, k, signed=tensor.dtype != torch.uint8, side=side)
    writer.finish()
    assert writer.written == len(file.getvalue())
    return file.getvalue()


def chunks(data: bytes) -> list[Chunk]:
    return list(StreamReader(io.BytesIO(data)))


def small() -> Tensor:
    return torch.tensor([[0, -1, 3, 0, 0], [7, 0, -128, 127, 0]], dtype=torch.int8)


def maps(dtype: torch.dtype, *shape: int) -> Tensor:
    drawn = np.random.default_rng(0).laplace(0, 1, shape).round()
    return torch.from_numpy(abs(drawn) if dtype == torch.uint8 else drawn).to(dtype)


TENSORS = [
    maps(torch.int8, 4, 3, 14, 14),
    maps(torch.uint8, 5000),
    maps(torch.int16, 2, 70, 70),
    maps(torch.int32, 3, 1, 2, 1, 2, 1, 2, 1),
    torch.zeros(2, 0, 3, dtype=torch.int8),
    torch.tensor(-7, dtype=torch.int32),
]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_tensors_come_back(k: int) -> None:
    file = io.BytesIO()
    writer = Writer(file, METADATA)
    for number, tensor in enumerate(TENSORS):
        writer.append(tensor, k, signed=tensor.dtype != torch.uint8, side=bytes([number]) * number)
    writer.finish()
    file.seek(0)
    reader = StreamReader(file)
    assert reader.metadata == METADATA
    found = list(reader)
    assert len(found) == len(TENSORS)
    for number, (chunk, tensor) in enumerate(zip(found, TENSORS, strict=True)):
        assert chunk.values.dtype == tensor.dtype
        assert chunk.values.shape == tensor.shape
        assert torch.equal(chunk.values, tensor)
        assert (chunk.k, chunk.signed) == (k, tensor.dtype != torch.uint8)
        assert chunk.side == bytes([number]) * number


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: str(list(tensor.shape)))
def test_stated_size_is_the_size(tensor: Tensor, k: int) -> None:
    signed = tensor.dtype != torch.uint8
    bits = bits_of(to_unsigned(tensor) if signed else tensor, k)
    file = io.BytesIO()
    writer = Writer(file, METADATA)
    assert writer.written == header_bytes(METADATA) == len(file.getvalue())
    stated = chunk_bytes(tensor.shape, tensor.dtype, bits, k, signed=signed, side=12)
    assert writer.append(tensor, k, signed=signed, side=b"x" * 12) == stated
    writer.finish()
    assert len(file.getvalue()) == header_bytes(METADATA) + stated + END_BYTES


def test_the_bytes_are_those_of_the_document() -> None:
    """docs/bitstream-format.md, followed by hand."""
    data = written(small(), k=2, side=b"mean")
    text = json.dumps(METADATA, sort_keys=True, separators=(",", ":")).encode()
    front = b"\x93CCTSEG\n" + struct.pack("<HHI", 1, 0, len(text)) + text
    head = b"CHNK" + struct.pack("<BBBBIIQ", 2, 1, 0, 2, 1024, 4, 55) + struct.pack("<2I", 2, 5)
    bits = encoded(small().flatten().tolist(), 2, True)
    assert len(bits) == 55
    payload = int(bits + "0", 2).to_bytes(7, "big")
    body = struct.pack("<H", 55 - 10) + b"mean" + payload
    end = b"DONE" + struct.pack("<I", 1)
    parts = [part + struct.pack("<I", zlib.crc32(part)) for part in (front, head, body, end)]
    assert data == b"".join(parts)
    assert bit_string(payload, 55) == bits


def test_truncation_anywhere_is_seen() -> None:
    data = written(small(), small()[:1], side=b"ab")
    assert len(chunks(data)) == 2
    for size in range(len(data)):
        with pytest.raises(BitstreamError):
            chunks(data[:size])


def test_every_flipped_bit_is_seen() -> None:
    data = written(small(), side=b"ab")
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            chunks(bytes(flipped))


def test_something_behind_the_end_is_seen() -> None:
    data = written(small())
    with pytest.raises(BitstreamError, match="follows the end"):
        chunks(data + b"\0")
    with pytest.raises(BitstreamError, match="cut off"):
        chunks(data[:-END_BYTES])


def forged(**changes: int) -> bytes:
    """A stream of one chunk whose head says something else, with a checksum that fits."""
    data = written(small(), k=2)
    at = header_bytes(METADATA)
    names = ("k", "signed", "dtype", "dims", "block", "side", "bits", "rows", "columns")
    layout = struct.Struct("<BBBBIIQII")
    fields = dict(zip(names, layout.unpack_from(data, at + 4), strict=True)) | changes
    head = b"CHNK" + layout.pack(*fields.values())
    body = data[at + 4 + layout.size + 4 :]
    return data[:at] + head + struct.pack("<I", zlib.crc32(head)) + body


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 6},
        {"k": 255},
        {"signed": 2},
        {"dtype": 4},
        {"dtype": 1},
        {"dims": 200},
        {"block": 0},
        {"block": 1 << 31},
        {"block": 1},
        {"side": 2**32 - 1},
        {"bits": 9},
        {"bits": 0},
        {"bits": 2**64 - 1},
        {"bits": 2**63, "rows": 2**32 - 1, "columns": 1},
        {"rows": 2**32 - 1, "columns": 2**32 - 1, "bits": 2**64 - 1},
        {"rows": 0, "columns": 2**32 - 1},
        {"rows": 1},
        {"columns": 6},
    ],
    ids=str,
)
def test_heads_that_lie_allocate_nothing(changes: dict[str, int]) -> None:
    data = forged(**changes)
    assert len(chunks(forged())) == 1
    tracemalloc.start()
    try:
        with pytest.raises(BitstreamError):
            chunks(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def header(text: bytes, *, version: int = 1, reserved: int = 0, size: int | None = None) -> bytes:
    size = len(text) if size is None else size
    front = b"\x93CCTSEG\n" + struct.pack("<HHI", version, reserved, size) + text
    return front + struct.pack("<I", zlib.crc32(front))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"PK\3\4" + bytes(30), "no stream of cctool"),
        (header(b"{}", version=2), "version 2"),
        (header(b"{}", reserved=1), "version 1"),
        (header(b"", size=2**32 - 1), "claims 4294967295 bytes"),
        (header(b"", size=MAX_HEADER), "cut off"),
        (header(b"[]"), "no JSON object"),
        (header(b"{"), "no JSON"),
        (header(b'{"a":NaN}'), "NaN"),
        (header("{}é".encode()), "no JSON"),
        (header(b'{"a":' + b"[" * 100_000), "no JSON"),
        (header(b'{"a":' + b"1" * 10_000 + b"}"), "no JSON"),
        (header(b"{}") + b"WHAT", "neither a chunk nor its end after 0 chunks"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_headers_that_lie(data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        chunks(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_refused(data: st.DataObject) -> None:
    whole = bytearray(written(small(), maps(torch.int8, 40), side=b"abc"))
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start, min(start + 20, len(whole))))
    patch = data.draw(st.binary(max_size=20))
    damaged = bytes(whole[:start]) + patch + bytes(whole[end:])
    if damaged == whole:
        return
    with pytest.raises(BitstreamError):
        chunks(damaged)


def test_chunks_are_read_one_by_one() -> None:
    first = next(iter(StreamReader(io.BytesIO(written(small(), small())[:-30]))))
    assert torch.equal(first.values, small())


def test_what_cannot_be_written() -> None:
    file = io.BytesIO()
    for metadata in ({"a": float("nan")}, {"a": object()}, {"a": "x" * MAX_HEADER}):
        with pytest.raises(TransformError, match="metadata of a stream"):
            Writer(file, metadata)  # type: ignore[arg-type]
    assert not file.getvalue()
    writer = Writer(file, {})
    with pytest.raises(TransformError, match="9 dimensions"):
        writer.append(torch.zeros([1] * 9, dtype=torch.int8), 1, signed=True)
    with pytest.raises(TransformError, match="too large"):
        chunk_bytes((1 << 20, 1 << 20), torch.int8, 1 << 41, 1, signed=True)


def test_decoding_allocates_what_the_stream_backs() -> None:
    """Zeros take a bit each: the most values that a payload of its length can hold."""
    values = torch.zeros(1 << 20, dtype=torch.int8)
    data = written(values)
    tracemalloc.start()
    try:
        assert torch.equal(chunks(data)[0].values, values)
        assert tracemalloc.get_traced_memory()[1] < 16 * values.numel()
    finally:
        tracemalloc.stop()
