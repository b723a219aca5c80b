"""Weights stored by codebooks, during and after training: the assignment stays, the entries move.

Which weights share an entry is read off their values: the network holds decoded values, so weights that are
equal share an entry. A resumed training, or one in other processes, needs only the weights to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cctool.base.errors import QuantizationError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import MemoryPlace, place
from cctool.operations.keep.encode import encode_under_mask, masks_by_place
from cctool.quantization.encodings.codebook import CODEBOOK
from cctool.quantization.encodings.masked import MASKED, Inner, inner_of
from cctool.training.constraints.base import Constraint
from cctool.training.constraints.shared_entries import KeepCodebooks, SharedWeights


def keeping_codebooks(checkpoint: Checkpoint) -> tuple[Constraint, ...]:
    """Constraints that keep weights storable by their codebooks; () if no weight is stored by one.

    Levels that follow a rule, such as sums of powers of two, cannot move one by one; their weights train
    freely. The model must hold the values of its stored forms, whose parts are not read.
    """
    masks = masks_by_place(checkpoint.model)
    parameters = dict(checkpoint.model.named_parameters())
    shared = []
    for name, inner in _movable(checkpoint.stored).items():
        parameter = parameters.get(name)
        if parameter is None:
            # Buffers do not train, and a tied parameter is listed once.
            continue
        entries = _entries(parameter.detach(), masks.get(place(parameter.detach())), inner)
        if entries is not None:
            shared.append(SharedWeights(parameter, entries))
    return (KeepCodebooks(shared),) if shared else ()


def codebooks_after(checkpoint: Checkpoint, earlier: Checkpoint) -> dict[str, EncodedTensor]:
    """Store weights by codebooks as ``earlier`` did, without rounding: their values become the tables.

    Args:
        checkpoint: dense, on any device, trained with `keeping_codebooks`.
        earlier: its stored forms say which weights; their parts are not read.

    Returns:
        Forms by name, without weights that trained without the constraint and have more distinct values
        than a table of their bits holds.
    """
    state, masks = checkpoint.model.state_dict(), masks_by_place(checkpoint.model)
    stored: dict[str, EncodedTensor] = {}
    made: dict[MemoryPlace, EncodedTensor | None] = {}
    for name, inner in _movable(earlier.stored).items():
        tensor: Tensor = state[name]
        at = place(tensor)
        if at not in made:
            made[at] = _distinct(tensor, masks.get(at), inner)
        form = made[at]
        if form is not None:
            stored[name] = form
    return stored


def _movable(stored: Mapping[str, EncodedTensor]) -> dict[str, Inner]:
    """Codebooks whose entries may move, by the tensor's name."""
    found = {}
    for name, form in stored.items():
        if form.encoding in (CODEBOOK.name, MASKED.name):
            inner = inner_of(form.encoding, form.parameters)
            if inner.encoding == CODEBOOK.name and inner.settings["kind"] != "apot":
                found[name] = inner
    return found


def _distinct(tensor: Tensor, mask: Tensor | None, inner: Inner) -> EncodedTensor | None:
    wanted = {"kind": "distinct", "bits": inner.settings["bits"], "axis": inner.axis}
    try:
        form = encode_under_mask(tensor.detach().cpu(), mask, CODEBOOK, wanted)
    except QuantizationError:
        return None
    # The form keeps the parameters of its first encoding, so that a later training knows its kind again.
    kept = {key: value for key, value in form.parameters.items() if key not in wanted}
    return replace(form, parameters={**kept, **inner.parameters})


def _entries(weight: Tensor, mask: Tensor | None, inner: Inner) -> Tensor | None:
    """For each weight the number of its entry, -1 if it is masked; None if tables hold fewer entries."""
    values, inverse = torch.unique(weight, return_inverse=True)
    if inner.axis is not None:
        # Each channel has its own table: equal values in two channels are two entries.
        sizes = [-1 if dim == inner.axis else 1 for dim in range(weight.dim())]
        channel = torch.arange(weight.shape[inner.axis], device=weight.device).view(sizes)
        _, inverse = torch.unique(inverse + channel * len(values), return_inverse=True)
    if mask is not None:
        inverse = inverse.masked_fill(mask.logical_not(), -1)
    tables = 1 if inner.axis is None else weight.shape[inner.axis]
    entries = int(torch.unique(inverse[inverse >= 0]).numel())
    return inverse if entries <= tables << int(str(inner.settings["bits"])) else None
