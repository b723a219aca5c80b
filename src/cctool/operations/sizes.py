"""What a checkpoint costs, for its line of history."""

from __future__ import annotations

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import Size

__all__ = ["measure", "stored_bytes"]


def measure(checkpoint: Checkpoint) -> Size:
    """Count parameters, multiply-accumulates of one input and bytes of stored tensors."""
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return Size(parameters=parameters, bytes=stored_bytes(checkpoint))


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors as the file stores them, tied ones once, without names and headers."""
    total = 0
    seen: set[int] = set()
    for name, tensor in checkpoint.model.state_dict().items():
        stored = checkpoint.stored.get(name)
        pieces = [tensor] if stored is None else list(stored.parts.values())
        for piece in pieces:
            place = piece.data_ptr() if stored is None else id(piece)
            if piece.numel() and place not in seen:
                seen.add(place)
                total += piece.numel() * piece.element_size()
    return total
