"""Encode tensors for a file: under a mask, and on the grid of a quantizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from cctool.base.networks import in_eval_mode
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import masked_places, masks_of
from cctool.checkpoint.encoding import EncodedTensor, Encoding
from cctool.checkpoint.file.payload import MemoryPlace, fingerprint_of, place
from cctool.checkpoint.tables import Tables
from cctool.quantization.encodings.codebook import encode_codebook
from cctool.quantization.encodings.intn import encode_integers
from cctool.quantization.encodings.masked import encode_masked, inner_of
from cctool.quantization.network.attach import norm_factors, quantizers_of
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.points import WeightPoint, weight_key
from cctool.quantization.quantizers.base import Quantizer

# Of a stored integer; weights with more are stored dense.
_MOST_BITS = 8


def names_by_place(model: nn.Module) -> dict[MemoryPlace, list[str]]:
    """Names in the state dict by the tensor's place in memory, so that a tied tensor has all its names."""
    names: dict[MemoryPlace, list[str]] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            names.setdefault(place(value), []).append(name)
    return names


def masks_by_place(model: nn.Module) -> dict[MemoryPlace, Tensor]:
    """Masks by their parameter's place in memory, which is one for all names of a tied parameter."""
    return {place(masked.parameter.detach()): masked.mask for masked in masked_places(model)}


def encode_under_mask(
    tensor: Tensor, mask: Tensor | None, encoding: Encoding, parameters: Mapping[str, JsonValue]
) -> EncodedTensor:
    """Encode a tensor; what its mask takes away stays exactly zero.

    Args:
        tensor: on the CPU.
        mask: bool of the same shape, True for what stays; None for an unmasked tensor.
        encoding: of the whole tensor, or of the values that the mask leaves.
        parameters: of that encoding, for the whole tensor.

    Raises:
        QuantizationError: if the encoding cannot store it.
    """
    if mask is None:
        return encoding.encode(tensor, parameters)
    return encode_masked(tensor, mask, inner_of(encoding.name, parameters))


def settled(checkpoint: Checkpoint, tables: Tables, *, settle: bool = True) -> Checkpoint:
    """The checkpoint whose weights with quantizers are stored as integers.

    During training weights are floats that quantizers round in every pass. Stored are the rounded values,
    which the quantizers map to the same results. With ``settle`` the model's weights get these values;
    without it only weights that already have them are stored as integers.
    """
    model = checkpoint.model
    if quantizers_of(model) is None:
        return checkpoint
    stored = dict(checkpoint.stored)
    names, masks = names_by_place(model), masks_of(model)
    for name, tensor, quantizer, fold in quantized_weights(model):
        values = tensor.detach()
        form = _encoded(values, quantizer, fold)
        if form is None:
            continue
        decoded = tables.encodings[form.encoding].decode(form).to(values.device)
        mask = masks.get(name)
        if mask is not None:
            # Zeros of the mask are stored apart, and need not be on the grid.
            decoded = decoded * mask
            form = form if quantizer.config.method in ("uniform", "lsq", "wrpn", "apot") else None
        if not _same(quantizer, values, decoded, fold, mask):
            # The rounded values would give other results: the weight stays as it is.
            continue
        if settle:
            with torch.no_grad():
                tensor.copy_(decoded)
        if form is not None and form.nbytes > values.numel() * values.element_size():
            # Of few values, beside which the scales count: the rounded values themselves take fewer bytes.
            form = None
        if form is not None and torch.equal(tensor.detach(), decoded):
            # A tied weight has one form under all of its names.
            stored |= dict.fromkeys(names.get(place(tensor.detach()), [name]), form)
        elif settle:
            for alias in names.get(place(tensor.detach()), [name]):
                stored.pop(alias, None)
    return replace(checkpoint, stored=stored)


def in_step(checkpoint: Checkpoint, tables: Tables) -> Checkpoint:
    """Settle the weights, and record that the quantizers' ranges belong to them."""
    held = quantizers_of(checkpoint.model)
    if held is None:
        return checkpoint
    checkpoint = settled(checkpoint, tables)
    held.state.fingerprint = fingerprint_of(checkpoint.model)
    return replace(checkpoint, spec=with_quantizers(checkpoint.spec, checkpoint.model))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Quantizer, Tensor | None]]:
    """Name, parameter, quantizer and fold of each quantized weight that is a parameter itself.

    The fold is the batch norm's factor for each output channel (O,), by which the weight is multiplied before
    it is rounded; None for none.
    """
    held = quantizers_of(model)
    if held is None:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, point in held.state.weights.items():
        quantizer, parameter = held.quantizer(weight_key(name)), parameters.get(name)
        if quantizer is not None and parameter is not None:
            yield name, parameter, quantizer, _fold(model, point)


def computed_weights(model: nn.Module) -> dict[str, Quantizer]:
    """Quantizers of weights that are no parameters, by name: the file has what these are computed from."""
    held = quantizers_of(model)
    if held is None:
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: held.quantizer(weight_key(name)) for name in held.state.weights if name not in parameters}
    return {name: quantizer for name, quantizer in found.items() if quantizer is not None}


def _fold(model: nn.Module, point: WeightPoint) -> Tensor | None:
    # With a scale for each channel the norm's factor goes into the scale after rounding, exactly.
    if point.norm is None or point.config.axis is not None:
        return None
    return norm_factors(model.get_submodule(point.norm))


def _encoded(values: Tensor, quantizer: Quantizer, fold: Tensor | None) -> EncodedTensor | None:
    """The weight as integers or table entries; None if its quantizer has no form of few bits."""
    config = quantizer.config
    if config.bits > _MOST_BITS or not values.numel():
        return None
    grid = quantizer.grid()
    if grid is None or config.method not in ("uniform", "lsq", "wrpn"):
        indices, table = quantizer.levels(values, fold)
        return encode_codebook(indices, table, axis=config.axis if table.dim() == 2 else None)
    scale, zero, axis = grid.scale, grid.zero_point, grid.axis
    if fold is None:
        integers = grid.integers(values)
    else:
        # A factor of zero silences its channel whatever the weights are; 1 avoids dividing by it.
        factor = torch.where(fold == 0, torch.ones_like(fold), fold).float()
        shape = [-1] + [1] * (values.dim() - 1)
        integers = grid.integers(values * factor.view(shape))
        # A negative factor mirrors the channel's integers at the zero point; scales are positive.
        turned = (factor < 0).view(shape)
        middle = 2 * zero if zero.dim() else int(2 * zero)
        integers = torch.where(turned, middle - integers, integers)
        scale, axis = scale / factor.abs(), 0
        zero = zero.expand(len(factor))
    bits = config.effective_bits
    if config.symmetric:
        low = -(2 ** (bits - 1))
        if bool((integers < low).any()) or bool((integers > -low - 1).any()):
            return None
        return encode_integers(integers, scale, bits=bits, axis=axis)
    return encode_integers(integers - grid.low, scale, zero - grid.low, bits=bits, axis=axis)


def _same(
    quantizer: Quantizer, before: Tensor, after: Tensor, fold: Tensor | None, mask: Tensor | None
) -> bool:
    """Whether the quantizer gives the same values for the replaced weight."""
    with torch.no_grad(), in_eval_mode(quantizer):
        old, new = quantizer(before, fold), quantizer(after, fold)
    if mask is not None:
        old, new = old * mask, new * mask
    return torch.equal(old, new)
