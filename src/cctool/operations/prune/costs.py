"""What a network costs, before and after a cut, and the counters that a target's search asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cctool.analysis.latency import Latency, compare, measure_latency
from cctool.base.copies import copied
from cctool.base.errors import ArchitectureError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.graph import cost
from cctool.operations.context import Context
from cctool.operations.prune.cut import forms_after, thin_copy
from cctool.operations.prune.stored_cut import cut_stored
from cctool.operations.size import measure, stored_bytes
from cctool.options.prune.options import PruneOptions
from cctool.options.target import Quantity
from cctool.pruning.cut.surgery import Cut, CutPlan, named_tensors
from cctool.pruning.select.targets import sketch
from cctool.quantization.network.attach import CONTAINER, quantizers_of, weight_key
from cctool.transforms.layers.base import swapped_layers
from cctool.transforms.plain import plain_model

__all__ = ["Costs", "Scales", "counter"]

_LARGEST_COPY = 256 * 2**20


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Attributes:
        parameters: scalar ones.
        macs: multiply-accumulates of one input; None where the network does not run on its input shape.
        bytes: of all tensors as they are stored.
        latency: of one input, measured; None where it does not run.
    """

    parameters: int
    macs: int | None
    bytes: int
    latency: Latency | None


class Scales:
    """Weighs networks against the one that a command was given, which it may keep a copy of.

    Args:
        checkpoint: that one; its model may be changed afterwards.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        size = measure(checkpoint)
        self._before = Costs(size.parameters, size.macs, size.bytes or 0, None)
        # Networks that take turns can be compared on a busy machine; a copy of a large one costs too much.
        tensors = (t for t in checkpoint.model.state_dict().values() if isinstance(t, Tensor))
        small = sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= _LARGEST_COPY
        self._dense = copied(checkpoint.model) if small else None
        if self._dense is None:
            self._before = replace(self._before, latency=_timed(checkpoint))

    def weigh(self, checkpoint: Checkpoint) -> tuple[Costs, Costs]:
        """Count and time a checkpoint's network where it lies; gives the first one's costs, and its own."""
        size = measure(checkpoint)
        after = Costs(size.parameters, size.macs, size.bytes or 0, None)
        if self._dense is None:
            return self._before, replace(after, latency=_timed(checkpoint))
        device = next((parameter.device for parameter in checkpoint.model.parameters()), torch.device("cpu"))
        try:
            pair = compare([self._dense.to(device), checkpoint.model], checkpoint.spec.input_shape)
        except ArchitectureError:
            return self._before, after
        return replace(self._before, latency=pair[0]), replace(after, latency=pair[1])


def _timed(checkpoint: Checkpoint) -> Latency | None:
    try:
        return measure_latency(checkpoint.model, checkpoint.spec.input_shape)
    except ArchitectureError:
        return None


def counter(
    quantity: Quantity, checkpoint: Checkpoint, options: PruneOptions, context: Context
) -> Callable[[CutPlan], float]:
    """Give the function that says what a checkpoint's network costs after a cut.

    Args:
        quantity: what is counted: multiply-accumulates of one input, parameters, bytes as stored, or
            microseconds of one input.
        checkpoint: before the cut.
        options: whether fine-tuning will store tensors dense that are only stored in few bits.
        context: knows the encodings.
    """
    model = checkpoint.model
    if quantity is Quantity.MACS:
        plain, shape = plain_model(model), checkpoint.spec.input_shape
        return lambda plan: float(cost.measure(sketch(plain, plan), shape).total.macs)
    if quantity is Quantity.PARAMS:
        narrowed = thin_copy if swapped_layers(model) else sketch
        return lambda plan: float(sum(p.numel() for p in narrowed(model, plan).parameters()))
    if quantity is Quantity.BYTES:
        dense = bool(options.finetune_epochs or options.rewind or options.from_scratch)
        held = quantizers_of(model)
        # Weights with quantizers are stored as these make them, fine-tuned or not.
        rounded = {} if held is None else held.state.weights
        stored = {
            name: form
            for name, form in checkpoint.stored.items()
            if not dense or options.keep_storage or name in rounded
        }
        return lambda plan: float(_bytes(checkpoint, stored, plan, context))
    return _latency_counter(checkpoint)


def _bytes(
    checkpoint: Checkpoint, stored: Mapping[str, EncodedTensor], plan: CutPlan, context: Context
) -> int:
    if swapped_layers(checkpoint.model):
        # What these layers store is cut by themselves: the plan says nothing of it.
        thin = thin_copy(checkpoint.model, plan)
        tensors = dict(named_tensors(checkpoint.model))
        forms, _ = forms_after(stored, tensors, thin, plan, context)
        return stored_bytes(replace(checkpoint, model=thin, stored=forms))
    seen: set[int] = set()
    total = 0
    small, scales = cut_stored(stored, plan, context), _cuts_of_scales(checkpoint, plan)
    for name, tensor in checkpoint.model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in small:
            for part in small[name].parts.values():
                if id(part) not in seen:
                    seen.add(id(part))
                    total += part.numel() * part.element_size()
            continue
        numbers = tensor.numel()
        of_scales = [c for c in scales.get(name.rpartition(".")[0], ()) if tensor.shape == (c.size,)]
        for cut in (*plan.tensors.get(name, ()), *of_scales):
            numbers = numbers // cut.size * cut.keep.numel()
        total += numbers * tensor.element_size()
    return total


def _cuts_of_scales(checkpoint: Checkpoint, plan: CutPlan) -> dict[str, tuple[Cut, ...]]:
    """What a plan takes of the tensors of quantizers that have an entry a channel, by the quantizers."""
    held = quantizers_of(checkpoint.model)
    return {
        f"{CONTAINER}.{weight_key(name)}": tuple(
            cut for cut in plan.tensors.get(name, ()) if cut.dim == point.config.axis
        )
        for name, point in ({} if held is None else held.state.weights).items()
    }


def _latency_counter(checkpoint: Checkpoint) -> Callable[[CutPlan], float]:
    """Time the cut network in turn with the dense one: the ratio stands where the machine's speed drifts."""
    model, shape = checkpoint.model, checkpoint.spec.input_shape
    before = 1000 * measure_latency(model, shape).milliseconds

    def microseconds(plan: CutPlan) -> float:
        if not plan.tensors:
            return before
        dense, cut = compare([model, thin_copy(model, plan)], shape)
        return before * cut.milliseconds / dense.milliseconds

    return microseconds
