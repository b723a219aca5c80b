"""What `cctool analyze` can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath

from cctool.base.errors import UsageError
from cctool.options.common import Choice, DataOptions

__all__ = ["TABLE_SUFFIXES", "AnalyzeOptions", "View"]

TABLE_SUFFIXES = (".xlsx", ".csv", ".json")
"""Suffixes that a table can be written to."""


class View(Choice):
    """What is looked at: the layers with the history in short, the history in full, or the spec alone."""

    LAYERS = "layers"
    HISTORY = "history"
    SPEC = "spec"


@dataclass(frozen=True)
class AnalyzeOptions:
    """Options of one analysis.

    Attributes:
        view: what is looked at; counting is skipped where neither the view nor a file needs it.
        macs: write the table of layers beside the input.
        macs_file: write it to this path instead.
        sparsity: write the table of weights beside the input.
        sparsity_file: write it to this path instead.
        onnx: write and verify an ONNX file beside the input.
        onnx_file: write it to this path instead.
        data: samples that the ONNX file is compared on, besides random inputs.
    """

    view: View = View.LAYERS
    macs: bool = False
    macs_file: str | None = None
    sparsity: bool = False
    sparsity_file: str | None = None
    onnx: bool = False
    onnx_file: str | None = None
    data: DataOptions = field(default_factory=lambda: DataOptions(batch_size=64, limit=256))

    def __post_init__(self) -> None:
        problems = [
            f"{option} {path}: a name ending in {', '.join(suffixes)} is needed"
            for option, path, suffixes in (
                ("--macs-file", self.macs_file, TABLE_SUFFIXES),
                ("--sparsity-file", self.sparsity_file, TABLE_SUFFIXES),
                ("--onnx-file", self.onnx_file, (".onnx",)),
            )
            if path is not None and PurePath(path).suffix.lower() not in suffixes
        ]
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def writes(self) -> bool:
        """Whether any file is written."""
        return any((self.macs, self.macs_file, self.sparsity, self.sparsity_file, self.onnx, self.onnx_file))
