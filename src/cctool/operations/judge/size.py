"""Parameters, multiply-accumulates and bytes of a checkpoint, for its line of history."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cctool.base.errors import CctoolError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Size
from cctool.graph import cost
from cctool.transforms.plain import plain_model


def measure(checkpoint: Checkpoint) -> Size:
    """Count parameters, multiply-accumulates of one input and bytes of stored tensors.

    Parameters and bytes are those of what is stored, such as coefficients; multiply-accumulates those of the
    ordinary layers computed from it, without codecs, or None if the network does not run on its input shape.
    """
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    try:
        macs: int | None = cost.measure(plain_model(checkpoint.model), checkpoint.spec.input_shape).total.macs
    except CctoolError:
        macs = None
    return Size(parameters=parameters, macs=macs, bytes=stored_bytes(checkpoint))


@dataclass(frozen=True)
class Footprint:
    """How large a network is.

    Attributes:
        parameters: number of scalar parameters; None if unknown.
        file_bytes: of its file; None without a file.
        dense_bytes: of all tensors as they compute; None if unknown.
        stored_bytes: of all tensors as the file stores them, without names and headers; None if unknown.
    """

    parameters: int | None = None
    file_bytes: int | None = None
    dense_bytes: int | None = None
    stored_bytes: int | None = None


def footprint(checkpoint: Checkpoint, path: Path | None) -> Footprint:
    """Count parameters and bytes of a checkpoint, whose file is ``path``, if it has one."""
    return Footprint(
        parameters=sum(parameter.numel() for parameter in checkpoint.model.parameters()),
        file_bytes=path.stat().st_size if path is not None and path.is_file() else None,
        dense_bytes=stored_bytes(replace(checkpoint, stored={})),
        stored_bytes=stored_bytes(checkpoint),
    )


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors as the file stores them, tied ones once, without names and headers."""
    total = 0
    seen: set[int] = set()
    for name, tensor in checkpoint.model.state_dict().items():
        if not isinstance(tensor, Tensor):
            # A module's extra state; the file's writer refuses what it cannot store.
            continue
        stored = checkpoint.stored.get(name)
        pieces = [tensor] if stored is None else list(stored.parts.values())
        for piece in pieces:
            # Tied tensors share memory, and their stored forms share parts.
            place = piece.data_ptr() if stored is None else id(piece)
            if piece.numel() and place not in seen:
                seen.add(place)
                total += piece.numel() * piece.element_size()
    return total
