"""The checkpoint in memory, and its way from and to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cctool.base.errors import CheckpointError, CorruptCheckpointError, SpecError, UsageError
from cctool.checkpoint.build import assemble, check_edits, instantiate, refuse_misfit
from cctool.checkpoint.edits.mask import derived_masks
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.atomic import write_atomically
from cctool.checkpoint.file.checksum import verify_checksum
from cctool.checkpoint.file.payload import Payload, ResumeState, combined_digest, content_hash, tensor_digests
from cctool.checkpoint.file.safetensors_file import read_safetensors, write_safetensors
from cctool.checkpoint.file.torch_file import parse_pt, write_pt
from cctool.checkpoint.foreign import bare_tensors, match_names, read_foreign
from cctool.checkpoint.spec import History, ModelSpec, Parent, Step
from cctool.checkpoint.tables import Tables

_WRITERS = {".pt": write_pt, ".safetensors": write_safetensors}
SUFFIXES = tuple(_WRITERS)
"""File suffixes that a checkpoint can be written to."""
_REPLACED_AT_MOST = 20


@dataclass(frozen=True)
class Opened:
    """A file's content before its module is built.

    Attributes:
        payload: what a file of ours holds; None for a foreign file.
        tensors: what a foreign file holds; None for ours.
        origin: name and hashes of the file.
    """

    origin: Parent
    payload: Payload | None = None
    tensors: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model that trains, with everything else that its file holds.

    Attributes:
        model: the built module with its tensors, on the CPU.
        spec: how to build it again.
        history: the steps that led to it.
        stored: encoded forms of the tensors that the file does not hold dense. The model holds the decoded
            values; code that changes a tensor must cut, re-encode or drop its entry.
        resume: state for continuing a training run.
        origin: the file that it came from; None for a fresh network.
    """

    model: nn.Module
    spec: ModelSpec
    history: tuple[Step, ...] = ()
    stored: Mapping[str, EncodedTensor] = field(default_factory=dict)
    resume: ResumeState | None = None
    origin: Parent | None = None

    def with_step(self, step: Step) -> Checkpoint:
        """Return this checkpoint with one more line of history."""
        return replace(self, history=(*self.history, step))

    def payload(self) -> Payload:
        """What a file of this checkpoint holds, including digests.

        Raises:
            CheckpointError: if an entry of the state dict is not a tensor, or a stored tensor has no entry.
        """
        tensors: dict[str, Tensor | EncodedTensor] = {}
        for name, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{name} of the state dict is a {type(value).__name__}, not a tensor")
            tensors[name] = self.stored.get(name, value)
        if unknown := self.stored.keys() - tensors.keys():
            raise CheckpointError(
                f"stored tensors that the model does not have: {', '.join(sorted(unknown))}"
            )
        payload = Payload(self.spec, History(steps=self.history), tensors, self.resume)
        return replace(payload, digests=tensor_digests(payload))


def open_file(path: Path, *, trust_pickle: bool = False, suffix: str | None = None) -> Opened:
    """Read and verify a file, without building a module.

    Args:
        path: a ``.pt``, ``.pth``, ``.safetensors`` or any other torch file.
        trust_pickle: whether a foreign file may run code; never applies to files of ours.
        suffix: the format, where the file's own name does not say it.

    Raises:
        CheckpointError: if it is missing, damaged or unsafe.
    """
    for attempt in range(_REPLACED_AT_MOST):
        held: IO[bytes] | None = None
        try:
            _refuse_no_file(path)
            held = path.open("rb")
            opened = _read(path, trust_pickle, suffix)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except CheckpointError:
            # A file that is replaced between two looks at it is not damaged.
            if held is None or attempt + 1 == _REPLACED_AT_MOST or _still(path, held):
                raise
        else:
            if _still(path, held):
                return opened
        finally:
            if held is not None:
                held.close()
    raise CheckpointError(f"{path} is replaced again and again while it is read")


def _refuse_no_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path}: no such file")
    if not path.stat().st_size:
        raise CorruptCheckpointError(f"{path} is empty")


def _still(path: Path, held: IO[bytes]) -> bool:
    """Whether the path names the open file: while that is open, its number is given to no other."""
    return path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat())


def _read(path: Path, trust_pickle: bool, suffix: str | None) -> Opened:
    file_hash, signed = verify_checksum(path)
    document: Any
    if (suffix or path.suffix) == ".safetensors":
        document = read_safetensors(path, signed=signed)
    else:
        # Files of ours never need pickle, so it stays off for them even with --trust-pickle.
        document = read_foreign(path, trust_pickle=trust_pickle and not signed)
        if isinstance(document, dict) and "cctool" in document:
            if not signed:
                raise CorruptCheckpointError(f"{path} is damaged: the checksum at its end is missing")
            document = parse_pt(path, document)
    if not isinstance(document, Payload):
        origin = Parent(path=path.name, content=None, file=file_hash)
        return Opened(origin, tensors=bare_tensors(document, path))
    digests = tensor_digests(document)
    _refuse_damaged(path, document, digests)
    origin = Parent(path=path.name, content=content_hash(document, digests), file=file_hash)
    return Opened(origin, payload=document)


def _refuse_damaged(path: Path, payload: Payload, digests: Mapping[str, str]) -> None:
    """Compare the digests of what was read with those that the file holds."""
    if payload.digest is not None:
        if payload.digest != combined_digest(digests):
            raise CorruptCheckpointError(f"{path} is damaged: its tensors do not match their digest")
    elif digests != dict(payload.digests):
        names = digests.keys() | payload.digests.keys()
        wrong = sorted(name for name in names if digests.get(name) != payload.digests.get(name))
        raise CorruptCheckpointError(f"{path} is damaged: {', '.join(wrong[:3])} does not match its digest")


def load(path: Path | str, tables: Tables) -> Checkpoint:
    """Load a checkpoint of ours: a module that trains, prunes, quantizes and exports again.

    Raises:
        CheckpointError: if the file is missing, damaged, unsafe or foreign.
    """
    opened = open_file(Path(path))
    if opened.payload is None:
        raise CheckpointError(f"{path} does not say which network it holds; name it with --arch")
    return build(opened, opened.payload.spec, tables)


def build(opened: Opened, spec: ModelSpec, tables: Tables) -> Checkpoint:
    """Build the module of ``spec`` and give it the tensors of an opened file."""
    if opened.payload is None:
        tensors: dict[str, Tensor] = dict(opened.tensors or {})
        model = instantiate(spec, tables, tensors)
        named = match_names(model, tensors)
        assembled = assemble(model, named | derived_masks(model, named))
        check_edits(assembled, spec, tables)
        return Checkpoint(assembled, spec, origin=opened.origin)
    stored = {k: v for k, v in opened.payload.tensors.items() if isinstance(v, EncodedTensor)}
    model = instantiate(spec, tables, opened.payload.tensors)
    # Before anything is decoded, because decoding allocates what the shapes say.
    refuse_misfit(model, {name: value.shape for name, value in opened.payload.tensors.items()})
    assembled = assemble(model, _decode(opened.payload.tensors, tables))
    check_edits(assembled, spec, tables)
    history, resume = opened.payload.history.steps, opened.payload.resume
    return Checkpoint(assembled, spec, history, stored, resume, opened.origin)


def _decode(tensors: Mapping[str, Tensor | EncodedTensor], tables: Tables) -> dict[str, Tensor]:
    decoded: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            decoded[name] = value
            continue
        encoding = tables.encodings.get(value.encoding)
        if encoding is None:
            raise SpecError(
                f"{name} is stored as {value.encoding!r}: "
                f"this version knows {', '.join(sorted(tables.encodings))}"
            )
        if id(value) not in shared:
            shared[id(value)] = encoding.decode(value)
        decoded[name] = shared[id(value)]
    return decoded


def save(checkpoint: Checkpoint, path: Path | str, tables: Tables, *, overwrite: bool = False) -> Parent:
    """Write a checkpoint so that a crash leaves the old file or the new one, whole, and read it back.

    Args:
        checkpoint: what to write; its stored tensors must decode to what the model holds.
        path: the target; its suffix decides the format.
        tables: registries.
        overwrite: whether an existing file may be replaced.

    Returns:
        Name and hashes of the file.

    Raises:
        UsageError: if the suffix is unknown.
        CheckpointError: if it cannot be written; nothing is left under that name then.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise UsageError(
            f"{path}: a checkpoint ends in {' or '.join(SUFFIXES)}, not {path.suffix or 'nothing'}"
        )
    payload = checkpoint.payload()
    _refuse_stale(checkpoint, tables)
    content = content_hash(payload, payload.digests)
    written: list[Parent] = []

    def check(temporary: Path) -> None:
        reread = open_file(temporary, suffix=path.suffix)
        if reread.origin.content != content:
            raise CheckpointError(f"{path}: reading back gave other content than was written")
        written.append(reread.origin.model_copy(update={"path": path.name}))

    write_atomically(path, partial(writer, payload), check, overwrite=overwrite)
    return written[0]


def _refuse_stale(checkpoint: Checkpoint, tables: Tables) -> None:
    present = checkpoint.model.state_dict()
    for name, encoded in checkpoint.stored.items():
        decoded = tables.encodings[encoded.encoding].decode(encoded)
        if not torch.equal(decoded, present[name].detach().cpu()):
            raise CheckpointError(
                f"{name}: its stored form is not what the model computes with (a fault of cctool)"
            )
