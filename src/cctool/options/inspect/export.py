"""What `cctool export` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from cctool.base.errors import UsageError
from cctool.options.common import DataOptions, sampled_data
from cctool.options.fields import Choice, Options, option


class ExportFormat(Choice):
    """What is written.

    onnx: the network as ONNX, batch norm folded, batch size free. state-dict: bare dense tensors that
    `torch.load(weights_only=True)` opens. safetensors: the same tensors in a safetensors file. pt2: a program
    that `torch.export.load` opens, batch size free.
    """

    ONNX = "onnx"
    STATE_DICT = "state-dict"
    SAFETENSORS = "safetensors"
    PT2 = "pt2"


SUFFIXES: dict[ExportFormat, tuple[str, ...]] = {
    ExportFormat.ONNX: (".onnx",),
    ExportFormat.STATE_DICT: (".pt", ".pth"),
    ExportFormat.SAFETENSORS: (".safetensors",),
    ExportFormat.PT2: (".pt2",),
}
"""Suffixes of each format's files; a given output's suffix implies the format."""

DEFAULT_SUFFIXES: dict[ExportFormat, str] = {
    ExportFormat.ONNX: ".onnx",
    ExportFormat.STATE_DICT: ".state.pt",
    ExportFormat.SAFETENSORS: ".state.safetensors",
    ExportFormat.PT2: ".pt2",
}
"""What replaces the input's suffix where no output is named; `.state` keeps it apart from the input."""


@dataclass(frozen=True)
class ExportOptions(Options):
    """Options of one export."""

    # fmt: off
    format: ExportFormat | None = option(
        None, "Format of the file.", unset="the one that the output's suffix implies, else onnx")
    output: str | None = option(
        None, "File to write; its suffix implies the format.", "--output", "-o", panel="Output", writes=True,
        unset="INPUT's stem with .onnx, .state.pt, .state.safetensors or .pt2")
    data: DataOptions = sampled_data("Compare on at most this many samples of the data.")
    allow_nonfinite: bool = option(
        False, "Write the file even if weights are NaN or infinite.", panel="Output")
    without_codec: bool = option(False, "Leave the codecs of feature maps out of an ONNX or pt2 file.")
    int4: bool = option(
        False, "ONNX: store weights of 4 bits and fewer in half a byte each (opset 21); their layers then "
        "run in floating point. Otherwise such weights take a byte each and run on integers.")
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_output()
        if self.int4 and self.effective_format is not ExportFormat.ONNX:
            raise UsageError(f"--int4 is for ONNX files, not for {self.effective_format}")

    def _check_output(self) -> None:
        if self.output is None:
            return
        suffix = PurePath(self.output).suffix.lower()
        implied = next((kind for kind, known in SUFFIXES.items() if suffix in known), None)
        if implied is None:
            every = ", ".join(f"{' or '.join(known)} ({kind})" for kind, known in SUFFIXES.items())
            raise UsageError(
                f"--output {self.output}: the suffix {suffix!r} names no format; allowed: {every}"
            )
        if self.format not in (None, implied):
            raise UsageError(
                f"--output {self.output} is a name for {implied}, --format says {self.format}; "
                f"that takes {' or '.join(SUFFIXES[self.format])}"
            )

    @property
    def effective_format(self) -> ExportFormat:
        """The format asked for, else the one that the output's suffix implies, else ONNX."""
        if self.format is not None:
            return self.format
        suffix = PurePath(self.output).suffix.lower() if self.output is not None else ".onnx"
        return next(kind for kind, known in SUFFIXES.items() if suffix in known)
