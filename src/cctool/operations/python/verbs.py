"""What `import cctool` gives: a function for each verb, and what they take. The stub lists their keywords."""

from __future__ import annotations

from cctool.base.errors import CctoolError
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.python.calls import CctoolWarning, function
from cctool.operations.registries import load, save

__all__ = [
    "CctoolError",
    "CctoolWarning",
    "Checkpoint",
    "analyze",
    "compare",
    "decode",
    "distill",
    "evaluate",
    "export",
    "load",
    "prune",
    "quantize",
    "save",
    "train",
    "transform",
]

train = function("train")
distill = function("distill")
evaluate = function("evaluate")
prune = function("prune")
quantize = function("quantize")
transform = function("transform")
decode = function("decode")
analyze = function("analyze")
export = function("export")
compare = function("compare")
