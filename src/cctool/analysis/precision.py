"""Bit widths of a network's layers, and the layers that the tensors of quantizers belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.quantization.encodings.masked import inner_form
from cctool.quantization.network.attach import CONTAINER, quantizers_of
from cctool.quantization.network.points import activation_key, weight_key

_FIXED_BITS = {"fp16": 16, "bf16": 16, "affine-u8": 8}
_MASKED = "masked"


@dataclass(frozen=True)
class BitWidths:
    """Bits of one layer; None for values in floating point.

    Attributes:
        weight_bits: of its weights, the most if they differ, as rounded by a quantizer or as stored.
        input_bits: of its inputs, if a quantizer of this layer rounds them.
        output_bits: of its outputs, likewise.
    """

    weight_bits: int | None = None
    input_bits: int | None = None
    output_bits: int | None = None

    def __or__(self, other: BitWidths) -> BitWidths:
        return BitWidths(
            _most(self.weight_bits, other.weight_bits),
            _most(self.input_bits, other.input_bits),
            _most(self.output_bits, other.output_bits),
        )


def precisions(checkpoint: Checkpoint) -> dict[str, BitWidths]:
    """Bits by qualified name, of the modules where weights, inputs or outputs are quantized."""
    found: dict[str, BitWidths] = {}

    def note(module: str, precision: BitWidths) -> None:
        found[module] = found.get(module, BitWidths()) | precision

    for name, encoded in checkpoint.stored.items():
        bits = _stored_bits(encoded)
        # Vectors (biases, norms) are no weights of the layer in this table.
        if bits is not None and len(encoded.shape) > 1:
            note(name.rpartition(".")[0], BitWidths(weight_bits=bits))
    held = quantizers_of(checkpoint.model)
    if held is not None:
        for name, weight in held.state.weights.items():
            module = name.rpartition(".")[0]
            note(module, BitWidths(weight_bits=weight.config.effective_bits))
        for place, call in held.state.calls.items():
            if call.input is not None:
                note(place.module, BitWidths(input_bits=call.input.bits))
            if call.output is not None:
                note(place.module, BitWidths(output_bits=call.output.bits))
    return found


def owners_of_quantizers(model: nn.Module) -> Mapping[str, str]:
    """Qualified names of quantizers -> those of the modules whose weights and calls they quantize."""
    held = quantizers_of(model)
    if held is None:
        return {}
    weights = {weight_key(name): name.rpartition(".")[0] for name in held.state.weights}
    calls = {
        activation_key(place, slot): place.module
        for place in held.state.calls
        for slot in ("input", "output")
    }
    return {f"{CONTAINER}.{key}": module for key, module in (weights | calls).items()}


def _stored_bits(encoded: EncodedTensor) -> int | None:
    form = inner_form(encoded) if encoded.encoding == _MASKED else encoded
    if form is None:
        return None
    bits = form.parameters.get("bits")
    return bits if isinstance(bits, int) else _FIXED_BITS.get(form.encoding)


def _most(first: int | None, second: int | None) -> int | None:
    known = [bits for bits in (first, second) if bits is not None]
    return max(known, default=None)
