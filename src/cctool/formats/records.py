"""What writers of export formats take and return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from cctool.base.networks import some
from cctool.base.runtime import Reporter, Silent
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.quantization.export.integer_weights import IntegerWeight
from cctool.tasks.base import Task


@dataclass(frozen=True)
class Samples:
    """Real inputs to compare on.

    Attributes:
        name: data set and split, for the report.
        batches: preprocessed inputs [B, C, H, W]; iterated once.
        count: number of inputs; None if it is not known.
    """

    name: str
    batches: Iterable[Tensor]
    count: int | None = None


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
        task: what the network is for, which says what the written one must choose alike; None asks
            classification if the first output is (N, C), and otherwise nothing.
        reporter: shows how far the comparison is.
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
    task: Task | None = None
    reporter: Reporter = field(default_factory=Silent)


@dataclass(frozen=True)
class OutputAgreement:
    """How close one output of a written model is to the model's.

    Attributes:
        name: of the output.
        max_abs_error: largest difference; None for whole numbers and truth values.
        output_range: largest minus smallest value over the inputs, where that is largest; None likewise.
        different: percent of the elements that differ, for whole numbers and truth values; else None.
        elements: number of elements that were compared.
        other_shapes: number of batches that were not compared, because the shape depends on the data and was
            another one.
        not_compared: why nothing of it was compared; empty if something was.
        rms_error: root mean square of all differences; None for whole numbers.
        signal: root mean square deviation from the mean over the inputs; None likewise.
        signal_to_noise: 20 log10(signal / rms_error), in dB; None without either.
        place: the channel that is closest to its limit; None for whole numbers.
        place_error: root mean square error there, over the samples that decided.
        place_signal: standard deviation over the inputs there.
        limit: largest error allowed there.
        limit_from: what it follows from: tolerance (a share of the signal), ulps, float64 or steps.
        compared_with: what the file was compared with there.
        insensitive: why the comparison could hardly have failed; empty if it could at some channel.
        unchecked: the channels at which it could not, among others at which it could.
    """

    name: str
    max_abs_error: float | None
    output_range: float | None
    different: float | None
    elements: int
    other_shapes: int = 0
    not_compared: str = ""
    rms_error: float | None = None
    signal: float | None = None
    signal_to_noise: float | None = None
    place: int | None = None
    place_error: float | None = None
    place_signal: float | None = None
    limit: float | None = None
    limit_from: str = ""
    compared_with: str = ""
    insensitive: str = ""
    unchecked: tuple[int, ...] = ()

    @property
    def line(self) -> str:
        """The comparison in one line."""
        if self.not_compared:
            return f"{self.name}: not compared, {self.not_compared}"
        missed = ""
        if self.other_shapes:
            missed = f", {self.other_shapes} batches not compared, whose shapes depend on the data and differ"
        if self.different is not None:
            return f"{self.name}: {self.different:.2f} % of {self.elements:,} elements differ{missed}"
        error = f"max abs error {self.max_abs_error:.2g} of a range of {self.output_range:.3g}"
        return f"{self.name}: {error}{self.judged}{missed}"

    @property
    def judged(self) -> str:
        """The limit that was applied, as the end of a sentence."""
        if self.limit is None:
            return ""
        said = f"; channel {self.place} off by {self.place_error:.2g} rms of {self.limit:.2g} allowed"
        return said + (f" ({self.insensitive})" if self.insensitive else "")


@dataclass(frozen=True)
class ChoiceAgreement:
    """How often a written model chooses what the model chooses, in the words of the task.

    Attributes:
        name: key of what is chosen.
        title: as sentences name it.
        things: what a choice is made for, in the plural.
        n: number of choices.
        percent: of the choices that are the same.
    """

    name: str
    title: str
    things: str
    n: int
    percent: float


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
        top1_agreement: percent of inputs for which the largest output is the same one; None if the outputs
            are no scores of classes.
        tolerance: error allowed at each channel, as a fraction of its signal, where nothing else is needed.
        judged_in_float64: whether the tolerance was exceeded, so that both were compared with the model in
            float64.
        judged_by_steps: whether the tolerance was exceeded, so that the error was compared with the effect of
            small changes before codecs or quantizers.
        undecided: of the choices that differ, the number that the model itself makes otherwise under such
            changes.
        choices: how often both choose the same, as the task asks; None if it asks nothing.
        outputs: every output by itself.
        forward_passes: of one sample each, that the comparison took, by what was run.
        offered: number of inputs that there were, of which ``n`` were enough; None if it is not known.
        without_float64: why the network could not be run in float64 where its rounding was to be looked at;
            empty if it could, or that was not needed.
    """

    inputs: str
    n: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float
    output_range: float
    largest_output: float
    top1_agreement: float | None
    tolerance: float
    judged_in_float64: bool = False
    judged_by_steps: bool = False
    undecided: int = 0
    choices: ChoiceAgreement | None = None
    outputs: tuple[OutputAgreement, ...] = ()
    forward_passes: Mapping[str, int] = field(default_factory=dict)
    offered: int | None = None
    without_float64: str = ""

    def lines(self) -> list[str]:
        """A line for each output, unless there is but one of real numbers, which was compared."""
        single = len(self.outputs) == 1 and self.outputs[0].max_abs_error is not None
        told = [one for one in self.outputs if not single or one.not_compared or one.other_shapes]
        lines = [output.line for output in told]
        if self.without_float64:
            lines.append(
                "the network does not run in float64, so an error at single samples counts as rounding: "
                + self.without_float64
            )
        return lines


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

    @property
    def verified(self) -> str:
        """What the comparisons say of the file: verified only where a comparison could have failed."""
        found = [output for agreement in self.agreements for output in agreement.outputs]
        names = dict.fromkeys(output.name for output in found)
        compared = {output.name for output in found if not output.not_compared}
        told = {o.name for o in found if not o.not_compared and not o.insensitive}
        missed = [name for name in names if name not in compared]
        dull = [name for name in names if name in compared and name not in told]
        if not found:
            return "verified"
        if not compared:
            return "not verified: none of its outputs could be compared"
        if not told:
            why = next(
                output.insensitive for output in found if output.name == dull[0] and output.insensitive
            )
            return f"compared but not verified: of {some(dull)}, {why}"
        but = [f"{some(missed)}, which could not be compared"] if missed else []
        but += [f"{some(dull)}, which hardly depends on the inputs"] if dull else []
        but += [_unchecked(name, [o for o in found if o.name == name]) for name in names if name in told]
        but = [part for part in but if part]
        return f"verified but for {', and '.join(but)}" if but else "verified"


def _unchecked(name: str, found: Iterable[OutputAgreement]) -> str:
    """The channels of an output at which no comparison could have failed; empty if there are none."""
    told = [set(output.unchecked) for output in found if not output.not_compared and not output.insensitive]
    channels = sorted(set.intersection(*told))
    if not channels:
        return ""
    which = "channel" if len(channels) == 1 else "channels"
    depend = "depends" if len(channels) == 1 else "depend"
    return f"{which} {some(list(map(str, channels)))} of {name}, which hardly {depend} on the inputs"


Writer = Callable[[ExportRequest], Written]
