"""What `cctool analyze` can be asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

from cctool.options.common import DataOptions, sampled_data
from cctool.options.fields import Choice, Options, section

TABLE_SUFFIXES = (".xlsx", ".csv", ".json")
"""Suffixes that a table can be written to."""

_files = section("Files")
_printed = section("What is printed")


class View(Choice):
    """What is looked at: the layers with the history in short, the history in full, or the spec alone."""

    LAYERS = "layers"
    HISTORY = "history"
    SPEC = "spec"


@dataclass(frozen=True)
class AnalyzeOptions(Options):
    """Options of one analysis."""

    # fmt: off
    macs: bool = _files(False, "Write STEM.macs.xlsx, one row per layer.")
    macs_file: str | None = _files(
        None, "Write the layer table to this file: .xlsx, .csv or .json.", metavar="PATH", writes=True)
    sparsity: bool = _files(False, "Write STEM.sparsity.xlsx, one row per weight tensor.")
    sparsity_file: str | None = _files(
        None, "Write the sparsity table to this file: .xlsx, .csv or .json.", metavar="PATH",
        writes=True)
    onnx: bool = _files(False, "Write STEM.onnx and verify it.")
    onnx_file: str | None = _files(None, "Write the ONNX file here and verify it.", metavar="PATH",
        writes=True)
    history: bool = _printed(False, "Print every step of the history in full, and nothing else.")
    spec: bool = _printed(False, "Print the spec as JSON, and nothing else.")
    data: DataOptions = sampled_data("Compare the ONNX file on at most this many samples.")
    # fmt: on

    def clashes(self) -> Iterable[tuple[bool, str]]:
        """File names with a wrong suffix, and two things to print on one stdout."""
        named = (
            ("--macs-file", self.macs_file, TABLE_SUFFIXES),
            ("--sparsity-file", self.sparsity_file, TABLE_SUFFIXES),
            ("--onnx-file", self.onnx_file, (".onnx",)),
        )
        # fmt: off
        return (
            *(
                (
                    path is not None and PurePath(path).suffix.lower() not in suffixes,
                    f"{flag} {path}: a name ending in {', '.join(suffixes)} is needed",
                )
                for flag, path, suffixes in named
            ),
            (self.history and self.spec, "--history and --spec each print one thing: give one of them"),
            (self.view is not View.LAYERS and self.writes,
             f"--{self.view} prints one thing and nothing else: write files in a call of their own"),
        )
        # fmt: on

    @property
    def view(self) -> View:
        """What is looked at; counting is skipped where neither the view nor a file needs it."""
        return View.HISTORY if self.history else View.SPEC if self.spec else View.LAYERS

    @property
    def writes(self) -> bool:
        """Whether any file is written."""
        return any((self.macs, self.macs_file, self.sparsity, self.sparsity_file, self.onnx, self.onnx_file))
