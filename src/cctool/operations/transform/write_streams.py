"""The coded maps of a split as streams of bytes: written to a folder, decoded at once, or only counted.

`transforms/codec/stream.py` defines a stream's content, `stream_index` the index of the folder.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.coding.histogram import code_bits, histogram
from cctool.coding.stream import StreamReader, Writer
from cctool.data.serving.batches import Batch
from cctool.operations.transform.files import file_stems
from cctool.operations.transform.stream_index import (
    SUFFIX,
    IndexedMaps,
    IndexedStream,
    maps_as_bytes,
    symbols_as_bytes,
)
from cctool.transforms.codec.codec import Symbols
from cctool.transforms.codec.stream import (
    StreamHeader,
    decoded_maps,
    flat_symbols,
    header_of,
    pass_of,
    side_bytes,
    state_bytes,
    state_of_stream,
)
from cctool.transforms.codec.taps import state_of, taps_of


@dataclass(frozen=True)
class StreamFigures:
    """Size of one tap's stream.

    Attributes:
        tap: name of the module.
        file: its path; None if no file was written.
        elements: number of values of all maps.
        payload_bits: of the symbols' codewords.
        side_bits: all others: header, codec, means, block tables, checksums, padding of last bytes.
        file_bytes: of the stream, (payload_bits + side_bits) / 8.
        bits_per_element: all bits per value.
        ratio_8bit: compression against 8 bits per value.
        ratio_float32: likewise against 32 bits per value.
    """

    tap: str
    file: str | None
    elements: int
    payload_bits: int
    side_bits: int
    file_bytes: int
    bits_per_element: float
    ratio_8bit: float
    ratio_float32: float


class _Target:
    """A file that hashes all bytes and remembers the latest; without a path nothing is written to disk."""

    def __init__(self, path: Path | None) -> None:
        self._stream = None if path is None else path.open("xb")
        self.last = b""
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.last += data
        return len(data) if self._stream is None else self._stream.write(data)

    def take(self) -> bytes:
        """The bytes written since the last call."""
        taken, self.last = self.last, b""
        return taken

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


@dataclass
class _Hashes:
    """Running hashes of one pass over all batches."""

    symbols: Any = field(default_factory=hashlib.sha256)
    maps: Any = field(default_factory=hashlib.sha256)
    samples: int = 0
    shape: tuple[int, ...] = ()


class _TapStream:
    """The stream of one tap, while it is written."""

    def __init__(self, name: str, model: nn.Module, path: Path | None) -> None:
        self.name, self.file = name, "" if path is None else path.name
        self._state, self._shape = state_of(model, name), taps_of(model)[name].shape
        self.target = _Target(path)
        self._writer: Writer | None = None
        self._front = b""
        self.payload_bits = 0
        self.elements = 0
        self.passes: list[_Hashes] = []
        self.pass_now = 0

    def add(self, symbols: Symbols, y: Tensor, *, decode: bool) -> Tensor | None:
        """Write the symbols of one pass (N, C, H, W); with ``decode`` returns the map that the bytes give.

        Raises:
            TransformError: if its maps have another size than those of earlier batches.
        """
        if self._writer is None:
            self._writer = self._begun(y)
        codec, number = self._state.config, self.pass_now
        self.pass_now += 1
        flat = flat_symbols(symbols, signed=codec.signed)
        self._writer.append(flat, codec.k, signed=codec.signed, side=side_bytes(number, symbols))
        self.payload_bits += int(code_bits(histogram(flat, signed=codec.signed))[codec.k])
        self.elements += y.numel()
        chunk = self.target.take()
        decoded = self._decoded(chunk, y.device) if decode else None
        self._hash(number, flat, y if decoded is None else decoded)
        return decoded

    def _begun(self, y: Tensor) -> Writer:
        dtype = str(y.dtype).removeprefix("torch.")
        header = StreamHeader.model_validate(
            {"tap": self.name, "codec": self._state.config, "shape": self._shape, "dtype": dtype}
        )
        writer = Writer(cast("BinaryIO", self.target), header.model_dump(mode="json"))
        # The codec's state is the side information of a first chunk without symbols.
        nothing = torch.zeros(0, dtype=torch.int8)
        writer.append(nothing, 0, signed=True, side=state_bytes(self._state, self._shape))
        # To decode any single chunk, a reader needs the header and the codec before it.
        self._front = self.target.take()
        return writer

    def _decoded(self, chunk: bytes, device: torch.device) -> Tensor:
        """The map that the bytes alone give: those of the header and the codec, and those of one chunk."""
        reader = StreamReader(io.BytesIO(self._front + chunk))
        header, chunks = header_of(reader.metadata), iter(reader)
        state = state_of_stream(header, next(chunks).side, device)
        found = next(chunks)
        return decoded_maps(pass_of(found.values, found.side, header).symbols, state, header.dtype)

    def _hash(self, number: int, flat: Tensor, y: Tensor) -> None:
        if number == len(self.passes):
            self.passes.append(_Hashes(shape=tuple(y.shape[1:])))
        hashes = self.passes[number]
        if hashes.shape != tuple(y.shape[1:]):
            raise TransformError(
                f"{self.name}: maps of {list(y.shape[1:])} after maps of {list(hashes.shape)}; a stream "
                "holds maps of one size"
            )
        hashes.samples += y.shape[0]
        hashes.symbols.update(symbols_as_bytes(flat))
        hashes.maps.update(maps_as_bytes(y))

    def finish(self, folder: Path | None) -> tuple[StreamFigures, IndexedStream] | None:
        """Write the end; None if no map ever passed the tap."""
        if self._writer is not None:
            self._writer.finish()
        self.target.close()
        if self._writer is None:
            return None
        size = self._writer.written
        figures = StreamFigures(
            tap=self.name,
            file=str(folder / self.file) if folder is not None and self.file else None,
            elements=self.elements,
            payload_bits=self.payload_bits,
            side_bits=8 * size - self.payload_bits,
            file_bytes=size,
            bits_per_element=8 * size / self.elements,
            ratio_8bit=self.elements / size,
            ratio_float32=4 * self.elements / size,
        )
        return figures, IndexedStream(
            tap=self.name,
            file=self.file,
            bytes=size,
            sha256=self.target.sha256.hexdigest(),
            payload_bits=self.payload_bits,
            passes=tuple(
                IndexedMaps(
                    number=number,
                    shape=(hashes.samples, hashes.shape[0], hashes.shape[1], hashes.shape[2]),
                    symbols=hashes.symbols.hexdigest(),
                    maps=hashes.maps.hexdigest(),
                )
                for number, hashes in enumerate(self.passes)
            ),
        )


class Bitstreams:
    """A sink for `taps.recording` that writes every pass to the tap's stream.

    Args:
        model: the network, with its taps.
        folder: where streams are written; None writes no files.
        through: decode each chunk; the network goes on with the decoded maps.
    """

    def __init__(self, model: nn.Module, folder: Path | None, *, through: bool) -> None:
        names = list(taps_of(model))
        self._through = through
        self._streams = {
            name: _TapStream(name, model, None if folder is None else folder / f"{stem}{SUFFIX}")
            for name, stem in zip(names, file_stems(names), strict=True)
        }

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass on batches, and count the passes of each from 0."""
        for batch in batches:
            for stream in self._streams.values():
                stream.pass_now = 0
            yield batch

    def __call__(self, name: str, symbols: Symbols, x: Tensor, y: Tensor) -> Tensor | None:
        """Write one pass of one tap."""
        return self._streams[name].add(symbols, y, decode=self._through)

    def finish(self, folder: Path | None) -> tuple[tuple[StreamFigures, ...], tuple[IndexedStream, ...]]:
        """Write the ends of all streams; gives their sizes, with paths in ``folder``, and index entries."""
        finished = [stream.finish(folder) for stream in self._streams.values()]
        passed = [found for found in finished if found is not None]
        return tuple(figures for figures, _ in passed), tuple(entry for _, entry in passed)

    def close(self) -> None:
        """Close all files, even after an error."""
        for stream in self._streams.values():
            stream.target.close()
