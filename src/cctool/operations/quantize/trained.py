"""`cctool quantize` with training: with quantizers in the forward pass, or codebooks whose entries move.

Training changes the float weights, which quantizers round in every pass. At the end the weights get the
rounded values, and the file the integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from cctool.base.errors import QuantizationError
from cctool.base.networks import copied
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.spec import Parent
from cctool.data.records import DataSource
from cctool.operations.context import Context, Outcome
from cctool.operations.data import measured_splits, require_source, with_preprocessing
from cctool.operations.judge.size import stored_bytes
from cctool.operations.judge.task import judge_of
from cctool.operations.keep import events
from cctool.operations.keep.calibrate import calibration_images, say_fewer
from cctool.operations.keep.encode import settled
from cctool.operations.quantize.calibrated import computed_notes, float_weights, tensor_reports
from cctool.operations.quantize.plan import Plan, plan
from cctool.operations.quantize.prepare import attached, calibrated, in_floats, observing, reported, unreached
from cctool.operations.quantize.report import QuantizeReport, counted, in_floating_point
from cctool.operations.quantize.stored import encode_selected
from cctool.operations.quantize.warning import signal_and_warning
from cctool.operations.train.finetune import finetune
from cctool.operations.train.teacher import distillation
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.train.fit import FitOptions
from cctool.quantization.network.attach import quantizers_of
from cctool.quantization.network.tensors import select
from cctool.training.constraints.base import Constraint
from cctool.training.constraints.penalties import ClippingDecay
from cctool.training.objectives import Objective


def run(checkpoint: Checkpoint, options: QuantizeOptions, context: Context) -> Iterator[Outcome]:
    """Quantize a copy of the network and train it.

    Raises:
        UsageError: if there are no training images, or a pattern matches nothing.
        QuantizationError: if there is nothing to quantize.
        TrainingError: if training diverges.
    """
    source = require_source(options.data, checkpoint, context, "quantize")
    if options.epochs:
        judge_of(checkpoint, context).require_loss("fine-tuning")
    before = measured_splits(checkpoint, source, options.data, context)
    objective: Objective | None = None
    others: Mapping[str, Parent] = {}
    if options.tuning.teacher is not None and options.epochs:
        objective, others = distillation(checkpoint, source, options.tuning.teacher, context)
    make = _codebooks if options.method is QuantizeMethod.CODEBOOK else _quantizers
    product, found = make(checkpoint, options, source, objective, context)
    after = measured_splits(product, source, options.data, context)
    signal, warned = signal_and_warning(
        *(checkpoint, product, source, options.data, context),
        (before, after),
        trained=bool(options.epochs),
    )
    found["notes"] = (*found["notes"], *warned)
    report = QuantizeReport(
        method=str(options.method),
        signal=signal,
        bytes_before=stored_bytes(checkpoint),
        bytes_after=stored_bytes(product),
        metrics_before=before,
        metrics_after=after,
        **found,
    )
    yield Outcome(
        product,
        report,
        metrics_before=before,
        metrics_after=after,
        notes=report.notes,
        others=others,
        signal=signal,
    )


def _quantizers(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    source: DataSource,
    objective: Objective | None,
    context: Context,
) -> tuple[Checkpoint, dict[str, Any]]:
    product, notes = in_floats(checkpoint, context, ordinary=True)
    product.model.to(context.device)
    planned = plan(product, options)
    floats = float_weights(product, planned)
    product, used = _attached(product, planned, options, source, context)
    left = (*planned.left, *unreached(product.model, planned))
    if options.epochs:
        product = _trained(product, options, source, objective, context)
    product = settled(replace(product, resume=None), context.tables)
    # Before the followers, which store masked weights together with the bits of their masks.
    tensors = tensor_reports(checkpoint, product, floats)
    product, followed = events.trained(product, source, options.data, context)
    # Followers are told of a training even with --epochs 0; their notes would then be wrong.
    notes += followed if options.epochs else ()
    return product, {
        "tensors": tensors,
        "skipped": (),
        "notes": (*notes, *computed_notes(product.model), *in_floating_point(left)),
        "activations": reported(product.model, planned),
        "left": left,
        "calibrated_on": used,
    }


def _attached(
    product: Checkpoint, planned: Plan, options: QuantizeOptions, source: DataSource, context: Context
) -> tuple[Checkpoint, int]:
    product = attached(product, planned)
    used = 0
    if planned.activations:
        wanted = options.calibration.images
        images, used = calibration_images(product, source, wanted, options.data, context)
        say_fewer(wanted, used, context)
        calibrated(product.model, planned, images, observing(options))
    held = quantizers_of(product.model)
    assert held is not None
    held.state.method, held.state.observing, held.state.images = str(options.method), observing(options), used
    return product, used


def _trained(
    product: Checkpoint,
    options: QuantizeOptions,
    source: DataSource,
    objective: Objective | None,
    context: Context,
    forms: Mapping[str, EncodedTensor] | None = None,
) -> Checkpoint:
    tuning = options.tuning
    fit = FitOptions(
        epochs=options.epochs, optimizer=tuning.optimizer, lr=tuning.lr, freeze_norm=tuning.freeze_norm
    )
    trained = finetune(
        product,
        source,
        fit,
        options.data,
        context,
        objective=objective,
        constraints=_constraints(product.model, options),
        forms=forms,
    )
    return with_preprocessing(trained, source, context)


def _constraints(model: nn.Module, options: QuantizeOptions) -> tuple[Constraint, ...]:
    held = quantizers_of(model)
    if held is None or options.method is not QuantizeMethod.PACT:
        return ()
    # The paper of PACT decays its clipping levels.
    levels = [
        parameter
        for _, quantizer in held.named()
        if quantizer.config.method == "pact"
        for parameter in quantizer.parameters()
    ]
    return (ClippingDecay(levels, options.tuning.alpha_decay),)


def _codebooks(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    source: DataSource,
    objective: Objective | None,
    context: Context,
) -> tuple[Checkpoint, dict[str, Any]]:
    selected, skipped = select(
        checkpoint.model, include_1d=options.include_1d, include=options.include, exclude=options.exclude
    )
    if not selected:
        raise QuantizationError(f"nothing is left to quantize: {'; '.join(counted(skipped))}")
    product = replace(checkpoint, model=copied(checkpoint.model), resume=None)
    product, tensors, grown = encode_selected(product, checkpoint, selected, options, context)
    skipped += grown
    if not tensors:
        raise QuantizationError(f"nothing is left to quantize: {'; '.join(counted(skipped))}")
    forms = events.forms_of(product)
    product.model.to(context.device)
    product = _trained(product, options, source, objective, context, forms)
    # Encodings are made on the CPU.
    product.model.to("cpu")
    product, notes = events.changed(product, source, options.data, context, forms)
    found = {"tensors": tuple(tensors), "skipped": tuple(skipped), "notes": (*counted(skipped), *notes)}
    return product, found
