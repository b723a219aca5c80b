"""Which weights a network has, as one number: what was calibrated for others is out of step."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from torch import Tensor, nn

from cctool.base.networks import companion_tensors
from cctool.checkpoint.file.payload import as_bytes

__all__ = ["fingerprint_of"]


def fingerprint_of(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over a network's tensors and their names.

    Args:
        model: any network; its companions are left out.
        without: names in the state dict that are left out, too.
    """
    ours = {*without, *companion_tensors(model)}
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and name not in ours:
            hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            hashed.update(as_bytes(tensor))
    return hashed.hexdigest()
