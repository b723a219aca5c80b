"""The maps of one tap as a byte stream that can be decoded without the network.

A stream (`coding.stream`) begins with a JSON header, `StreamHeader`. Its first chunk has no symbols; its side
bytes are the codec's tensors, float32, little-endian: the range (2), then the bases in the order of
`taps.basis_shapes`. Each further chunk is one pass of one batch: all symbols, band by band, and as side bytes
five uint32 (number of the pass within the batch, N, C, H, W) and, with separate means, N float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, JsonValue, ValidationError
from torch import Tensor

from cctool.base.errors import BitstreamError
from cctool.checkpoint.file.payload import DTYPES
from cctool.checkpoint.spec import Dimension, Record
from cctool.coding.stream import END_BYTES, chunk_bytes, header_bytes
from cctool.transforms.codec.codec import CodecConfig, CodecState, Symbols, reconstruct
from cctool.transforms.codec.taps import basis_shapes
from cctool.transforms.kernels.by_name import is_wavelet
from cctool.transforms.kernels.wavelets import pyramid_levels

_FLOAT, _WORD = np.dtype("<f4"), np.dtype("<u4")
_WORDS = 5


class StreamHeader(Record):
    """What a decoder must know about a tap.

    Attributes:
        format: identifies a stream of feature maps.
        tap: name of the module.
        codec: settings of the codec.
        shape: (C, H, W) of the maps that it was calibrated on.
        dtype: element type of the network's maps; decoded maps are rounded to it.
    """

    format: Literal["cctool feature maps 1"] = "cctool feature maps 1"
    tap: str = Field(max_length=4096)
    codec: CodecConfig
    shape: tuple[Dimension, Dimension, Dimension]
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"


@dataclass(frozen=True)
class Pass:
    """One pass of a batch through a tap.

    Attributes:
        number: 0 for the first pass of a batch, 1 for the second of a module that is passed twice, ...
        symbols: of the maps.
    """

    number: int
    symbols: Symbols


def header_of(metadata: Mapping[str, JsonValue]) -> StreamHeader:
    """Validate a stream's metadata. Raises BitstreamError with the first error."""
    try:
        return StreamHeader.model_validate(metadata)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "header"
        raise BitstreamError(f"no stream of feature maps: {place}: {problem['msg']}") from None


def state_bytes(state: CodecState, shape: tuple[int, int, int]) -> bytes:
    """The codec's tensors, as the side bytes of a stream's first chunk."""
    tensors = (state.bounds, *(state.bases[name] for name in basis_shapes(state.config, shape)))
    return b"".join(_floats(tensor) for tensor in tensors)


def state_size(config: CodecConfig, shape: tuple[int, int, int]) -> int:
    """Length of `state_bytes`, computed without the tensors."""
    return (2 + sum(n * n for n in basis_shapes(config, shape).values())) * _FLOAT.itemsize


def state_of_stream(header: StreamHeader, side: bytes, device: torch.device | str = "cpu") -> CodecState:
    """The codec of a stream, from its header and the side bytes of its first chunk.

    Raises:
        BitstreamError: if these are not the tensors that the header describes, or not valid.
    """
    sides = basis_shapes(header.codec, header.shape)
    # Compared before anything is allocated: the header may claim bases of any size.
    wanted = state_size(header.codec, header.shape)
    if len(side) != wanted:
        raise BitstreamError(f"{header.tap}: {len(side):,} bytes of codec, its header asks for {wanted:,}")
    # Copied, because the memory of bytes is read-only and little-endian.
    values = torch.from_numpy(np.frombuffer(side, _FLOAT).astype(np.float32))
    if not bool(torch.isfinite(values).all()) or values[0] > values[1]:
        raise BitstreamError(f"{header.tap}: the codec's range or bases are no finite numbers")
    values = values.to(device)
    bounds, start, bases = values[:2], 2, {}
    for name, n in sides.items():
        bases[name] = values[start : start + n * n].view(n, n)
        start += n * n
    return CodecState(header.codec, bounds, bases)


def symbol_type(largest: int, *, signed: bool) -> torch.dtype:
    """The narrowest type that holds symbols up to ``largest``.

    >>> symbol_type(255, signed=True), symbol_type(256, signed=True)
    (torch.int8, torch.int16)
    """
    for dtype in (torch.int8 if signed else torch.uint8, torch.int16):
        limits = torch.iinfo(dtype)
        # The most negative value has the largest symbol: 2 |v| - 1.
        if largest <= (-2 * limits.min - 1 if signed else limits.max):
            return dtype
    return torch.int32


def flat_symbols(symbols: Symbols, *, signed: bool) -> Tensor:
    """All symbols of a pass, band by band, on the CPU, in the type of `symbol_type`."""
    flat = torch.cat([band.reshape(-1) for band in symbols.bands])
    low, high = (int(bound) for bound in torch.aminmax(flat))
    largest = max(-2 * low - 1, 2 * high) if signed else high
    return flat.to(symbol_type(largest, signed=signed)).cpu()


def overhead_bytes(header: StreamHeader, state_size: int) -> int:
    """Bytes of a stream without its passes: header, codec tensors (``state_size`` bytes) and end."""
    codec = chunk_bytes((0,), torch.int8, 0, 0, signed=True, side=state_size)
    return header_bytes(header.model_dump(mode="json")) + codec + END_BYTES


def pass_bytes(header: StreamHeader, symbols: int, largest: int, bits: int, samples: int) -> int:
    """Bytes of a pass in a stream, without writing it.

    Args:
        header: of the stream.
        symbols: their number.
        largest: largest symbol; signed ones are numbered 0, -1, 1, ...
        bits: of their codewords.
        samples: maps in the batch.
    """
    config = header.codec
    side = _WORDS * _WORD.itemsize + (samples * _FLOAT.itemsize if config.mean_shift else 0)
    dtype = symbol_type(largest, signed=config.signed)
    return chunk_bytes((symbols,), dtype, bits, config.k, signed=config.signed, side=side)


def side_bytes(number: int, symbols: Symbols) -> bytes:
    """Side bytes of a pass, whose ``number`` within its batch counts from 0."""
    words = np.array([number, *symbols.shape], dtype=_WORD).tobytes()
    return words if symbols.means is None else words + _floats(symbols.means)


def pass_of(values: Tensor, side: bytes, header: StreamHeader) -> Pass:
    """Inverse of `flat_symbols` and `side_bytes`, for integers of shape (count,) on the CPU.

    Raises:
        BitstreamError: if shape, symbols and means contradict each other.
    """
    if len(side) < _WORDS * _WORD.itemsize:
        raise BitstreamError(f"a chunk of maps has {len(side)} side bytes, at least {_WORDS * 4} are needed")
    config = header.codec
    number, *sizes = (int(word) for word in np.frombuffer(side, _WORD, _WORDS))
    shape = (sizes[0], sizes[1], sizes[2], sizes[3])
    shapes = _band_shapes(config, shape)
    counts = [math.prod(band) for band in shapes]
    if min(shape) < 1 or sum(counts) != values.numel():
        raise BitstreamError(f"a chunk of {values.numel():,} symbols claims maps of {list(shape)}")
    if basis_shapes(config, (shape[1], shape[2], shape[3])) != basis_shapes(config, header.shape):
        raise BitstreamError(f"maps of {list(shape[1:])} have other bases than those of {list(header.shape)}")
    rest = side[_WORDS * _WORD.itemsize :]
    if len(rest) != (shape[0] * _FLOAT.itemsize if config.mean_shift else 0):
        raise BitstreamError(f"a chunk of {shape[0]} samples has {len(rest)} bytes of means")
    means = torch.from_numpy(np.frombuffer(rest, _FLOAT).astype(np.float32)) if config.mean_shift else None
    if means is not None and not bool(torch.isfinite(means).all()):
        raise BitstreamError("a chunk's means are no finite numbers")
    bands = torch.split(values.to(torch.int32), counts)
    return Pass(
        number,
        Symbols(tuple(band.view(size) for band, size in zip(bands, shapes, strict=True)), means, shape),
    )


def decoded_maps(symbols: Symbols, state: CodecState, dtype: str) -> Tensor:
    """Maps as the next layer got them, float32 (N, C, H, W), on the state's device.

    ``dtype`` is the type that the network computed in.
    """
    device = state.bounds.device
    moved = Symbols(
        tuple(band.to(device) for band in symbols.bands),
        None if symbols.means is None else symbols.means.to(device),
        symbols.shape,
    )
    return reconstruct(moved, state).to(DTYPES[dtype]).float()


def _band_shapes(config: CodecConfig, shape: tuple[int, int, int, int]) -> list[tuple[int, ...]]:
    if not is_wavelet(config.kernel):
        return [shape]
    n, channels, height, width = shape
    found: list[tuple[int, ...]] = []
    for _ in range(pyramid_levels(config.kernel, max(height, 1), max(width, 1), config.levels)):
        height, width = (height + 1) // 2, (width + 1) // 2
        found.append((n, channels, 3, height, width))
    return [*found, (n, channels, height, width)]


def _floats(tensor: Tensor) -> bytes:
    values: bytes = tensor.detach().float().cpu().contiguous().numpy().astype(_FLOAT, copy=False).tobytes()
    return values
