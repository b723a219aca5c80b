"""The network that `cctool export` converts instead of the checkpoint's own, and notes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from cctool.base.errors import ExportError
from cctool.base.networks import several, some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.data import example
from cctool.operations.keep.encode import computed_weights
from cctool.operations.keep.events import plain_checkpoint
from cctool.options.inspect.export import ExportFormat
from cctool.quantization.export import network as export
from cctool.quantization.export.integer_weights import IntegerWeight, from_stored
from cctool.quantization.export.network import export_network, made_weights, rounding_network, with_weights
from cctool.quantization.network.attach import quantizers_of
from cctool.transforms.layers.base import swapped_layers
from cctool.transforms.plain import exportable, plain_model


@dataclass(frozen=True, eq=False)
class Converted:
    """A network of operations that other programs know.

    Attributes:
        network: None if it is the checkpoint's model itself.
        weights: of the network, to be written as integers.
        notes: for the report.
    """

    network: nn.Module | None
    weights: tuple[IntegerWeight, ...] = ()
    notes: tuple[str, ...] = ()


def converted(checkpoint: Checkpoint, kind: ExportFormat, *, codec: bool) -> Converted:
    """The network to convert to ``kind``, ONNX or PT2; the checkpoint's model is moved to the CPU.

    With ``codec`` it codes the maps of its taps.

    Raises:
        ExportError: if a layer computes with complex numbers.
    """
    model = checkpoint.model.cpu()
    strange = swapped_layers(plain_model(model))
    if strange:
        raise ExportError(
            f"{min(strange)} computes with complex numbers, which {kind} has no layers for; "
            "--format state-dict or safetensors writes its parameters"
        )
    held = quantizers_of(model)
    # Quantized weights are not written as products of factors: their quantizers act on the whole weight.
    whole = {name.rpartition(".")[0] for name in ({} if held is None else held.state.weights)}
    network = exportable(model, codec=codec, whole=whole)
    if kind is ExportFormat.ONNX:
        stored, notes = _stored(checkpoint)
        if held is not None or stored:
            made = export_network(network, example(checkpoint), stored)
            notes += tuple(f"{left.name} stays in floating point: {left.reason}" for left in made.left)
            return Converted(made.model, made.weights, notes)
        return Converted(None if network is model else network, notes=notes)
    if held is not None:
        network = rounding_network(network, example(checkpoint))
    return Converted(None if network is model else network)


def _stored(checkpoint: Checkpoint) -> tuple[dict[str, IntegerWeight], tuple[str, ...]]:
    """Weights that are stored as integers which decode to the model's values bit for bit; and notes."""
    tensors: Mapping[str, object] = checkpoint.model.state_dict()
    held = quantizers_of(checkpoint.model)
    found, others = {}, []
    for name, form in checkpoint.stored.items():
        if held is not None and name in held.state.weights:
            # Its quantizer gives the integers.
            continue
        weight, tensor = from_stored(name, form), tensors.get(name)
        if not isinstance(tensor, torch.Tensor):
            continue
        if weight is not None and torch.equal(weight.values(), tensor.cpu()):
            found[name] = weight
        elif tensor.is_floating_point():
            others.append(name)
    if not others:
        return found, ()
    return found, (
        f"{some(others)} are stored small in a way that ONNX has no integers for: they are written in "
        "floating point",
    )


def bare_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint of the plain network, whose weights have the values that quantizers give."""
    plain = plain_checkpoint(checkpoint)
    if quantizers_of(checkpoint.model) is None:
        return plain
    computed = export.computed_weights(checkpoint.model, example(checkpoint))
    made = {name: value for name, value in made_weights(checkpoint.model).items() if name not in computed}
    return replace(plain, model=with_weights(plain.model, made)) if made else plain


def quantizer_notes(checkpoint: Checkpoint, kind: ExportFormat) -> tuple[str, ...]:
    """Notes on what became of quantizers."""
    held = quantizers_of(checkpoint.model)
    if held is None:
        return ()
    weights, activations = len(held.state.weights), len(held.activation_keys)
    if kind is ExportFormat.ONNX:
        return ()
    if kind is ExportFormat.PT2:
        return (f"quantized: {several(weights, 'weight')} and {several(activations, 'activation')}",)
    computed = len(computed_weights(checkpoint.model))
    found = [f"written as quantizers make them: {several(weights - computed, 'weight')}"]
    if computed:
        found.append(
            f"not so: {several(computed, 'weight')} computed on the way to the call; the file has what it is "
            "made of, in floating point"
        )
    if activations:
        found.append(f"in floating point here, quantized in the network: {several(activations, 'tensor')}")
    return tuple(found)
