"""Which memory is the device's: a mark on a tensor's storage, which views, `.data` and `detach` share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
EITHER = "either"
"""The mark of what torch's C++ code makes inside an operator like a tensor that it takes for the CPU's."""

_MARK = "_pretended_device"


def cannot(reason: str) -> None:
    """Skip the running test: what it does is not pretended."""
    pytest.skip(f"the pretended CUDA device has no {reason}")


def mark_of(tensor: Tensor) -> object:
    """`CUDA`, `EITHER`, or None for the CPU's; call it with torch functions disabled."""
    storage = _storage(tensor)
    return None if storage is None else storage.__dict__.get(_MARK)


def mark(tensor: Tensor, to: object) -> None:
    """Give a tensor's memory to a device: `CUDA`, `EITHER`, or None for the CPU."""
    storage = _storage(tensor)
    if storage is not None:
        storage.__dict__[_MARK] = to


def storage_is_marked(storage: Any) -> bool:
    """Whether a storage is the device's."""
    return getattr(getattr(storage, "_untyped_storage", storage), "__dict__", {}).get(_MARK) is CUDA


def mark_storage(storage: Any) -> None:
    """Give a storage to the device."""
    getattr(storage, "_untyped_storage", storage).__dict__[_MARK] = CUDA


def is_device(tensor: Tensor) -> bool:
    """Whether a tensor is on the device."""
    with torch._C.DisableTorchFunction():
        return mark_of(tensor) is CUDA


def _storage(tensor: Tensor) -> Any:
    # Sparse tensors have none; those of other devices (meta) are never the device's.
    plain = tensor.layout is torch.strided and torch._C.TensorBase.is_cpu.__get__(tensor)
    return tensor.untyped_storage() if plain else None
