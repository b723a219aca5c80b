"""Programs of torch.export with a free batch size; read back and run before they get their final name.

The file consists of torch functions and constants and needs no code of ours. Some versions of torch unpickle
parts of it, so open files of others only if you trust them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cctool.base.errors import ExportError
from cctool.base.networks import in_mode
from cctool.base.outputs import named_tensors
from cctool.checkpoint.file.atomic import write_atomically
from cctool.formats.converting import (
    BATCH,
    EXPORT_BATCH,
    agreements_with,
    comparison_notes,
    descriptions,
    ending_before_boxes,
    example,
    on_cpu,
    quiet,
    reason,
)
from cctool.formats.records import Agreement, ExportRequest, Written
from cctool.formats.verdict.own_rounding import References
from cctool.formats.verdict.rounding import Run, exact_between_steps, exact_runner, runner_of
from cctool.graph.execution import blaming_the_size

DESCRIPTION = "cctool.json"
"""Name of the extra file that identifies the network."""


def write_pt2(request: ExportRequest) -> Written:
    """Write a network as a program of torch.export and verify it.

    The program that is read back must give the model's outputs for random inputs of two batch sizes and for
    the request's samples. A network that cannot be exported with a free batch size is exported for batches of
    one, with a note.

    Raises:
        ExportError: if it cannot be exported or does not compute what the model does; no file is left.
        CheckpointError: if the file cannot be written.
    """
    model = on_cpu(request.network or request.checkpoint.model)
    with ending_before_boxes(model, request) as ends:
        written = _write(model, request)
    return replace(written, notes=(*ends, *written.notes))


def _write(model: nn.Module, request: ExportRequest) -> Written:
    program, notes = _convert(model, request.input_shape)
    about = json.dumps(descriptions(request.checkpoint, request.input_shape), ensure_ascii=False)
    agreements: list[Agreement] = []

    def write(stream: IO[bytes]) -> None:
        with quiet():
            torch.export.save(program, stream, extra_files={DESCRIPTION: about})

    def check(temporary: Path) -> None:
        network = request.network
        references = References()
        if network is not None:
            references = References(
                intended=runner_of(network),
                exact=lambda batch: exact_runner(network)(batch),
                between_steps=lambda batch: exact_between_steps(network)(batch),
            )
        run = _read_back(temporary)
        agreements.extend(agreements_with(run, request, free_batch=not notes, references=references))

    write_atomically(request.path, write, check, overwrite=request.overwrite)
    notes = (*notes, *comparison_notes(request, agreements))
    return Written(str(request.path), "pt2", request.path.stat().st_size, tuple(agreements), notes)


def _convert(model: nn.Module, shape: tuple[int, int, int]) -> tuple[Any, tuple[str, ...]]:
    with blaming_the_size(shape), in_mode(model, training=False):
        model(example(model, 1, shape))
    try:
        program = _export(model, shape, free_batch=True)
    except ExportError as error:
        program = _export(model, shape, free_batch=False)
        return program, (f"the batch size is fixed to 1: with a free one, {error}",)
    return program, ()


def _export(model: nn.Module, shape: tuple[int, int, int], *, free_batch: bool) -> Any:
    inputs = (example(model, EXPORT_BATCH if free_batch else 1, shape),)
    dimensions = ({0: torch.export.Dim(BATCH, min=1)},) if free_batch else None
    with in_mode(model, training=False), quiet():
        try:
            return torch.export.export(model, inputs, dynamic_shapes=dimensions, strict=False)
        # Whatever torch.export raises for a network that it cannot take.
        except Exception as error:
            raise ExportError(f"torch cannot export this network: {reason(error)}") from error


def _read_back(path: Path) -> Run:
    with path.open("rb") as stream, quiet():
        try:
            module = torch.export.load(stream).module()
        except Exception as error:
            raise ExportError(f"torch cannot load the exported program: {reason(error)}") from error

    def run(batch: Tensor) -> list[Tensor]:
        with torch.no_grad():
            try:
                found = module(batch)
            except Exception as error:
                raise ExportError(
                    f"torch cannot run the exported program on a batch of {len(batch)}: {reason(error)}"
                ) from error
        return list(named_tensors(found).values())

    return run
