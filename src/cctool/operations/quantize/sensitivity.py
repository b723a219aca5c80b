"""The bits of each layer, chosen by how much the outputs change if this layer alone is quantized.

The damage of a layer at a number of bits is the divergence of the network's outputs from those in floating
point, on training images, as its task defines it: for classes the mean Kullback-Leibler divergence of the
predictions, for other outputs the mean squared error relative to the mean square. Weights are rounded to
nearest for it, and activations are not quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from cctool.base.errors import QuantizationError, UsageError
from cctool.base.networks import copied, in_eval_mode, several, some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.computed import computed_layers
from cctool.data.records import DataSource
from cctool.operations.context import Context
from cctool.operations.data import measured
from cctool.operations.judge.budget import BudgetScale, budget_scale
from cctool.operations.judge.size import stored_bytes
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.operations.keep.calibrate import calibration_images
from cctool.operations.keep.encode import quantized_weights
from cctool.operations.quantize.allocate_bits import (
    Assignment,
    LayerChoice,
    cheapest,
    fewest_bytes,
    frontier,
)
from cctool.operations.quantize.plan import Plan, attach_plan, fixed_bits, plan
from cctool.operations.quantize.prepare import attached, calibrated, fit_weights, observing
from cctool.operations.quantize.report import SensitivityReport
from cctool.operations.quantize.stored import encoded_directly
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.target import Target
from cctool.quantization.network.attach import detach, held_by, only
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.points import weight_key
from cctool.tasks.base import Task

_KEPT = "what a weight is computed from stays in floating point whatever its bits"
_MOST_IMAGES = 256
"""Images that damages are measured on, few because each choice of each layer needs a pass over them."""


def searched_bits(
    product: Checkpoint, options: QuantizeOptions, source: DataSource | None, context: Context
) -> tuple[dict[str, int], tuple[SensitivityReport, ...], list[str]]:
    """Choose the bits of each layer, for ``--target`` or ``--max-drop``.

    Layers whose bits are given (by ``--layer``, or as a first or last layer with ``--edges 8``) keep them.
    ``product`` is in floating point on the device, and is not changed. Damages are measured on training
    images, the drop on validation images.

    Returns:
        Bits by the weight's name, the damages that they were chosen from, and notes.

    Raises:
        UsageError: if the data lack images that are needed.
        QuantizationError: if the goal cannot be reached, or there is no layer whose bits can be chosen.
    """
    planned = plan(product, options)
    names = [
        layer.weight
        for layer in planned.layers
        if fixed_bits(layer, options) is None and layer.weight not in planned.kernels
    ]
    if source is None:
        raise UsageError("--target and --max-drop look at images: name a data set with --data")
    floats = any(layer.varies for layer in planned.points.layers)
    # A target may be kept without any choice.
    if not names and not (options.target is not None and (planned.kernels or floats)):
        rest = "they are computed or stay in floating point" if floats else "they are computed"
        why = f"their bits are given, or {rest}" if planned.kernels or floats else "all of them are given"
        raise QuantizationError(
            f"there is no layer whose bits can be chosen: {why}{_in_floats(product, planned)}"
        )
    tried = sorted(set(options.choices))
    sizes, others = _sizes(product, options, names, tried, context)
    wanted = min(options.calibration.images, _MOST_IMAGES)
    images, used = calibration_images(product, source, wanted, options.data, context)
    damages = _damages(product, options, names, tried, list(images), context)
    choices = [
        LayerChoice(name, bits, damages[name, bits], sizes[name, bits]) for name in names for bits in tried
    ]
    notes = []
    if names:
        of, on = several(len(names), "layer"), several(used, "training image")
        notes.append(f"damages of {of} were measured on {on}")
    if planned.kernels:
        kept = several(len(planned.kernels), "computed weight")
        notes.append(f"no bits were chosen for {kept}: {_KEPT}")
    if options.target is not None:
        found, note = _within_target(choices, others, product, options.target, planned)
    else:
        found, note = _within_drop(choices, product, options, source, context)
    report = tuple(
        SensitivityReport(c.layer, c.bits, c.damage, c.bytes, chosen=found.bits[c.layer] == c.bits)
        for c in choices
    )
    return dict(found.bits), report, [*notes, note]


def _sizes(
    product: Checkpoint,
    options: QuantizeOptions,
    names: Sequence[str],
    tried: Sequence[int],
    context: Context,
) -> tuple[dict[tuple[str, int], int], int]:
    """Bytes in a file by weight and bits, and bytes of everything that does not depend on the choice."""
    weights: dict[tuple[str, int], int] = {}
    others = 0
    for bits in tried:
        # On the CPU, where products are encoded.
        trial = replace(product, model=copied(product.model).cpu())
        planned = plan(trial, options, dict.fromkeys(names, bits))
        trial = attached(trial, planned)
        trial = events.stored(trial, context.tables)
        dense = dict(trial.model.named_parameters(remove_duplicate=False))
        for name in names:
            form = trial.stored.get(name)
            # What a computed weight is made of takes the same bytes whatever its bits.
            parts = list(form.parts.values()) if form is not None else [dense[name]] if name in dense else []
            weights[name, bits] = sum(part.numel() * part.element_size() for part in parts)
        if not options.activations:
            # The product then has no quantizers, whose scales would be counted here, and other tensors are
            # stored in few bits, too.
            done = {name for name in held_by(trial.model).state.weights if name in dense}
            detach(trial.model)
            trial, _, _ = encoded_directly(
                trial, product, options, context, done=done, left=[item.name for item in planned.left]
            )
        others = stored_bytes(trial) - sum(weights[name, bits] for name in names)
    return weights, others


@torch.no_grad()
def _damages(
    product: Checkpoint,
    options: QuantizeOptions,
    names: Sequence[str],
    tried: Sequence[int],
    images: Sequence[Tensor],
    context: Context,
) -> dict[tuple[str, int], float]:
    """Damage by weight and bits; quantizers are attached for it and removed again."""
    model, task = product.model, judge_of(product, context).task
    found: dict[tuple[str, int], float] = {}
    # All layers of one number of bits in a row: attaching quantizers costs more than switching them on.
    pairs = [(bits, name) for bits in tried for name in names]
    present = 0
    with in_eval_mode(model):
        try:
            wanted = [[tensor.cpu() for tensor in _outputs(model, batch, task)] for batch in images]
            for bits, name in context.reporter.progress(pairs, "measuring layers", len(pairs)):
                if bits != present:
                    _attach_weights(product, options, names, bits)
                    present = bits
                with only(model, {weight_key(name)}), _stored_rounded(model, name):
                    found[name, bits] = _mean_damage(model, images, wanted, task)
                _refuse_no_number(found[name, bits], name, bits, wanted)
        finally:
            detach(model)
    return found


def _refuse_no_number(damage: float, name: str, bits: int, wanted: Iterable[Sequence[Tensor]]) -> None:
    if math.isfinite(damage):
        return
    # Before any layer is quantized, or only then.
    whole = all(bool(tensor.isfinite().all()) for outputs in wanted for tensor in outputs)
    which = f"with {name} at {bits} bits" if whole else "already before it is quantized"
    raise QuantizationError(
        f"the network puts out NaN or infinities {which}: how much damage a choice of bits does cannot be "
        "measured; name the bits with --bits or --layer"
    )


@contextmanager
def _stored_rounded(model: nn.Module, name: str) -> Iterator[None]:
    """Round a parameter in place whose quantizer acts at no call, because the weight is computed from it."""
    calls = held_by(model).state.calls.values()
    if any(point.weight == name for point in calls):
        yield
        return
    for found, parameter, quantizer, fold in quantized_weights(model):
        if found == name:
            before = parameter.detach().clone()
            parameter.copy_(quantizer(parameter, fold))
            try:
                yield
            finally:
                parameter.copy_(before)


def _attach_weights(product: Checkpoint, options: QuantizeOptions, names: Sequence[str], bits: int) -> None:
    """Attach weight quantizers of these bits, replacing all that are attached."""
    model = product.model
    detach(model)
    planned = plan(product, options, dict.fromkeys(names, bits))
    attach_plan(model, replace(planned, activations={}))
    fit_weights(model, planned)


def _outputs(model: nn.Module, batch: Tensor, task: Task) -> list[Tensor]:
    """The outputs that are compared."""
    found = task.compared(model(batch))
    if not found:
        raise QuantizationError("the network puts out no floating-point tensor to compare")
    return found


def _mean_damage(
    model: nn.Module, images: Iterable[Tensor], wanted: Iterable[Sequence[Tensor]], task: Task
) -> float:
    total, seen = 0.0, 0
    for batch, outputs in zip(images, wanted, strict=True):
        there = [tensor.to(batch.device) for tensor in outputs]
        total += task.divergence(_outputs(model, batch, task), there) * len(batch)
        seen += len(batch)
    return total / max(seen, 1)


def _within_target(
    choices: Sequence[LayerChoice], others: int, product: Checkpoint, target: Target, planned: Plan
) -> tuple[Assignment, str]:
    whole = stored_bytes(product)
    limit = int(target.value * whole if target.relative else target.value)
    smallest = frontier(choices)[0].bytes
    if smallest + others > limit:
        share = math.ceil((smallest + others) / whole * 1000) / 1000
        parts = f"the weights that have bits to choose take {smallest:,} bytes, everything else {others:,}: "
        raise QuantizationError(
            f"--target {target}: {limit:,} of {whole:,} bytes cannot be reached. "
            + (f"With the fewest bits of --choices {parts}" if choices else "No weight has bits to choose: ")
            # Rounded up, so that this share can be reached.
            + f"{smallest + others:,} bytes (bytes={share:g}) at least{_in_floats(product, planned)}"
        )
    found = cheapest(choices, limit - others)
    return found, (
        f"--target {target}: {found.bytes + others:,} of {limit:,} bytes, {others:,} of them for "
        "what has no bits to choose"
    )


def _in_floats(product: Checkpoint, planned: Plan) -> str:
    """What has no bits to choose because it stays in floating point, and how it would take fewer bytes."""
    state, made_of = product.model.state_dict(), set[str]()
    for name in planned.kernels:
        made_of.update(planned.weights[name].made_of)
    # The last of them are buffers that calls take as they are.
    floats = made_of.intersection(state) - planned.weights.keys() | (planned.kernels.keys() & state.keys())
    size = sum(state[name].numel() * state[name].element_size() for name in floats)
    # A loop calls one layer several times.
    found = list(
        dict.fromkeys(
            f". {layer.place.title} stays in floating point: {layer.varies}"
            for layer in planned.points.layers
            if layer.varies
        )
    )
    if size:
        found.append(
            f". {size:,} bytes are what kernels are computed from ({several(len(floats), 'tensor')}), which "
            "stays in floating point; --weight-only stores weights in few bits instead"
        )
        if bakes := computed_layers(product.model):
            found.append(f", and `cctool transform --fold` makes {some(list(bakes))} ordinary layers")
    return "".join(found)


def _within_drop(
    choices: Sequence[LayerChoice],
    product: Checkpoint,
    options: QuantizeOptions,
    source: DataSource,
    context: Context,
) -> tuple[Assignment, str]:
    if "validation" not in source.loaders:
        raise UsageError(
            "--max-drop searches on the validation split: the data has none (--val-data names one)"
        )
    assert options.max_drop is not None
    before = measured(product, source, options.data, context, split="validation")
    scale = budget_scale(product, options.max_drop, (before,), context)
    drop = _drop(product, options, source, scale, context)
    found, trials = fewest_bytes(choices, drop, scale.allowed, scale.sentence)
    reached = next(trial for trial in trials if trial.assignment is found)
    return found, (
        f"{len(trials)} assignments of bits were measured on the validation split; the chosen one loses "
        f"{scale.part(reached.drop)}"
    )


def _drop(
    product: Checkpoint, options: QuantizeOptions, source: DataSource, scale: BudgetScale, context: Context
) -> Callable[[Assignment], float]:
    """A function that measures what validation loses, activations quantized as in the product."""

    def drop(assignment: Assignment) -> float:
        trial = replace(product, model=copied(product.model))
        planned = plan(trial, options, assignment.bits)
        trial = attached(trial, planned)
        if planned.activations:
            images, _ = calibration_images(trial, source, options.calibration.images, options.data, context)
            calibrated(trial.model, planned, images, observing(options))
            trial = replace(trial, spec=with_quantizers(trial.spec, trial.model))
        after = measured(trial, source, options.data, context, split="validation")
        lost = scale.lost(scale.value(after))
        context.reporter.note(f"{assignment.bytes:,} bytes: {scale.change(lost)} (n={after.n:,})")
        return lost

    return drop
