"""What stands in a tap's stream: sizes known without writing, and claims that are refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from cctool.base.errors import BitstreamError
from cctool.coding.stream import END_BYTES, StreamReader, Writer
from cctool.coding.symbols import to_unsigned
from cctool.transforms.codec.codec import CodecConfig, CodecState, encode, reconstruct
from cctool.transforms.codec.stream import (
    StreamHeader,
    decoded_maps,
    flat_symbols,
    header_of,
    overhead_bytes,
    pass_bytes,
    pass_of,
    side_bytes,
    state_bytes,
    state_of_stream,
    state_size,
    symbol_type,
)
from seg_reference import bits_of

CONFIGS: dict[str, dict[str, Any]] = {
    "dct": {"kernel": "dct", "table": (3.0,)},
    "fine": {"kernel": "dct", "table": (0.01,), "k": 5},
    "dwt": {"kernel": "db2", "table": (3.0,), "levels": 2, "mean_shift": True},
    "identity": {"kernel": "identity"},
    "wide": {"kernel": "identity", "bits": 12},
    "channels": {"kernel": "dct", "table": (3.0,), "channel_klt": True},
}


def maps(n: int = 2, c: int = 3, h: int = 9, w: int = 14) -> torch.Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(0)) * 5


def made(name: str) -> tuple[StreamHeader, CodecState]:
    config = CodecConfig(**CONFIGS[name])
    bases = {"channels": torch.linalg.qr(torch.arange(9.0).view(3, 3).cos()).Q} if config.channel_klt else {}
    header = StreamHeader(tap="a", codec=config, shape=(3, 9, 14))
    return header, CodecState(config, torch.tensor([0.0, 5.0]), bases)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stream_is_as_long_as_stated_and_decodes_to_the_reconstruction(name: str) -> None:
    header, state = made(name)
    codec = header.codec
    symbols = encode(maps(), state)
    file = io.BytesIO()
    writer = Writer(file, header.model_dump(mode="json"))
    side = state_bytes(state, header.shape)
    assert len(side) == state_size(codec, header.shape)
    writer.append(torch.zeros(0, dtype=torch.int8), 0, signed=True, side=side)
    flat = flat_symbols(symbols, signed=codec.signed)
    written = writer.append(flat, codec.k, signed=codec.signed, side=side_bytes(7, symbols))
    writer.finish()
    numbered = to_unsigned(flat) if codec.signed else flat
    bits, largest = bits_of(numbered, codec.k), int(numbered.max())
    assert written == pass_bytes(header, flat.numel(), largest, bits, 2)
    assert overhead_bytes(header, len(side)) == len(file.getvalue()) - written

    file.seek(0)
    reader = StreamReader(file)
    again = header_of(reader.metadata)
    first, second = reader
    found = pass_of(second.values, second.side, again)
    assert found.number == 7
    assert all(torch.equal(a, b) for a, b in zip(found.symbols.bands, symbols.bands, strict=True))
    decoded = decoded_maps(found.symbols, state_of_stream(again, first.side), again.dtype)
    assert torch.equal(decoded, reconstruct(symbols, state))


@pytest.mark.parametrize("signed", [True, False])
def test_the_type_holds_all_symbols_and_none_narrower_does(signed: bool) -> None:
    for value in (0, 1, 127, 128, 255, 256, 32767, 32768, 70000):
        for v in (value, -value) if signed else (value,):
            dtype = (
                symbol_type(2 * v if v >= 0 else -2 * v - 1, signed=signed)
                if signed
                else symbol_type(v, signed=False)
            )
            limits = torch.iinfo(dtype)
            assert limits.min <= v <= limits.max
            smaller = {torch.int16: (128, 127) if signed else (0, 255), torch.int32: (32768, 32767)}.get(
                dtype
            )
            assert smaller is None or v < -smaller[0] or v > smaller[1]


def test_maps_are_rounded_to_what_the_network_computes_in() -> None:
    header, state = made("dct")
    symbols = encode(maps(), state)
    half = decoded_maps(symbols, state, "bfloat16")
    assert torch.equal(half, reconstruct(symbols, state).bfloat16().float())
    assert not torch.equal(half, reconstruct(symbols, state))
    assert header.dtype == "float32"


def words(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<u4").tobytes()


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (b"", "0 side bytes"),
        (words(0, 2, 3, 9, 13), "claims maps of"),
        (words(0, 2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), "claims maps of"),
        (words(0, 0, 3, 9, 14), "claims maps of"),
        (words(0, 2, 3, 9, 14) + bytes(8), "8 bytes of means"),
    ],
)
def test_shapes_that_symbols_do_not_back_are_refused(side: bytes, message: str) -> None:
    header, _ = made("dct")
    with pytest.raises(BitstreamError, match=message):
        pass_of(torch.zeros(2 * 3 * 9 * 14, dtype=torch.int8), side, header)


def test_means_must_be_there_and_finite() -> None:
    header, state = made("dwt")
    symbols = encode(maps(), state)
    flat, side = flat_symbols(symbols, signed=True), side_bytes(0, symbols)
    assert torch.equal(pass_of(flat, side, header).symbols.means, symbols.means)
    with pytest.raises(BitstreamError, match="bytes of means"):
        pass_of(flat, side[:-4], header)
    with pytest.raises(BitstreamError, match="no finite numbers"):
        pass_of(flat, side[:-4] + np.array([np.inf], "<f4").tobytes(), header)


def test_codecs_that_are_none_are_refused() -> None:
    header, state = made("channels")
    side = state_bytes(state, header.shape)
    assert torch.equal(state_of_stream(header, side).bases["channels"], state.bases["channels"])
    with pytest.raises(BitstreamError, match="its header asks for 44"):
        state_of_stream(header, side[:-4])
    with pytest.raises(BitstreamError, match="no finite numbers"):
        state_of_stream(header, side[:-4] + np.array([np.nan], "<f4").tobytes())
    with pytest.raises(BitstreamError, match="no finite numbers"):
        state_of_stream(header, np.array([5, 0], "<f4").tobytes() + side[8:])
    # Bases for other channels than the maps have.
    other = header.model_copy(update={"shape": (4, 9, 14)})
    with pytest.raises(BitstreamError, match="other bases"):
        pass_of(torch.zeros(2 * 3 * 9 * 14, dtype=torch.int8), words(0, 2, 3, 9, 14), other)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"format": "other"}, "format"),
        ({"shape": [0, 1, 1]}, "shape"),
        ({"dtype": "object"}, "dtype"),
        ({"run": "rm"}, "run"),
        ({"codec": {"kernel": "../x"}}, "codec"),
        ({"codec": {"kernel": "dct", "table": [1.0] * 5}}, "codec"),
    ],
)
def test_headers_are_validated(change: dict[str, Any], place: str) -> None:
    header, _ = made("dct")
    with pytest.raises(BitstreamError, match=f"no stream of feature maps: {place}"):
        header_of(header.model_dump(mode="json") | change)


def test_a_stream_ends_with_its_end() -> None:
    header, state = made("dct")
    size = len(state_bytes(state, header.shape))
    file = io.BytesIO()
    writer = Writer(file, header.model_dump(mode="json"))
    writer.append(torch.zeros(0, dtype=torch.int8), 0, signed=True, side=bytes(size))
    assert overhead_bytes(header, size) == len(file.getvalue()) + END_BYTES
