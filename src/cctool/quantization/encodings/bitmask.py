"""Booleans as bits: element 8 j + i in C order is bit i (value 2^i) of byte j; padding bits are zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.quantization.encodings.parts import part, require_parts, whole_shape

_BITS = "bits"


def pack_bits(mask: Tensor) -> Tensor:
    """Pack booleans of any shape, eight per byte; uint8 of shape (ceil(elements / 8),), on the CPU.

    >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True])).tolist()
    [5, 1]
    """
    flat = mask.detach().cpu().contiguous().reshape(-1)
    return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))


def unpack_bits(encoded: EncodedTensor) -> Tensor:
    """The booleans in the part ``bits`` of an encoded tensor, in the tensor's shape.

    Raises:
        CorruptCheckpointError: if the number of bytes does not match the shape, or padding is not zero.
    """
    count = math.prod(encoded.shape)
    packed = part(encoded, _BITS, torch.uint8, (-(-count // 8),))
    if count % 8 and int(packed[-1]) >> count % 8:
        raise CorruptCheckpointError(f"{encoded.encoding}: the bits that fill up the last byte are not zero")
    flat = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return whole_shape(encoded, torch.from_numpy(flat.view(np.bool_)))


def _encode(tensor: Tensor, parameters: Mapping[str, JsonValue]) -> EncodedTensor:
    if tensor.dtype != torch.bool:
        raise QuantizationError(f"bits stores booleans only, not {str(tensor.dtype).removeprefix('torch.')}")
    return EncodedTensor("bits", tuple(tensor.shape), "bool", {_BITS: pack_bits(tensor)})


def _decode(encoded: EncodedTensor) -> Tensor:
    if encoded.dtype != "bool" or encoded.parameters:
        raise CorruptCheckpointError(f"bits: cannot decode to {encoded.dtype!r} {dict(encoded.parameters)}")
    require_parts(encoded, {_BITS})
    return unpack_bits(encoded)


def _take(encoded: EncodedTensor, dim: int, indices: Tensor) -> EncodedTensor:
    mask = unpack_bits(encoded).index_select(dim, indices.cpu())
    return replace(encoded, shape=tuple(mask.shape), parts={_BITS: pack_bits(mask)})


BITS = Encoding("bits", _encode, _decode, _take)
