"""Options that several verbs share: one definition each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from cctool.base.errors import UsageError

__all__ = [
    "Choice",
    "DataOptions",
    "ModelOptions",
    "Precision",
    "RuntimeOptions",
    "parse_shape",
    "parse_values",
]


class Choice(str, Enum):
    """An option's allowed values; prints as its value (StrEnum exists from Python 3.11 on only)."""

    def __str__(self) -> str:
        return str(self.value)


class Precision(Choice):
    """Arithmetic of forward and backward passes; parameters stay float32."""

    FULL = "32"
    BF16 = "bf16"
    FP16 = "16"


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how much of it at a time.

    Attributes:
        data: reference of a data set such as ``digits`` or ``folder:DIR``; None takes the checkpoint's last.
        val_data: reference that replaces the validation split.
        test_data: reference that replaces the test split.
        batch_size: samples per step, over all devices together.
        workers: processes that decode files; 0 decodes in the main process.
        limit: use at most so many samples of each split.
    """

    data: str | None = None
    val_data: str | None = None
    test_data: str | None = None
    batch_size: int = 128
    workers: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: at least 1 is needed")
        if self.workers < 0:
            raise UsageError(f"--workers {self.workers}: 0 or more is allowed")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit}: at least 1 is needed")


@dataclass(frozen=True)
class ModelOptions:
    """Which network, where the file does not say it.

    Attributes:
        arch: architecture reference; names user code too.
        arguments: ``key=value`` arguments of the builder.
        input_shape: (channels, height, width) of one input.
        mean: preprocessing of a foreign model, in units of an image scaled to 0..1.
        std: likewise.
        trust_pickle: let a foreign file run the code that it contains.
        spec: path of a JSON spec to build a bare state dict with.
    """

    arch: str | None = None
    arguments: tuple[str, ...] = ()
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trust_pickle: bool = False
    spec: str | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UsageError("--mean and --std go together")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise UsageError(
                f"--mean has {len(self.mean)} values and --std {len(self.std)}: one per channel each"
            )
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"--std {self.std}: positive values are needed")
        if self.arch is not None and self.spec is not None:
            raise UsageError("--arch and --spec both name the network: give one")


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how to compute.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: arithmetic of forward and backward passes.
        seed: of every pseudo-random generator.
        deterministic: refuse operations whose result depends on scheduling.
    """

    device: str = "auto"
    precision: Precision = Precision.FULL
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: 0 to {2**32 - 1} is allowed")


def parse_shape(text: str) -> tuple[int, int, int]:
    """Parse ``CxHxW``.

    >>> parse_shape("3x32x32")
    (3, 32, 32)
    """
    pieces = text.lower().split("x")
    if len(pieces) != 3 or not all(piece.isdecimal() and int(piece) > 0 for piece in pieces):
        raise UsageError(f"--input {text}: CxHxW is expected, as in 3x224x224")
    channels, height, width = map(int, pieces)
    return channels, height, width


def parse_values(text: str, option: str) -> tuple[float, ...]:
    """Parse comma-separated numbers.

    >>> parse_values(".5,.25", "--mean")
    (0.5, 0.25)
    """
    try:
        values = tuple(float(piece) for piece in text.split(","))
        if not all(map(math.isfinite, values)):
            raise ValueError
        return values
    except ValueError:
        raise UsageError(f"{option} {text}: comma-separated numbers are expected, as in .5,.5,.5") from None
