"""`cctool decode`: streams of feature maps to arrays, verified against what the network computed."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from cctool.base.errors import BitstreamError, UsageError
from cctool.base.networks import some
from cctool.base.runtime import Reporter, device_errors, resolve_device
from cctool.checkpoint.file.atomic_folder import folder_atomically, refuse_existing_folder
from cctool.coding.stream import Chunk, StreamReader
from cctool.operations.transform.files import file_stems
from cctool.operations.transform.stream_index import (
    INDEX,
    SUFFIX,
    Index,
    IndexedStream,
    maps_as_bytes,
    read_index,
    symbols_as_bytes,
)
from cctool.options.common import RuntimeOptions
from cctool.options.inspect.decode import DecodeOptions
from cctool.transforms.codec.stream import decoded_maps, header_of, pass_of, state_of_stream

IDENTICAL, ROUNDED, UNVERIFIED = "identical", "rounded otherwise", "unverified, no index"

_SUFFIX = ".npy"
# Bytes of the header, enough for any shape of four dimensions.
_NPY_HEADER = 192
# Bytes that are read at a time.
_PIECE = 2**20


@dataclass(frozen=True)
class DecodedMaps:
    """One array that was written.

    Attributes:
        name: of the tap.
        number: 0 for the first pass of each batch, 1 for the second if a module is called twice, ...
        shape: (N, C, H, W).
        elements: product of the shape.
        bits_per_element: of the whole stream.
        file: path of the array.
        verdict: ``identical`` to what the network computed; ``rounded otherwise`` if only the symbols are;
            ``unverified, no index``.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    elements: int
    bits_per_element: float
    file: str
    verdict: str


@dataclass(frozen=True)
class DecodeReport:
    """The arrays that were decoded."""

    maps: tuple[DecodedMaps, ...]


@dataclass(frozen=True)
class _Source:
    path: Path
    entry: IndexedStream | None
    made_with: str


def run(options: DecodeOptions, runtime: RuntimeOptions, reporter: Reporter) -> DecodeReport:
    """Decode streams into a folder of ``.npy`` files, float32 (N, C, H, W), a batch at a time.

    Raises:
        BitstreamError: if a stream is truncated or altered, or differs from its description in the index.
        CheckpointError: if the folder exists and may not be replaced.
        UsageError: if there is no such file, or one is named twice.
    """
    device = resolve_device(runtime.device)
    folder = Path(options.output)
    refuse_existing_folder(folder, overwrite=options.force, ours=_is_array)
    sources = [source for text in options.sources for source in _sources(Path(text))]
    _refuse_doubled(sources)
    for text in _unnamed(options.sources, sources):
        reporter.note(text)
    stems = file_stems([source.path.name.removesuffix(SUFFIX) for source in sources])
    found: list[DecodedMaps] = []
    writing = folder_atomically(folder, overwrite=options.force, ours=_is_array)
    with device_errors(), writing as temporary:
        steps = list(zip(sources, stems, strict=True))
        for source, stem in reporter.progress(steps, "decoding", len(steps)):
            found += _decode(source, stem, temporary, folder, device)
    made = {source.entry.tap: source.made_with for source in sources if source.entry is not None}
    for maps in found:
        if maps.verdict == ROUNDED:
            reporter.warn(
                f"{maps.name}: all symbols are right, but the maps are rounded otherwise than in the "
                f"network, which ran with {made[maps.name]}"
            )
    return DecodeReport(tuple(found))


def _is_array(name: str) -> bool:
    return name.endswith(_SUFFIX)


def _sources(path: Path) -> list[_Source]:
    """The streams of a folder, or one file, with its entry in the index of its folder if there is one."""
    if path.is_dir():
        index = read_index(path)
        if not index.streams:
            raise BitstreamError(f"{path / INDEX} names no streams: there is nothing to decode")
        return [_indexed(path, entry, index) for entry in index.streams]
    if not path.is_file():
        raise UsageError(f"{path}: no such folder of streams, and no such file")
    if (path.parent / INDEX).is_file():
        index = read_index(path.parent)
        for entry in index.streams:
            if entry.file == path.name:
                return [_indexed(path.parent, entry, index)]
    return [_Source(path, None, "")]


def _unnamed(named: Sequence[str], sources: Sequence[_Source]) -> Iterator[str]:
    """Notes on streams that the index of their folder does not name, decoded or not."""
    taken = {source.path.resolve() for source in sources}
    for folder in filter(Path.is_dir, map(Path, named)):
        left = sorted(
            path.name for path in folder.iterdir() if path.suffix == SUFFIX and path.resolve() not in taken
        )
        if left:
            yield (
                f"{folder / INDEX} does not name {some(left)}: not decoded; named as files, streams are "
                "decoded without verification"
            )
    for source in sources:
        index = source.path.parent / INDEX
        if source.entry is None and index.is_file():
            yield f"{index} does not name {source.path.name}: what is decoded from it is not verified"


def _refuse_doubled(sources: Sequence[_Source]) -> None:
    seen: set[Path] = set()
    for source in sources:
        place = source.path.resolve()
        if place in seen:
            raise UsageError(f"{source.path} is named twice: each stream is decoded once")
        seen.add(place)


def _indexed(folder: Path, entry: IndexedStream, index: Index) -> _Source:
    path = folder / entry.file
    # An index from elsewhere must not lead out of its folder.
    if Path(entry.file).name != entry.file or not path.is_file():
        raise BitstreamError(f"{folder / INDEX} names {entry.file}, which is no file beside it")
    return _Source(path, entry, index.made_with)


def _decode(
    source: _Source, stem: str, temporary: Path, folder: Path, device: torch.device
) -> list[DecodedMaps]:
    if source.entry is not None:
        _compare_file(source.path, source.entry)
    arrays: list[_Array] = []
    try:
        with source.path.open("rb") as stream:
            reader = StreamReader(stream)
            header, chunks = header_of(reader.metadata), iter(reader)
            first = next(chunks, None)
            if first is None:
                raise BitstreamError("the stream has no codec")
            state = state_of_stream(header, first.side, device)
            for chunk in chunks:
                found = pass_of(chunk.values, chunk.side, header)
                maps = decoded_maps(found.symbols, state, header.dtype)
                if found.number > len(arrays):
                    raise BitstreamError(f"pass {found.number} comes before pass {len(arrays)}")
                if found.number == len(arrays):
                    number = f".pass{found.number + 1}" if found.number else ""
                    arrays.append(_Array(temporary / f"{stem}{number}{_SUFFIX}"))
                arrays[found.number].add(chunk, maps_as_bytes(maps), tuple(maps.shape))
    except BitstreamError as error:
        raise BitstreamError(f"{source.path}: {error}") from None
    finally:
        for array in arrays:
            array.close()
    verdicts = _verdicts(source, header.tap, arrays)
    bits = 8 * source.path.stat().st_size
    elements = sum(array.elements for array in arrays)
    return [
        DecodedMaps(
            header.tap,
            number,
            array.shape,
            array.elements,
            bits / elements,
            str(folder / array.path.name),
            verdict,
        )
        for number, (array, verdict) in enumerate(zip(arrays, verdicts, strict=True))
    ]


def _compare_file(path: Path, entry: IndexedStream) -> None:
    # In pieces, because a stream may be larger than memory.
    hashed = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            hashed.update(piece)
    if hashed.hexdigest() != entry.sha256:
        raise BitstreamError(f"{path}: altered or cut off: its SHA-256 is not the one in {INDEX}")


def _verdicts(source: _Source, tap: str, arrays: Sequence[_Array]) -> list[str]:
    entry = source.entry
    if entry is None:
        return [UNVERIFIED] * len(arrays)
    if entry.tap != tap or [maps.shape for maps in entry.passes] != [array.shape for array in arrays]:
        raise BitstreamError(f"{source.path}: other maps than {INDEX} says")
    for maps, array in zip(entry.passes, arrays, strict=True):
        if maps.symbols != array.symbols.hexdigest():
            raise BitstreamError(f"{source.path}: other symbols than {INDEX} says")
    return [
        # Equal symbols may still decode to maps that another device or version of torch rounds differently.
        IDENTICAL if maps.maps == array.maps.hexdigest() else ROUNDED
        for maps, array in zip(entry.passes, arrays, strict=True)
    ]


@dataclass
class _Array:
    """A ``.npy`` file that grows; its first dimension is only known at the end."""

    path: Path
    shape: tuple[int, ...] = ()
    symbols: Any = field(default_factory=hashlib.sha256)
    maps: Any = field(default_factory=hashlib.sha256)
    _stream: IO[bytes] | None = None

    @property
    def elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    def add(self, chunk: Chunk, data: bytes, shape: tuple[int, ...]) -> None:
        """Append the maps of one batch: float32 bytes of shape (N, C, H, W)."""
        if self._stream is None:
            self._stream = self.path.open("xb")
            self._stream.write(bytes(_NPY_HEADER))
            self.shape = (0, *shape[1:])
        if self.shape[1:] != shape[1:]:
            raise BitstreamError(f"maps of {list(shape[1:])} after maps of {list(self.shape[1:])}")
        self.shape = (self.shape[0] + shape[0], *shape[1:])
        self.symbols.update(symbols_as_bytes(chunk.values))
        self.maps.update(data)
        self._stream.write(data)

    def close(self) -> None:
        """Write the header into the space that was reserved for it."""
        if self._stream is not None:
            self._stream.seek(0)
            self._stream.write(_npy_header(self.shape))
            self._stream.close()


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of numpy's format 1.0 for float32, little-endian, always of the same length.

    Source: numpy.lib.format: magic, version, length of the text, the text padded with blanks.
    """
    magic = b"\x93NUMPY\x01\x00"
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = _NPY_HEADER - len(magic) - 2
    return magic + struct.pack("<H", size) + text.ljust(size - 1) + b"\n"
