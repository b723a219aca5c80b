"""The `.pt` file: a plain ``torch.save`` zip of strings and tensors that ends with a checksum of itself.

``torch.load(path, weights_only=True)`` opens it anywhere and gives a dictionary; docs/checkpoint-format.md
documents every byte. Nothing here unpickles anything but tensors and plain containers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cctool.base.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.arena import unpack
from cctool.checkpoint.file.checksum import DIGITS, MARK, ZEROS
from cctool.checkpoint.file.compact import COMPACT_VERSION, packed, unpacked
from cctool.checkpoint.file.payload import (
    MemoryPlace,
    Payload,
    ResumeState,
    canonical_json,
    dense_payload,
    dense_texts,
    place,
)

DENSE_VERSION = 1
"""Format version of files whose tensors are all dense, and of older ones with encoded tensors."""
_CHUNK = 1 << 20
# Times the file's size that all tensors together may have, views of the same bytes counted each.
_MAX_OVERLAP = 4
_SMALL = 4096
"""Bytes up to which tensors share a storage in the file."""
_REMARKS = ("TypedStorage is deprecated", "Detected pickle protocol", "Validating sparse tensor invariants")


def write_pt(payload: Payload, stream: IO[bytes]) -> None:
    """Write ``payload``; equal payloads give equal bytes."""
    document: dict[str, Any]
    if any(isinstance(value, EncodedTensor) for value in payload.tensors.values()):
        compact = packed(payload)
        document = {
            "cctool": COMPACT_VERSION,
            "digest": compact.digest,
            "text": compact.text,
            "arena": compact.arena,
            "model": _laid_out(compact.dense),
        }
    else:
        model = _laid_out({k: v for k, v in payload.tensors.items() if isinstance(v, Tensor)})
        document = {"cctool": DENSE_VERSION, **dense_texts(payload), "model": model}
    if payload.resume is not None:
        document["resume"] = {
            "state": canonical_json(dict(payload.resume.state)),
            "tensors": _laid_out(payload.resume.tensors),
        }
    # To the stream: from a path, torch would take the temporary file's name into the archive.
    torch.save(document, stream)
    _append_checksum(stream)


def _laid_out(tensors: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Tensors as the file holds them: contiguous, tied ones still tied, none with more storage than it needs.

    Small ones of one type share a storage, because a zip entry costs about 300 bytes.
    """
    keys = {name: place(tensor) if tensor.numel() else name for name, tensor in tensors.items()}
    made: dict[object, Tensor] = {}
    small: dict[torch.dtype, list[object]] = {}
    for name, tensor in tensors.items():
        if keys[name] in made:
            continue
        value = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        made[keys[name]] = value if _alone(value) else value.clone()
        if value.nbytes <= _SMALL:
            small.setdefault(value.dtype, []).append(keys[name])
    for group in small.values():
        row = torch.cat([made[key].reshape(-1) for key in group])
        end = 0
        for key in group:
            start, end = end, end + made[key].numel()
            made[key] = row[start:end].view(made[key].shape)
    # pickle writes a string once per object, so equal names must be one object to give equal bytes.
    return OrderedDict((sys.intern(name), made[keys[name]]) for name in tensors)


def _alone(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the small tensors that share a storage in the file one each; tied tensors stay tied."""
    made: dict[MemoryPlace, Tensor] = {}
    for tensor in tensors.values():
        if place(tensor) not in made:
            made[place(tensor)] = tensor if _alone(tensor) else tensor.clone()
    return {name: made[place(tensor)] for name, tensor in tensors.items()}


def _append_checksum(stream: IO[bytes]) -> None:
    """Make the checksum the archive's comment."""
    # The last two bytes of a zip without a comment are the comment's length, 0.
    stream.seek(-2, 2)
    stream.write(struct.pack("<H", len(MARK) + DIGITS) + MARK + ZEROS)
    stream.flush()
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    stream.seek(-DIGITS, 2)
    stream.write(digest.hexdigest().encode())


def load_torch_file(path: Path) -> Any:
    """Open a ``torch.save`` file, zip or legacy, without running any code that it contains.

    Raises:
        UnsafeCheckpointError: if it holds anything but tensors and plain containers.
        CheckpointError: if its name says that it is an ONNX file.
        CorruptCheckpointError: if it cannot be read.
    """
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an ONNX file: only `cctool compare` runs such files")
    try:
        if zipfile.is_zipfile(path):
            _refuse_odd_archive(path)
        else:
            _refuse_other_kind(path)
        with path.open("rb") as stream, warnings.catch_warnings():
            # Warnings about legacy files and old protocols, about which a user can do nothing.
            for message in _REMARKS:
                warnings.filterwarnings("ignore", message)
            document = torch.load(stream, map_location="cpu", weights_only=True)
    except (UnsafeCheckpointError, CorruptCheckpointError):
        raise
    except pickle.UnpicklingError as error:
        raise _refused_pickle(path, error) from None
    except MemoryError:
        raise CorruptCheckpointError(f"{path} asks for more memory than there is") from None
    # On a damaged file torch may raise anything.
    except Exception as error:
        raise CorruptCheckpointError(
            f"{path} is not a readable checkpoint: it is damaged, or torch.save did not write it"
        ) from error
    _refuse_unbacked(path, document)
    return document


def _refuse_other_kind(path: Path) -> None:
    """Refuse what is no pickle either, in which torch would look for one all the same."""
    with path.open("rb") as stream:
        start = stream.read(2)
    if start[:1] == b"\x80" or tarfile.is_tarfile(path):
        return
    if start == b"PK":
        raise CorruptCheckpointError(
            f"{path} is not a readable checkpoint: the end of its archive is missing"
        )
    raise CorruptCheckpointError(
        f"{path} is not a readable checkpoint: torch.save writes an archive or a pickle, and this is neither"
    )


def _refuse_odd_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise CorruptCheckpointError(f"{path} is not a readable archive: {_line(error)}") from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UnsafeCheckpointError(
            f"{path} is a TorchScript archive, which holds code; save its state_dict()"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptCheckpointError(f"{path} holds compressed entries, which torch never writes")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CorruptCheckpointError(f"{path} claims to hold more bytes than it has")


def _refuse_unbacked(path: Path, document: Any) -> None:
    """Refuse tensors that are larger than the data behind them: a kilobyte would claim a terabyte."""
    storages: dict[int, int] = {}
    places: dict[MemoryPlace, int] = {}
    for tensor in _tensors(document):
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_quantized
        ):
            raise CorruptCheckpointError(f"{path} holds a {_kind(tensor)} tensor; dense tensors are allowed")
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > storage.nbytes():
            raise CorruptCheckpointError(
                f"{path}: a tensor of shape {list(tensor.shape)} is not backed by data"
            )
        storages[storage.data_ptr()] = storage.nbytes()
        places[place(tensor)] = tensor.nbytes
    size = path.stat().st_size
    # Views may overlap, such as a weight and its halves, but thousands must not claim the same bytes.
    if sum(storages.values()) > size or sum(places.values()) > _MAX_OVERLAP * size:
        raise CorruptCheckpointError(f"{path} claims to hold more bytes than it has")


def _kind(tensor: Tensor) -> str:
    if tensor.is_quantized:
        return "quantized"
    return str(tensor.layout).removeprefix("torch.") if type(tensor) is Tensor else type(tensor).__name__


def _tensors(document: Any) -> Iterator[Tensor]:
    """All tensors in nested containers; each container is entered once, because it may contain itself."""
    seen: set[int] = set()
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _refused_pickle(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """The error for a pickle that torch refused, without torch's advice to load it unsafely."""
    text = str(error)
    names = set(re.findall(r"GLOBAL ([\w.]+)", text))
    # torch stops at the first name; it can list all of a zip, unless that is a legacy one or damaged.
    with contextlib.suppress(Exception):
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if names:
        return UnsafeCheckpointError(
            f"{path} needs pickle, which runs code: it contains {', '.join(sorted(names))}"
        )
    if re.search(r"Unsupported operand 1[45]\d", text):
        return UnsafeCheckpointError(f"{path} needs pickle, which runs code: its protocol is 4 or newer")
    return CorruptCheckpointError(f"{path} is not a readable checkpoint: its pickle is damaged")


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def parse_pt(path: Path, document: Any) -> Payload:
    """Read the parts of a cctool document, which `load_torch_file` returned.

    Raises:
        CorruptCheckpointError: if a part is missing or of the wrong kind.
    """
    version = document.get("cctool")
    if type(version) is not int or version not in (DENSE_VERSION, COMPACT_VERSION):
        raise CorruptCheckpointError(
            f"{path} is of format {version!r}; this cctool reads formats {DENSE_VERSION} and "
            f"{COMPACT_VERSION}: install the one that wrote it"
        )
    model = _state_dict(path, "model", document.get("model"))
    resume = _parse_resume(path, document.get("resume"))
    if version == COMPACT_VERSION:
        text, arena, digest = (document.get(key) for key in ("text", "arena", "digest"))
        return unpacked(text, arena, model, digest, resume)
    tensors = _with_encoded(path, model, document["encoded"]) if "encoded" in document else model
    return dense_payload(document, tensors, resume)


def _state_dict(path: Path, what: str, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise CorruptCheckpointError(f"{path}: {what!r} is not a state dict")
    return _apart(found)


def _with_encoded(
    path: Path, model: Mapping[str, Tensor], encoded: Any
) -> Mapping[str, Tensor | EncodedTensor]:
    try:
        found = unpack(encoded["index"], encoded["arena"])
        order = json.loads(encoded["order"])
        both: dict[str, Tensor | EncodedTensor] = {**model, **found}
        if len(order) != len(model) + len(found):
            raise ValueError("the order does not name each tensor once")
        return {name: both.pop(name) for name in order}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise CorruptCheckpointError(f"{path}: the encoded tensors are malformed") from None


def _parse_resume(path: Path, resume: Any) -> ResumeState | None:
    if resume is None:
        return None
    try:
        tensors, state = resume["tensors"], json.loads(resume["state"])
        if not isinstance(state, dict):
            raise TypeError("the state is not a table")
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CorruptCheckpointError(f"{path}: the resume state is malformed") from None
    return ResumeState(tensors=_state_dict(path, "resume", tensors), state=state)
