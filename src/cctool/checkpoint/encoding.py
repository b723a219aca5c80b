"""How one tensor is stored in a file: an encoding, its parameters and its parts.

Encodings belong to the file and not to the module, which always computes with the decoded tensor. The methods
themselves are in higher layers (`quantization/encodings/table.py`) and are passed in by `Tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue
from torch import Tensor


@dataclass(frozen=True)
class EncodedTensor:
    """A tensor as it is stored.

    Attributes:
        encoding: name in `Tables.encodings`.
        shape: of the decoded tensor.
        dtype: of the decoded tensor, such as ``float32``.
        parts: the stored tensors by name (integers, scales, ...), on the CPU.
        parameters: what encoding again with the same settings needs.
    """

    encoding: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, Tensor]
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


@dataclass(frozen=True)
class Encoding:
    """One way to store a tensor.

    Attributes:
        name: as files hold it.
        encode: (tensor, parameters) -> EncodedTensor.
        decode: EncodedTensor -> tensor of its shape and dtype. Raises CorruptCheckpointError if the parts
            contradict the shape, before it allocates more than the shape says.
        take: (encoded, dim, indices) -> the encoded tensor with only these indices of one dimension, so
            that pruning cuts the stored integers and scales and does not quantize a second time.
    """

    name: str
    encode: Callable[[Tensor, Mapping[str, JsonValue]], EncodedTensor]
    decode: Callable[[EncodedTensor], Tensor]
    take: Callable[[EncodedTensor, int, Tensor], EncodedTensor]
