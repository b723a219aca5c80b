"""Small networks after `cctool quantize`, without files."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.models import registry
from cctool.operations.context import Context, Outcome
from cctool.operations.keep.events import stored as as_stored
from cctool.operations.quantize import run as quantize
from cctool.operations.quantize.report import QuantizeReport
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.quantize.parts import CalibrationOptions, TuningOptions
from procedure_toys import DIGITS, context

DATA = replace(DIGITS, limit=32, batch_size=16)
_CALIBRATION = {item.name for item in fields(CalibrationOptions)}
_TUNING = {item.name for item in fields(TuningOptions)}


def network(name: str = "mobilenet_student", **arguments: Any) -> Checkpoint:
    """An untrained network of ours whose batch norms do something."""
    torch.manual_seed(0)
    given = {"in_channels": 1, "num_classes": 10} | ({"base": 4} if name == "mobilenet_student" else {})
    model = registry.build(name, given | arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    spec = ModelSpec(
        architecture=name,
        arguments=given | arguments,
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    return Checkpoint(model.eval(), spec)


def options(**given: Any) -> QuantizeOptions:
    """Options by their own names, wherever they stand."""
    calibration = {"images": 16} | {name: given.pop(name) for name in _CALIBRATION & given.keys()}
    tuning = {name: given.pop(name) for name in _TUNING & given.keys()}
    return QuantizeOptions(
        **{
            "calibration": CalibrationOptions(**calibration),
            "tuning": TuningOptions(**tuning),
            "data": DATA,
            "method": QuantizeMethod.INT8,
        }
        | given
    )


def outcome(checkpoint: Checkpoint, where: Context | None = None, **given: Any) -> Outcome:
    """What one quantization hands out, stored as the pipeline stores it."""
    where = where or context()
    (found,) = quantize.run(checkpoint, options(**given), where)
    return replace(found, checkpoint=as_stored(found.checkpoint, where.tables))


def quantized(checkpoint: Checkpoint, **given: Any) -> Checkpoint:
    return outcome(checkpoint, **given).checkpoint


def report(checkpoint: Checkpoint, **given: Any) -> QuantizeReport:
    found: QuantizeReport = outcome(checkpoint, **given).report
    return found
