"""The index of a folder of streams: hashes and shapes of what its files decode to."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from cctool import __version__
from cctool.base.errors import BitstreamError
from cctool.base.json_text import DoubledKeyError, read_json, twice
from cctool.checkpoint.spec import Dimension, Record

INDEX, SUFFIX = "index.json", ".seg"
# Bytes of an index; a larger file is not read into memory.
_LARGEST = 2**26
_HASH = r"^[0-9a-f]{64}$"


class IndexedMaps(Record):
    """The maps of one pass, all batches together.

    Attributes:
        number: 0 for the first pass of each batch, 1 for the second if a module is called twice, ...
        shape: (N, C, H, W).
        symbols: SHA-256 of all symbols as int32, little-endian, batch after batch.
        maps: SHA-256 of all maps as float32, little-endian, batch after batch.
    """

    number: int = Field(ge=0, strict=True)
    shape: tuple[Dimension, Dimension, Dimension, Dimension]
    symbols: str = Field(pattern=_HASH)
    maps: str = Field(pattern=_HASH)


class IndexedStream(Record):
    """One file.

    Attributes:
        tap: name of the module.
        file: its name in the folder.
        bytes: its size.
        sha256: of the file.
        payload_bits: of the codewords of all symbols.
        passes: what it decodes to.
    """

    tap: str
    file: str = Field(max_length=255)
    bytes: int = Field(ge=0, strict=True)
    sha256: str = Field(pattern=_HASH)
    payload_bits: int = Field(ge=0, strict=True)
    passes: tuple[IndexedMaps, ...]


class Index(Record):
    """What a folder of streams holds.

    Attributes:
        format: of the folder.
        network: architecture.
        data: reference of the data set.
        split: part of it.
        made_with: versions and device.
        streams: in the order of the forward pass.
    """

    format: Literal["cctool feature maps 1"] = "cctool feature maps 1"
    network: str = Field(max_length=4096)
    data: str = Field(max_length=4096)
    split: str = Field(max_length=64)
    made_with: str = Field(max_length=256)
    streams: tuple[IndexedStream, ...]


def is_ours(name: str) -> bool:
    """Whether a folder of streams may hold a file of that name."""
    return name == INDEX or name.endswith(SUFFIX)


def write_index(index: Index, folder: Path) -> None:
    """Write ``index.json``."""
    text = json.dumps(index.model_dump(mode="json"), indent=2, allow_nan=False)
    (folder / INDEX).write_text(f"{text}\n", encoding="utf-8")


def read_index(folder: Path) -> Index:
    """Read ``index.json``.

    Raises:
        BitstreamError: if there is none, it is malformed, or it names a file twice.
    """
    path = folder / INDEX
    try:
        if path.stat().st_size > _LARGEST:
            raise BitstreamError(f"{path}: larger than {_LARGEST // 2**20} MiB, no index of streams")
        text = path.read_bytes()
        # Whatever else is wrong with it, the record says better.
        with suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            read_json(text)
        index = Index.model_validate_json(text)
    except DoubledKeyError as error:
        raise BitstreamError(f"{path} is malformed: {error}") from None
    except FileNotFoundError:
        raise BitstreamError(f"{folder} has no {INDEX}: `cctool evaluate --bitstream` writes one") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or INDEX
        raise BitstreamError(f"{path} is malformed at {place}: {problem['msg']}") from None
    if doubled := twice(entry.file for entry in index.streams):
        raise BitstreamError(f"{path} names {doubled[0]} twice: each stream is decoded once")
    return index


def made_with(device: torch.device) -> str:
    """Versions and device, on which the rounding of maps depends."""
    return f"cctool {__version__}, torch {torch.__version__}, {device.type}"


def symbols_as_bytes(values: Tensor) -> bytes:
    """Symbols of any integer type as int32, little-endian."""
    found: bytes = values.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).tobytes()
    return found


def maps_as_bytes(maps: Tensor) -> bytes:
    """Maps (N, C, H, W) as float32, little-endian, in that order."""
    found: bytes = maps.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
    return found
