"""Dense tensors for code that does not know cctool: a torch state dict, or safetensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cctool.base.errors import ExportError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import mask_buffers
from cctool.checkpoint.file.atomic import write_atomically
from cctool.checkpoint.file.payload import as_bytes
from cctool.formats.records import ExportRequest, Written

Tensors = OrderedDict[str, Tensor]


def write_state_dict(request: ExportRequest) -> Written:
    """Write the decoded tensors by name with `torch.save`; tied tensors stay tied in the file.

    The file is read back with `torch.load(weights_only=True)` and compared bit by bit.

    Raises:
        ExportError: if what is read back differs; no file is left.
        CheckpointError: if the file cannot be written.
    """

    def load(path: Path) -> dict[str, Tensor]:
        with path.open("rb") as stream:
            loaded: dict[str, Tensor] = torch.load(stream, map_location="cpu", weights_only=True)
        return loaded

    return _written(request, "state-dict", torch.save, load)


def write_safetensors(request: ExportRequest) -> Written:
    """Write the decoded tensors as safetensors; a tied tensor is written under each of its names.

    The file is read back and compared bit by bit.

    Raises:
        ExportError: if what is read back differs; no file is left.
        CheckpointError: if the file cannot be written.
    """
    import safetensors.torch

    def save(tensors: Tensors, stream: IO[bytes]) -> None:
        # The library refuses tensors that share memory.
        stream.write(safetensors.torch.save({k: v.clone() for k, v in tensors.items()}, {"format": "pt"}))

    return _written(request, "safetensors", save, safetensors.torch.load_file)


def _written(
    request: ExportRequest,
    kind: str,
    save: Callable[[Tensors, IO[bytes]], None],
    load: Callable[[Path], Mapping[str, Tensor]],
) -> Written:
    tensors = _tensors(request.checkpoint)
    write_atomically(
        request.path,
        lambda stream: save(tensors, stream),
        lambda temporary: _compare(tensors, load(temporary)),
        overwrite=request.overwrite,
    )
    return Written(str(request.path), kind, request.path.stat().st_size, notes=_notes(request))


def _tensors(checkpoint: Checkpoint) -> Tensors:
    """The state dict, decoded, contiguous and on the CPU; tied tensors stay one tensor."""
    made: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    tensors: Tensors = OrderedDict()
    masks = mask_buffers(checkpoint.model)
    for name, value in checkpoint.model.state_dict().items():
        if name in masks:
            # The architecture has no mask buffers, and masked weights are zero.
            continue
        if not isinstance(value, Tensor):
            raise ExportError(f"{name} of the state dict is a {type(value).__name__}, not a tensor")
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if place not in made or not value.numel():
            dense = value.detach().cpu().contiguous()
            # A view of a larger storage would be saved with all of it.
            whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
            made[place] = dense if whole else dense.clone()
        tensors[name] = made[place]
    return tensors


def _compare(written: Tensors, read: Mapping[str, Tensor]) -> None:
    if set(written) != set(read):
        raise ExportError("reading back gave other tensors than were written")
    for name, value in written.items():
        # Bytes, because NaN is not equal to itself.
        if value.dtype != read[name].dtype or as_bytes(value) != as_bytes(read[name]):
            raise ExportError(f"reading back gave other values for {name} than were written")


def _notes(request: ExportRequest) -> tuple[str, ...]:
    notes = []
    masks = mask_buffers(request.checkpoint.model)
    small = len(request.checkpoint.stored.keys() - masks)
    if small:
        notes.append(f"{small} tensors that the checkpoint stores small are written dense")
    if masks:
        notes.append(
            f"{len(masks)} masks are left out: the weights are zero where they say so, but training "
            "elsewhere will not keep them zero"
        )
    if any(edit.get("kind") != "mask" for edit in request.checkpoint.spec.edits):
        notes.append(
            "the network was edited: these tensors do not fit its original architecture, "
            "and the widths stand only in the checkpoint (cctool analyze --spec)"
        )
    return tuple(notes)
