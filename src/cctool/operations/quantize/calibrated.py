"""`cctool quantize --method intN`: weights and activations as integers, calibrated without training.

    floats -> [equalized] -> quantizers attached -> ranges of weights -> ranges of activations
           -> [rounding learnt] -> [biases corrected] -> weights on their grid -> measured

If activations stay in floating point (--weight-only), the quantizers are removed at the end; the weights keep
their rounded values and are stored in few bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cctool.base.errors import QuantizationError, UsageError
from cctool.base.networks import copied, several
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.file.payload import place
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.data import example, measured_splits, open_source
from cctool.operations.judge.size import stored_bytes
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.operations.keep.calibrate import calibration_images, say_fewer
from cctool.operations.keep.encode import (
    computed_weights,
    in_step,
    names_by_place,
    quantized_weights,
    settled,
)
from cctool.operations.quantize.plan import Plan, plan
from cctool.operations.quantize.prepare import attached, calibrated, in_floats, observing, unreached
from cctool.operations.quantize.report import (
    ActivationReport,
    QuantizeReport,
    SensitivityReport,
    TensorReport,
    counted,
    errors_between,
    in_floating_point,
)
from cctool.operations.quantize.sensitivity import searched_bits
from cctool.operations.quantize.stored import encoded_directly
from cctool.operations.quantize.warning import signal_and_warning
from cctool.options.quantize.choices import Rounding
from cctool.options.quantize.options import QuantizeOptions
from cctool.quantization.network.attach import detach, fold_of, held_by, quantizers_of, taken_weights
from cctool.quantization.network.edit import with_quantizers
from cctool.quantization.network.points import weight_key
from cctool.quantization.network.tensors import Skipped
from cctool.quantization.refine.adaround import AdaRoundReport, adaround
from cctool.quantization.refine.bias_correction import correct_biases
from cctool.quantization.refine.equalize import equalize


def run(checkpoint: Checkpoint, options: QuantizeOptions, context: Context) -> Iterator[Outcome]:
    """Quantize a copy of the network.

    Raises:
        QuantizationError: if there is nothing to quantize.
        UsageError: if images are needed and there are none, or a pattern matches nothing.
    """
    source = open_source(options.data, checkpoint, context)
    _refuse_blind(options, source)
    if options.max_drop is not None:
        judge_of(checkpoint, context).require_measure("--max-drop")
    before = measured_splits(checkpoint, source, options.data, context)
    product, notes = in_floats(checkpoint, context, ordinary=options.activations)
    product.model.to(context.device)
    if options.calibration.equalize:
        found = equalize(product.model, plan(product, options).flow)
        notes.append(f"the channels of {several(len(found.pairs), 'pair')} of layers were equalized")
        notes += [f"not equalized: {item.name}: {item.reason}" for item in found.skipped]
    sensitivity: tuple[SensitivityReport, ...] = ()
    bits: Mapping[str, int] = {}
    if options.searches:
        bits, sensitivity, more = searched_bits(product, options, source, context)
        notes += more
    planned = plan(product, options, bits)
    # Before they are rounded, to report the errors.
    floats = float_weights(product, planned)
    product = attached(product, planned)
    activations, images, more = _calibrated(product, planned, options, source, context)
    notes += more
    left = (*planned.left, *unreached(product.model, planned))
    notes += _corrected(product, planned, options, source, context)
    product = settled(replace(product, resume=None), context.tables)
    tensors = tensor_reports(checkpoint, product, floats)
    skipped: tuple[Skipped, ...] = ()
    if options.activations:
        held = quantizers_of(product.model)
        assert held is not None
        held.state.method, held.state.observing = str(options.method), observing(options)
        held.state.images = images
        # The ranges were found with the rounded weights.
        product = in_step(product, context.tables)
    else:
        product, others, skipped = _weights_alone(product, checkpoint, planned, options, context)
        tensors += others
        alone = {item.name for item in skipped}
        left = tuple(item for item in left if item.name not in alone)
    product, followed = events.changed(product, source, options.data, context)
    after = measured_splits(product, source, options.data, context)
    notes += _of_ranges(product, options)
    signal, warned = signal_and_warning(checkpoint, product, source, options.data, context, (before, after))
    report = QuantizeReport(
        method=str(options.method),
        tensors=tensors,
        skipped=skipped,
        bytes_before=stored_bytes(checkpoint),
        bytes_after=stored_bytes(product),
        metrics_before=before,
        metrics_after=after,
        notes=(
            *notes,
            *computed_notes(product.model),
            *in_floating_point(left),
            *counted(list(skipped)),
            *followed,
            *warned,
        ),
        signal=signal,
        activations=activations,
        left=left,
        calibrated_on=images,
        sensitivity=sensitivity,
    )
    yield Outcome(
        product, report, metrics_before=before, metrics_after=after, notes=report.notes, signal=signal
    )


def _refuse_blind(options: QuantizeOptions, source: DataSource | None) -> None:
    wanted = {
        "--rounding adaround": options.rounding is Rounding.ADAROUND,
        "--bias-correction": options.calibration.bias_correction,
        "--target": options.target is not None,
        "--max-drop": options.max_drop is not None,
        f"--method {options.method} (activations; --weight-only leaves them)": options.activations,
    }
    needs = [name for name, given in wanted.items() if given]
    if needs and (source is None or "train" not in source.loaders):
        raise UsageError(f"{needs[0]} looks at training images: name a data set with --data")


def _of_ranges(product: Checkpoint, options: QuantizeOptions) -> list[str]:
    held = quantizers_of(product.model)
    points = () if held is None else held.state.weights.values()
    reduced = any(point.config.reduce_range for point in points)
    if options.calibration.reduce_range is not None or not reduced:
        return []
    return [
        "weights of 8 bits use 7, because integer kernels of CPUs without VNNI saturate otherwise "
        "(--full-range uses all)"
    ]


def float_weights(checkpoint: Checkpoint, planned: Plan) -> dict[str, Tensor]:
    """Copies on the CPU of the weights that a plan will quantize, by name.

    Raises:
        QuantizationError: if one holds NaN or infinities, which no integer stands for.
    """
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    names = [layer.weight for layer in planned.layers if layer.weight in parameters]
    floats = {name: parameters[name].detach() for name in names} | planned.kernels
    found = {name: value.cpu().clone() for name, value in floats.items()}
    for name, value in found.items():
        if bad := int((~value.isfinite()).sum()):
            raise QuantizationError(
                f"{name}: {bad:,} NaN or infinite values cannot be quantized; --exclude leaves it as it is"
            )
    return found


def _calibrated(
    product: Checkpoint, planned: Plan, options: QuantizeOptions, source: DataSource | None, context: Context
) -> tuple[tuple[ActivationReport, ...], int, list[str]]:
    if not planned.activations:
        return (), 0, []
    assert source is not None
    images, used = calibration_images(product, source, options.calibration.images, options.data, context)
    say_fewer(options.calibration.images, used, context)
    found = calibrated(product.model, planned, images, observing(options))
    notes = [
        f"{item.name}: {item.nonfinite:,} infinities or NaN were left out when its range was found"
        for item in found
        if item.nonfinite
    ]
    for note in notes:
        context.reporter.warn(note)
    return found, used, notes


def _corrected(
    product: Checkpoint, planned: Plan, options: QuantizeOptions, source: DataSource | None, context: Context
) -> list[str]:
    """Fit rounding and biases to images, as the options say; returns notes."""
    asked, notes = options.calibration, []
    if not (asked.bias_correction or options.rounding is Rounding.ADAROUND):
        return []
    assert source is not None
    served, used = calibration_images(product, source, asked.images, options.data, context)
    say_fewer(asked.images, used, context)
    # Held in memory, because every layer passes over them.
    images = list(served)
    # Outputs are compared with those of the network before any rounding or bias was changed.
    reference = copied(product.model)
    _round_parameters(product.model)
    if options.rounding is Rounding.ADAROUND:
        learned = adaround(
            product.model,
            planned.flow,
            images,
            steps=options.rounding_steps,
            seed=context.runtime.seed,
            reporter=context.reporter,
            reference=reference,
        )
        notes.append(_learnt(learned, used))
        notes += [f"rounding not learnt: {item.name}: {item.reason}" for item in learned.skipped]
    if asked.bias_correction:
        found = correct_biases(product.model, planned.flow, images, context.reporter, reference=reference)
        corrected = several(len(found.layers), "layer")
        notes.append(f"the biases of {corrected} were corrected on {several(used, 'image')}")
        notes += [f"no bias corrected: {item.name}: {item.reason}" for item in found.skipped]
    return notes


def _learnt(report: AdaRoundReport, images: int) -> str:
    better, count = sum(item.kept for item in report.layers), len(report.layers)
    if not count:
        return "no rounding could be learnt: all weights take their nearest levels"
    on, layers = several(images, "image"), several(count, "layer")
    kept = f"rounding was learnt on {on} and is kept in {better:,} of {layers}"
    nearest = "; where it comes no closer to the layer's outputs than the nearest levels, these stay"
    return kept + ("" if better == count else nearest)


@torch.no_grad()
def _round_parameters(model: nn.Module) -> None:
    """Round the parameters, in place, whose quantizers act at no call: layers behind them should see it."""
    at_calls = {point.weight for point in held_by(model).state.calls.values()}
    for name, parameter, quantizer, fold in quantized_weights(model):
        if name not in at_calls:
            parameter.copy_(quantizer(parameter, fold))


def tensor_reports(
    before: Checkpoint, product: Checkpoint, floats: Mapping[str, Tensor]
) -> tuple[TensorReport, ...]:
    """Report on the weights that have a quantizer; ``floats`` are their values before, by name."""
    found = []
    aliases = names_by_place(product.model)
    for name, parameter, quantizer, _ in quantized_weights(product.model):
        form, earlier = product.stored.get(name), before.stored.get(name)
        dense = parameter.numel() * parameter.element_size()
        error, sqnr = errors_between(floats[name], quantizer.eval()(parameter.detach()).cpu())
        found.append(
            TensorReport(
                name=name,
                tied=tuple(alias for alias in aliases.get(place(parameter.detach()), ()) if alias != name),
                shape=tuple(parameter.shape),
                encoding=f"{quantizer.config.method} {'' if form is None else form.encoding}".strip(),
                bits=quantizer.config.effective_bits,
                bytes_before=dense if earlier is None else earlier.nbytes,
                bytes_after=dense if form is None else form.nbytes,
                max_error=error,
                sqnr_db=sqnr,
            )
        )
    return (*found, *_computed_reports(before, product, floats))


def _computed_reports(
    before: Checkpoint, product: Checkpoint, floats: Mapping[str, Tensor]
) -> Iterator[TensorReport]:
    """Report on quantized weights that are no parameters; bytes are those of what they are computed from."""
    model, computed = product.model, computed_weights(product.model)
    taken = taken_weights(model, example(product)) if computed else {}
    for name, quantizer in computed.items():
        point = held_by(model).state.weights[name]
        with torch.no_grad():
            made = quantizer.eval()(taken[name], fold_of(model, point)).cpu()
        error, sqnr = errors_between(floats[name], made)
        yield TensorReport(
            name=name,
            tied=(),
            shape=tuple(made.shape),
            encoding=f"{quantizer.config.method} at the call",
            bits=quantizer.config.effective_bits,
            bytes_before=_bytes_of(before, point.made_of) if point.made_of else None,
            bytes_after=_bytes_of(product, point.made_of) if point.made_of else None,
            max_error=error,
            sqnr_db=sqnr,
        )


def _bytes_of(checkpoint: Checkpoint, names: Collection[str]) -> int:
    """Bytes of these tensors as they are stored."""
    state, forms = checkpoint.model.state_dict(), checkpoint.stored
    total = 0
    for name in names:
        if name in forms:
            total += forms[name].nbytes
        elif name in state:
            total += state[name].numel() * state[name].element_size()
    return total


def computed_notes(model: nn.Module) -> list[str]:
    """What the file holds of quantized weights that are computed, for reports."""
    held, computed = quantizers_of(model), computed_weights(model)
    if held is None or not computed:
        return []
    state, points = model.state_dict(), held.state.weights
    made_of = {name for found in computed for name in points[found].made_of if name in state}
    floats = made_of.difference(points.keys() - computed.keys())
    size = sum(state[name].numel() * state[name].element_size() for name in floats)
    unknown = sum(not made_of.intersection(points[found].made_of) for found in computed)
    what = f"{several(len(computed), 'weight')} {'is' if len(computed) == 1 else 'are'} computed on the way"
    notes = [f"{what} to the calls, which take {'it' if len(computed) == 1 else 'them'} rounded"]
    if floats:
        notes.append(
            f"the file keeps {several(len(floats), 'tensor')} of which "
            f"{'it is' if len(computed) == 1 else 'they are'} made in floating point ({size:,} bytes)"
        )
    if unknown:
        notes.append(f"what {unknown:,} of them {'is' if unknown == 1 else 'are'} made of is not known")
    return [": ".join(notes[:2]) + "".join(f"; {note}" for note in notes[2:])]


def _weights_alone(
    product: Checkpoint, before: Checkpoint, planned: Plan, options: QuantizeOptions, context: Context
) -> tuple[Checkpoint, tuple[TensorReport, ...], tuple[Skipped, ...]]:
    """Remove the quantizers; store weights that no layer uses as integers of the same bits."""
    held = quantizers_of(product.model)
    assert held is not None
    taken = {name for name in held.state.weights if held.quantizer(weight_key(name)) is not None}
    parameters = {name for name, _ in product.model.named_parameters(remove_duplicate=False)}
    detach(product.model)
    product = replace(product, spec=with_quantizers(product.spec, product.model))
    left = {item.name for item in planned.left}
    return encoded_directly(product, before, options, context, done=taken & parameters, left=left)
