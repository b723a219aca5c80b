"""What writers of export formats take and return."""

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
    """What to export, and to which file.

    Attributes:
        checkpoint: the model with its spec and origin; it is not changed.
        path: the file to write.
        input_shape: (C, H, W) of one input.
        samples: real inputs to compare on, if there are any.
        seed: of the random inputs to compare on.
        overwrite: whether an existing file may be replaced.
        allow_nonfinite: whether outputs may be NaN or infinite, in the same places as the model's.
        network: the network to convert, if not the checkpoint's model: the same function in operations that
            other programs know. The result is compared with the checkpoint's model.
        coded: whether codecs round activations, so that a rounding error of float32 can become a whole step.
        weights: weights of ``network`` to write as integers.
        quantized: whether activations go through quantizers.
        packed: whether integers of 4 bits and fewer take half a byte each.
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
    """How close a written model is to the one it was made from.

    Attributes:
        inputs: description of the inputs.
        n: number of inputs.
        batch_sizes: batch sizes used.
        max_abs_error: largest difference of any output.
        output_range: largest minus smallest value over the inputs, for the output where that is largest;
            0 if the outputs are the same for every input.
        largest_output: largest magnitude of the model's outputs.
        top1_agreement: percent of inputs for which the largest output is the same one.
        tolerance: allowed max_abs_error / output_range.
        judged_in_float64: whether the tolerance was exceeded, so that both were compared with the model in
            float64.
        judged_by_steps: whether the tolerance was exceeded, so that the error was compared with the effect of
            small changes before codecs or quantizers.
        undecided: of the inputs on which the classes differ, the number where the model's own class changes
            under such changes.
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
    """A layer that a runtime computes in floating point, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Kernels:
    """How onnxruntime computes the layers of a file after optimizing its graph.

    Attributes:
        integer: number of layers computed in integers.
        floating: the other layers.
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
        agreements: comparisons with the model's outputs; empty for formats of tensors, compared bit by bit.
        notes: deviations from what was asked, and what was not checked.
        kernels: for ONNX files with integers.
    """

    path: str
    format: str
    bytes: int
    agreements: tuple[Agreement, ...] = ()
    notes: tuple[str, ...] = field(default=())
    kernels: Kernels | None = None


Writer = Callable[[ExportRequest], Written]
