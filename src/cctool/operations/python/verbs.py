"""What `import cctool` gives: a function for each verb, and what they take. The stub lists their keywords."""

from __future__ import annotations

from cctool.base.errors import CctoolError as CctoolError
from cctool.checkpoint.checkpoint import Checkpoint as Checkpoint
from cctool.operations.python.calls import CctoolWarning as CctoolWarning
from cctool.operations.python.calls import function
from cctool.operations.registries import load as load
from cctool.operations.registries import save as save

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
