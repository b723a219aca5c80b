"""Checks that a stored tensor's parts are what its encoding writes, before anything is decoded."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import DTYPES

__all__ = ["decoded_dtype", "floating_name", "part", "refuse_nonfinite", "require_parts"]


def decoded_dtype(encoded: EncodedTensor) -> torch.dtype:
    """Element type of the decoded tensor; CorruptCheckpointError unless it is floating point."""
    dtype = DTYPES.get(encoded.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise CorruptCheckpointError(f"{encoded.encoding}: cannot decode to element type {encoded.dtype!r}")
    return dtype


def require_parts(encoded: EncodedTensor, names: Collection[str]) -> None:
    """Raise CorruptCheckpointError unless ``encoded`` has exactly the parts ``names``."""
    if set(encoded.parts) != set(names):
        raise CorruptCheckpointError(
            f"{encoded.encoding}: has the parts {', '.join(sorted(encoded.parts)) or 'none'} "
            f"instead of {', '.join(sorted(names))}"
        )


def part(encoded: EncodedTensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One part; CorruptCheckpointError unless it has this element type and shape."""
    found = encoded.parts[name]
    if found.dtype != dtype or tuple(found.shape) != tuple(shape):
        raise CorruptCheckpointError(
            f"{encoded.encoding}: the part {name!r} is {found.dtype} {list(found.shape)} "
            f"instead of {dtype} {list(shape)}"
        )
    return found


def floating_name(tensor: Tensor, encoding: str) -> str:
    """Name of a tensor's element type, such as ``float32``.

    Raises:
        QuantizationError: if it is not a floating-point type that a checkpoint may hold.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if not tensor.is_floating_point() or name not in DTYPES:
        raise QuantizationError(f"{encoding} stores floating-point tensors only, not {name}")
    return name


def refuse_nonfinite(tensor: Tensor, encoding: str) -> None:
    """Raise QuantizationError if ``tensor`` holds a NaN or an infinity."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise QuantizationError(f"{encoding} cannot store {bad:,} NaN or infinite values of a tensor")
