"""What `cctool export` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath

from cctool.base.errors import UsageError
from cctool.options.common import Choice, DataOptions

__all__ = ["DEFAULT_SUFFIXES", "SUFFIXES", "ExportFormat", "ExportOptions"]


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
class ExportOptions:
    """Options of one export.

    Attributes:
        format: what to write; None takes what the output's suffix says, else ONNX.
        output: path of the product; None writes beside the input.
        data: samples that the written model is compared on, besides random inputs.
        allow_nonfinite: export even NaN or infinite weights.
        without_codec: leave the codecs of feature maps out of an ONNX file or a program.
        int4: write weights of 4 bits and fewer in half a byte each, which takes ONNX's opset 21.
    """

    format: ExportFormat | None = None
    output: str | None = None
    data: DataOptions = field(default_factory=lambda: DataOptions(batch_size=64, limit=256))
    allow_nonfinite: bool = False
    without_codec: bool = False
    int4: bool = False

    def __post_init__(self) -> None:
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
