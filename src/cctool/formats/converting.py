"""Shared by the writers of ONNX and pt2: example inputs, quiet exporters, descriptions, comparisons."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cctool import __version__
from cctool.base.detectors import before_boxes, chooses_boxes
from cctool.base.networks import copied, float_type_of
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.formats.records import Agreement, ExportRequest
from cctool.formats.verdict.compare import (
    compare,
    growing_batches,
    least_of,
    many_batches,
    prime_size,
    require_agreement,
)
from cctool.formats.verdict.own_rounding import References
from cctool.formats.verdict.rarely_on import rarely_on
from cctool.formats.verdict.rounding import Run

BATCH = "batch"
EXPORT_BATCH = 2
"""Batch size of the example: torch.export treats sizes 0 and 1 as constants."""

BEFORE_BOXES = (
    "the file ends at what the detector's head puts out: how many boxes are chosen from it depends on the "
    "image, and torch cannot export that"
)
"""The note on detectors."""

RARE_INPUTS = "random inputs that reach what few do"
"""Those that switch on parts of the network which most leave off."""

_FLAT = 1e-4  # of the largest output: a smaller range of outputs is near the noise of float32


def on_cpu(model: nn.Module) -> nn.Module:
    """The model, or a copy of it where some of its tensors are on another device."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    here = all(tensor.device.type == "cpu" for tensor in tensors)
    return model if here else copied(model).to("cpu")


def example(model: nn.Module, batch: int, shape: tuple[int, int, int]) -> Tensor:
    """Zeros [batch, C, H, W] of the type of the model's parameters."""
    return torch.zeros((batch, *shape), dtype=float_type_of(model))


def reason(error: BaseException) -> str:
    """The innermost cause in one line, because exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        return (
            "it decides by values that it computes, as `if y.max() > 1` does or code that depends on how "
            "many boxes were chosen, and an exported program has no such choice"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters: their prints, logs and warnings are about themselves, not about the network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with Path(os.devnull).open("w") as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def ending_before_boxes(model: nn.Module, request: ExportRequest) -> Iterator[tuple[str, ...]]:
    """Let the model and the request's network end where shapes begin to depend on the data; gives notes."""
    with before_boxes(model, request.checkpoint.model):
        yield (BEFORE_BOXES,) if chooses_boxes(model) else ()


def descriptions(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> dict[str, str]:
    """What identifies the network, by the keys of the files' metadata."""
    spec = checkpoint.spec
    found = {
        "cctool.version": __version__,
        "cctool.architecture": spec.architecture,
        "cctool.arguments": json.dumps(spec.arguments, sort_keys=True),
        "cctool.input_shape": "x".join(map(str, shape)),
        "cctool.history": " > ".join(step.verb for step in checkpoint.history),
    }
    if spec.preprocessing is not None:
        found["cctool.mean"] = json.dumps(spec.preprocessing.mean)
        found["cctool.std"] = json.dumps(spec.preprocessing.std)
    if spec.classes is not None:
        found["cctool.classes"] = json.dumps(spec.classes, ensure_ascii=False)
    if checkpoint.origin is not None:
        found["cctool.source"] = checkpoint.origin.path
        found["cctool.source_file_sha256"] = checkpoint.origin.file
        if checkpoint.origin.content is not None:
            found["cctool.source_content_sha256"] = checkpoint.origin.content
    return found


def agreements_with(
    candidate: Run, request: ExportRequest, *, free_batch: bool, references: References | None = None
) -> list[Agreement]:
    """Compare a written program with the request's model, on random inputs and on the request's samples.

    If hardly any random inputs switch on some parts of the network, others that do come last.

    Args:
        candidate: runs the program.
        request: what was exported.
        free_batch: whether the program takes batches of any size.
        references: what else it is compared with if activations are rounded.

    Raises:
        ExportError: if they do not compute the same.
    """
    on = _Comparisons(candidate, request, free_batch, references)
    ways = [on.random_inputs, *([on.samples] if request.samples is not None else []), on.rare_inputs]
    for way in request.reporter.progress(ways, f"comparing {request.path.name}"):
        way()
    return on.found


class _Comparisons:
    """Comparisons of a written program with the request's model; the arguments are `agreements_with`'s."""

    def __init__(
        self, candidate: Run, request: ExportRequest, free_batch: bool, references: References | None
    ) -> None:
        self.found: list[Agreement] = []
        self._request, self._free_batch, self._model = request, free_batch, request.checkpoint.model
        self._least = least_of(request.input_shape)
        self._judge = partial(
            compare,
            self._model,
            candidate,
            allow_nonfinite=request.allow_nonfinite,
            coded=request.coded,
            quantized=request.quantized,
            task=request.task,
            references=references,
        )

    def _drawn(self, draw: Callable[..., Iterator[Tensor]]) -> Iterator[Tensor]:
        request, kind = self._request, float_type_of(self._model)
        batches = draw(request.input_shape, request.seed, free_batch=self._free_batch)
        return (batch.to(kind) for batch in batches)

    def random_inputs(self) -> None:
        """On so many random inputs that the verdict is certain."""
        self.found.append(self._judge(self._drawn(growing_batches), "random inputs", least=self._least))

    def samples(self) -> None:
        """On the request's samples."""
        samples = self._request.samples
        assert samples is not None
        batches = samples.batches
        if not self._free_batch:
            batches = (batch[i : i + 1] for batch in batches for i in range(len(batch)))
        self.found.append(self._judge(batches, samples.name, offered=samples.count, least=self._least))
        if self._request.quantized:
            require_agreement(self.found[-1])

    def rare_inputs(self) -> None:
        """On random inputs that reach what few do; the search for them is a cost of the first comparison."""
        rare, looked = rarely_on(self._model, self._drawn(many_batches), self._least)
        passes = self.found[0].forward_passes
        passes = {**passes, "network": passes["network"] + looked}
        self.found[0] = replace(self.found[0], forward_passes=passes)
        if len(rare):
            size = prime_size(self._request.input_shape, free_batch=self._free_batch)
            self.found.append(self._judge(torch.split(rare, size), RARE_INPUTS))


def comparison_notes(request: ExportRequest, agreements: Iterable[Agreement]) -> tuple[str, ...]:
    """Notes on the limits of the comparison."""
    notes = []
    agreements = tuple(agreements)
    if request.samples is None:
        notes.append("compared on random inputs only: no data set was named, or it is not there")
    if _hardly_depends(agreements):
        notes.append("the outputs hardly depend on the inputs, so comparing them says little")
    return tuple(notes)


def _hardly_depends(agreements: Iterable[Agreement]) -> bool:
    """Whether the numbers that were compared are nearly the same for all inputs."""
    measured = [
        found
        for found in agreements
        if not found.outputs or any(o.output_range is not None and not o.not_compared for o in found.outputs)
    ]
    return bool(measured) and all(f.output_range <= _FLAT * f.largest_output for f in measured)
