"""What a writer of an export format is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.quantization.export.integer_weights import IntegerWeight


@dataclass(frozen=True)
class Samples:
    """Real inputs to compare on.

    Attributes:
        name: data set and split, for the report.
        batches: preprocessed inputs [B, C, H, W]; iterated once.
    """

    name: str
    batches: Iterable[Tensor]


@dataclass(frozen=True)
class ExportRequest:
    """What to export and where to.

    Attributes:
        checkpoint: the model with its spec and origin; it is not changed.
        path: the file to write.
        input_shape: (C, H, W) of one input.
        samples: real inputs to compare on; None where there are none.
        seed: of the random inputs to compare on.
        overwrite: whether an existing file may be replaced.
        allow_nonfinite: whether outputs may be NaN or infinite, in the same places as the model's.
        network: what to convert in place of the checkpoint's model, which it is compared with: the same in
            terms that other programs know; None is that model itself.
        coded: whether the network rounds activations on its way, so that one rounding of float32 can become
            a whole step.
        weights: of ``network``, to be written as integers.
        quantized: whether activations of the model go through quantizers.
        packed: whether integers of 4 bits and fewer are written in half a byte each.
    """

    checkpoint: Checkpoint
    path: Path
    input_shape: tuple[int, int, int]
    samples: Samples | None = None
    seed: int = 0
    overwrite: bool = False
    allow_nonfinite: bool = False
    network: nn.Module | None = None
    coded: bool = False
    weights: tuple[IntegerWeight, ...] = ()
    quantized: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Agreement:
    """How close a written model comes to the one it was made from.

    Attributes:
        inputs: what it was fed.
        n: how many inputs.
        batch_sizes: sizes of the batches that they came in.
        max_abs_error: largest difference of any output.
        output_range: largest minus smallest value over the inputs, of the output that moves most;
            0 where the model gives the same for every input.
        largest_output: largest magnitude of the model's outputs.
        top1_agreement: percent of inputs for which the largest output is the same one.
        tolerance: allowed max_abs_error / output_range.
        judged_in_float64: whether float32 rounding alone exceeded the tolerance, so that both were compared
            with the model in float64.
        judged_by_steps: whether roundings of codecs or quantizers exceeded the tolerance, so that the error
            was compared with what small changes before them make of the model's outputs.
        undecided: of the inputs on which the classes differ, those where the model's own class changes with
            such changes.
    """

    inputs: str
    n: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float
    output_range: float
    largest_output: float
    top1_agreement: float
    tolerance: float
    judged_in_float64: bool = False
    judged_by_steps: bool = False
    undecided: int = 0


@dataclass(frozen=True)
class FloatLayer:
    """A layer that a runtime computes in floating point.

    Attributes:
        name: of the layer.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Kernels:
    """How onnxruntime computes the layers of a file, its graph optimized.

    Attributes:
        integer: how many layers run on integers.
        floating: those that do not.
    """

    integer: int
    floating: tuple[FloatLayer, ...]


@dataclass(frozen=True)
class Written:
    """A file that was written and verified.

    Attributes:
        path: the file.
        format: name of its format.
        bytes: its size.
        agreements: outputs compared with the model's; empty where reading back equal tensors says it all.
        notes: what is different from what was asked, and what was not checked.
        kernels: of an ONNX file with integers; None of others.
    """

    path: str
    format: str
    bytes: int
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = field(default=())
    kernels: Kernels | None = None


Writer = Callable[[ExportRequest], Written]
