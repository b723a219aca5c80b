"""Small networks after each transform, made without the command's own measurements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.operations.transform import run as transform
from cctool.options.common import DataOptions
from cctool.options.transform.choices import Mode, Select, TransformTarget
from cctool.options.transform.options import TransformOptions
from option_toys import asked
from procedure_toys import DIGITS, context, digits

DATA = replace(DIGITS, limit=48, batch_size=16)


def transformed(checkpoint: Checkpoint, data: DataOptions | None = None, **given: Any) -> Checkpoint:
    """What `cctool transform` makes of a network."""
    (outcome,) = transform.run(checkpoint, asked(TransformOptions, data=data, **given), context())
    return outcome.checkpoint


def energy(checkpoint: Checkpoint, **given: Any) -> Checkpoint:
    return transformed(checkpoint, **{"keep": 0.5, **given})


def corner(checkpoint: Checkpoint, **given: Any) -> Checkpoint:
    return transformed(checkpoint, **{"keep": 0.5, "select": Select.CORNER, **given})


def basis(checkpoint: Checkpoint, kernel: str = "dct", layers: tuple[str, ...] = ("all",)) -> Checkpoint:
    return transformed(checkpoint, kernel=kernel, mode=Mode.BASIS, layers=layers)


def tapped(checkpoint: Checkpoint, *taps: str, **given: Any) -> Checkpoint:
    """A network with codecs, calibrated on a few digits."""
    wanted = {"target": TransformTarget.FEATURES, "calibration": 16, **({"taps": taps} if taps else {})}
    return transformed(checkpoint, data=DATA, **{**wanted, **given})


def source() -> DataSource:
    return digits(48)
