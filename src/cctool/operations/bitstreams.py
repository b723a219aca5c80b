"""The coded maps of a split as streams of bytes: written to a folder, decoded on the way, or only counted.

A folder holds a stream a tap and ``index.json``, an `Index`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cctool import __version__
from cctool.checkpoint.atomic_folder import folder_atomically
from cctool.checkpoint.spec import Dimension, Record
from cctool.data.batches import Batch
from cctool.operations.tap_reports import file_stems
from cctool.transforms.codec import Symbols
from cctool.transforms.tap_stream import (
    StreamHeader,
    decoded_maps,
    flat_symbols,
    pass_of,
    side_bytes,
    state_bytes,
)
from cctool.transforms.taps import recording, state_of, taps_of

__all__ = ["INDEX", "SUFFIX", "Bitstreams", "Index", "IndexedMaps", "IndexedStream", "StreamFigures", "is_ours"]

INDEX, SUFFIX = "index.json", ".seg"
_HASH = r"^[0-9a-f]{64}$"


class IndexedMaps(Record):
    """The maps of one pass, all batches together.

    Attributes:
        number: 0 for the first pass of each batch, 1 for the second of a module that is passed twice, ...
        shape: (N, C, H, W).
        symbols: SHA-256 of all symbols, int32, little-endian, a batch after the other.
        maps: SHA-256 of all maps, float32, little-endian, likewise.
    """

    number: int = Field(ge=0, strict=True)
    shape: tuple[Dimension, Dimension, Dimension, Dimension]
    symbols: str = Field(pattern=_HASH)
    maps: str = Field(pattern=_HASH)


class IndexedStream(Record):
    """One file.

    Attributes:
        tap: name of the module.
        file: name of the file, in the same folder.
        bytes: its size.
        sha256: of the file.
        payload_bits: of all symbols.
        passes: what it decodes to.
    """

    tap: str
    file: str = Field(max_length=255)
    bytes: int = Field(ge=0, strict=True)
    sha256: str = Field(pattern=_HASH)
    payload_bits: int = Field(ge=0, strict=True)
    passes: tuple[IndexedMaps, ...]


class Index(Record):
    """What a folder of streams holds."""

    format: str = "cctool feature maps 1"
    streams: tuple[IndexedStream, ...]
