"""What a network costs before and after a cut, and the counters for the search of a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from cctool.analysis.latency import Latency, compare, measure_latency
from cctool.base.errors import ArchitectureError
from cctool.base.networks import copied, device_of
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.graph import cost
from cctool.operations.context import Context
from cctool.operations.judge.size import measure, stored_bytes
from cctool.operations.keep import events
from cctool.operations.keep.events import thin_copy
from cctool.operations.keep.follower import sharing_copy
from cctool.options.prune.options import PruneOptions
from cctool.options.target import Quantity
from cctool.pruning.cut.surgery import CutPlan, sketch
from cctool.quantization.network.attach import quantizers_of
from cctool.transforms.layers.base import swapped_layers
from cctool.transforms.plain import plain_model

# Bytes of a network that may be copied to be timed.
_LARGEST_COPY = 256 * 2**20


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Attributes:
        parameters: number of scalar parameters.
        macs: multiply-accumulates of one input; None if the network does not run on its input shape.
        bytes: of all tensors as stored.
        latency: of one input, measured; None if it does not run.
    """

    parameters: int
    macs: int | None
    bytes: int
    latency: Latency | None


class Scales:
    """Compares the costs of networks with those of the command's input, which may be changed afterwards."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._before = _counted(checkpoint)
        # Networks that are timed in turns can be compared on a busy machine. A large one is not copied
        # for it, but timed once now.
        tensors = (t for t in checkpoint.model.state_dict().values() if isinstance(t, Tensor))
        small = sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= _LARGEST_COPY
        self._dense = copied(checkpoint.model) if small else None
        if self._dense is None:
            self._before = replace(self._before, latency=_timed(checkpoint))

    def weigh(self, checkpoint: Checkpoint) -> tuple[Costs, Costs]:
        """Count and time a checkpoint's network on its device; returns the input's costs and its own."""
        after = _counted(checkpoint)
        if self._dense is None:
            return self._before, replace(after, latency=_timed(checkpoint))
        dense = self._dense.to(device_of(checkpoint.model))
        try:
            pair = compare([dense, checkpoint.model], checkpoint.spec.input_shape)
        except ArchitectureError:
            return self._before, after
        return replace(self._before, latency=pair[0]), replace(after, latency=pair[1])


def _counted(checkpoint: Checkpoint) -> Costs:
    size = measure(checkpoint)
    return Costs(size.parameters, size.macs, size.bytes or 0, None)


def _timed(checkpoint: Checkpoint) -> Latency | None:
    try:
        return measure_latency(checkpoint.model, checkpoint.spec.input_shape)
    except ArchitectureError:
        return None


def counter(
    quantity: Quantity, checkpoint: Checkpoint, options: PruneOptions, context: Context
) -> Callable[[CutPlan], float]:
    """A function from a cut to what the checkpoint's network costs after it.

    Counted are multiply-accumulates of one input, parameters, bytes as stored, or microseconds of one input.
    Bytes depend on the options: fine-tuning stores encoded tensors dense.
    """
    model = checkpoint.model
    if quantity is Quantity.MACS:
        # Multiply-accumulates are those of ordinary layers; a sketch cuts their tensors as views.
        plain, shape = plain_model(model), checkpoint.spec.input_shape
        return lambda plan: float(cost.measure(sketch(plain, plan), shape).total.macs)
    if quantity is Quantity.PARAMS:
        # Swapped layers decide themselves what they store after a cut, which takes a real one.
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
        counted = replace(checkpoint, stored=stored, resume=None)
        return lambda plan: float(_bytes(counted, plan, context))
    return _latency_counter(checkpoint)


def _bytes(checkpoint: Checkpoint, plan: CutPlan, context: Context) -> int:
    """Stored bytes of a cut copy, which shares all tensors that are not cut."""
    copy = replace(checkpoint, model=sharing_copy(checkpoint.model))
    return stored_bytes(events.cut(copy, plan, context).checkpoint)


def _latency_counter(checkpoint: Checkpoint) -> Callable[[CutPlan], float]:
    """Time the cut network in turns with the dense one; the ratio does not drift with the machine's speed."""
    model, shape = checkpoint.model, checkpoint.spec.input_shape
    before = 1000 * measure_latency(model, shape).milliseconds

    def microseconds(plan: CutPlan) -> float:
        if not plan.tensors:
            return before
        dense, cut = compare([model, thin_copy(model, plan)], shape)
        return before * cut.milliseconds / dense.milliseconds

    return microseconds
