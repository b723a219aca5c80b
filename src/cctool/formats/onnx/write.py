"""ONNX files with a free batch size; checked and run before they get their final name.

Written by torch's exporter based on `torch.export`, in the exporter's default opset. The file's metadata
identify the network; what would identify the exporting machine (stack traces, paths) is removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from cctool import __version__
from cctool.base.errors import ExportError
from cctool.base.networks import in_mode, removing, several, some
from cctool.base.outputs import OUTPUT, named_tensors, other_values
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
from cctool.formats.onnx.chains import rounding
from cctool.formats.onnx.graph import name_outputs
from cctool.formats.onnx.integers import PACKED_OPSET, Placed, with_integers
from cctool.formats.onnx.kernels import SATURATES, kernels_of, rounds_inputs, saturating_cpu, session_options
from cctool.formats.records import Agreement, ExportRequest, Kernels, Written
from cctool.formats.verdict.own_rounding import References
from cctool.formats.verdict.rounding import Run, exact_between_steps, exact_runner, returned, runner_of
from cctool.graph.execution import blaming_the_size
from cctool.quantization.export.network import other_constants

INPUT, LOGITS = "input", "logits"

_PLACE = "cctool_output_"
"""Names of outputs while torch's exporter runs: those of the network may be taken inside the graph."""

_LARGEST = 2**31 - 2**20  # protobuf's limit of 2 GiB, less room for the graph


def write_onnx(request: ExportRequest) -> Written:
    """Write a network as one ONNX file and verify it.

    The file must pass onnx.checker, and onnxruntime must give the model's outputs for random inputs of two
    batch sizes and for the request's samples. A network that cannot be exported with a free batch size is
    exported for batches of one, with a note.

    Raises:
        ExportError: if it cannot be exported or does not compute what the model does; no file is left.
        CheckpointError: if the file cannot be written.
    """
    model = on_cpu(request.network or request.checkpoint.model)
    _refuse_large(model)
    with ending_before_boxes(model, request) as ends:
        written = _write(model, request)
    return replace(written, notes=(*ends, *written.notes))


def _write(model: nn.Module, request: ExportRequest) -> Written:
    document, fixed, left_out = _convert(model, request)
    free_batch = not fixed
    placed = _put_integers(document, request)
    notes = (*fixed, *left_out, *_missing(placed))
    _describe(document, request)
    agreements: list[Agreement] = []
    kernels: list[Kernels] = []

    def write(stream: IO[bytes]) -> None:
        stream.write(document.SerializeToString(deterministic=True))

    def check(temporary: Path) -> None:
        agreements.extend(judge_onnx(temporary, request, placed, free_batch=free_batch))
        if request.weights or request.quantized:
            kernels.append(kernels_of(temporary))

    write_atomically(request.path, write, check, overwrite=request.overwrite)
    notes = (*notes, *comparison_notes(request, agreements))
    found = next(iter(kernels), None)
    wide = not all(weight.reduced for weight in request.weights)
    if found is not None and found.integer and wide and saturating_cpu():
        notes = (*notes, SATURATES)
    rounded = sum(layer.reason == rounds_inputs() for layer in found.floating) if found is not None else 0
    if rounded:
        what = f"{several(rounded, 'layer')} compared on inputs in floats"
        notes = (*notes, f"{what}: {rounds_inputs('them')}")
    return Written(str(request.path), "onnx", request.path.stat().st_size, tuple(agreements), notes, found)


def judge_onnx(path: Path, request: ExportRequest, placed: Placed, *, free_batch: bool) -> list[Agreement]:
    """Check an ONNX file and compare what onnxruntime makes of it with the network.

    Args:
        path: the file.
        request: what was exported.
        placed: what became of the weights in it.
        free_batch: whether it takes batches of any size.

    Raises:
        ExportError: if it is no valid file for inference, or does not compute what the network does.
    """
    _check(path)
    run = _runtime(path, precise=request.quantized and saturating_cpu())
    references = _references(path, request, placed) if request.quantized or request.coded else None
    return agreements_with(run, request, free_batch=free_batch, references=references)


def _references(path: Path, request: ExportRequest, placed: Placed) -> References:
    """The network with the file's constants, and the file without the runtime's optimizations."""
    if request.network is None:
        return References()
    network, intended = request.network, runner_of(request.network)
    changed = [(torch.tensor(old), torch.tensor(new)) for old, new in placed.changed]

    def run(batch: Tensor) -> list[Tensor]:
        with other_constants(network, changed):
            return intended(batch)

    with other_constants(network, changed) as complete:
        if not complete:
            return References()

    def in_float64(runner: Callable[[nn.Module], Run]) -> Run:
        def exact(batch: Tensor) -> list[Tensor]:
            with other_constants(network, changed):
                return runner(network)(batch)

        return exact

    return References(
        intended=run,
        as_written=_runtime(path, plain=True) if request.quantized else None,
        exact=in_float64(exact_runner),
        between_steps=in_float64(exact_between_steps),
    )


def _put_integers(document: Any, request: ExportRequest) -> Placed:
    """Write weights as integers."""
    integers = request.weights or request.quantized
    return with_integers(document, request.weights, packed=request.packed) if integers else Placed()


def _missing(placed: Placed) -> tuple[str, ...]:
    """A note on weights that stay in floating point."""
    if not placed.missing:
        return ()
    return (f"{some(placed.missing)} stay in floating point: torch's exporter computes with other values",)


def _refuse_large(model: nn.Module) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > _LARGEST:
        raise ExportError(
            f"the weights take {size / 2**30:.1f} GiB, one ONNX file holds at most 2; "
            "--format safetensors has no such limit"
        )


def _convert(model: nn.Module, request: ExportRequest) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """Convert with a free batch size, or, if that fails, for batches of one.

    Returns:
        The document, notes on a fixed batch size, and notes on what was left out.
    """
    shape = request.input_shape
    names, other = _output_names(model, request)
    options: dict[str, Any] = {"custom_translation_table": rounding()} if request.quantized else {}
    if request.packed and any(weight.bits <= 4 for weight in request.weights):
        options["opset_version"] = PACKED_OPSET
    run = partial(_run_exporter, model, shape, names, options)
    left_out = tuple(
        f"{name} is no tensor but a value of type {kind}: left out" for name, kind in other.items()
    )
    try:
        document = run(free_batch=True)
    except ExportError as error:
        document = run(free_batch=False)
        return document, (f"the batch size is fixed to 1: with a free one, {error}",), left_out
    # The exporter may succeed although the code computed with the example's batch size.
    if not document.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        document = run(free_batch=False)
        fixed = "the batch size is fixed to 1: the network computes with a constant batch size"
        return document, (fixed,), left_out
    return document, (), left_out


def _output_names(model: nn.Module, request: ExportRequest) -> tuple[list[str], dict[str, str]]:
    """Names of the output tensors, and what else the network returns.

    Raises:
        ExportError: if it returns no tensor at all.
    """
    shape = request.input_shape
    with blaming_the_size(shape):
        outputs = returned(model, example(model, 1, shape))
    found, other = named_tensors(outputs), other_values(outputs)
    if not found:
        raise ExportError(
            f"the network returns a {type(outputs).__name__} without any tensor: nothing to export"
        )
    names = list(found)
    first = found[names[0]]
    scores = first.dim() == 2 if request.task is None else request.task.agreement is not None
    if names[0] == OUTPUT and scores and first.is_floating_point():
        names[0] = LOGITS
    # The names of values in a graph are unique, its input's among them.
    return [f"{name}_2" if name == INPUT else name for name in names], other


@contextlib.contextmanager
def _flat(model: nn.Module) -> Iterator[None]:
    """Let a network return its tensors alone, as a tuple, each once."""

    def flatten(_: nn.Module, args: Any, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            return outputs
        return tuple(named_tensors(outputs).values())

    with removing([model.register_forward_hook(flatten)]):
        yield


def _run_exporter(
    model: nn.Module,
    shape: tuple[int, int, int],
    outputs: list[str],
    options: dict[str, Any],
    *,
    free_batch: bool,
) -> Any:
    inputs = example(model, EXPORT_BATCH if free_batch else 1, shape)
    dimensions = ({0: torch.export.Dim(BATCH, min=1)},) if free_batch else None
    places = [f"{_PLACE}{i}" for i in range(len(outputs))]
    with in_mode(model, training=False), quiet(), _flat(model):
        try:
            program = torch.onnx.export(
                model,
                (inputs,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=places,
                dynamic_shapes=dimensions,
                **options,
            )
        # torch.export and translations of operators raise errors of any type for unsupported networks.
        except Exception as error:
            raise ExportError(f"torch cannot export this network: {reason(error)}") from error
    if program is None:
        raise ExportError("torch's exporter gave nothing back")
    document = program.model_proto
    name_outputs(document, dict(zip(places, outputs, strict=True)))
    return document


def _describe(document: Any, request: ExportRequest) -> None:
    """Describe the network in the file, and remove the exporter's notes about modules, stacks and paths."""
    _strip(document)
    checkpoint, shape = request.checkpoint, request.input_shape
    spec = checkpoint.spec
    names = [entry.name for entry in document.graph.output]
    scores = LOGITS in names and request.task is None
    document.producer_name, document.producer_version = "cctool", __version__
    document.graph.name = spec.architecture
    document.doc_string = (
        f"{spec.architecture} for {spec.task}, exported by cctool {__version__}. "
        f"{INPUT}: float images [{BATCH}, {', '.join(map(str, shape))}], scaled to 0..1, then "
        "(x - mean) / std as cctool.mean and cctool.std say. "
        + (f"{LOGITS}: one score per class, before softmax." if scores else f"Outputs: {', '.join(names)}.")
    )
    for key, value in descriptions(checkpoint, shape).items():
        document.metadata_props.add(key=key, value=value)


def _strip(document: Any) -> None:
    graph = document.graph
    free = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for entry in (*graph.input, *graph.output, *graph.value_info) if free else ():
        for dimension in entry.type.tensor_type.shape.dim:
            # Some versions of torch name the batch dimension after an internal symbol.
            if dimension.dim_param == free:
                dimension.dim_param = BATCH
    graph.ClearField("metadata_props")
    for entries in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in entries:
            entry.ClearField("metadata_props")
            entry.ClearField("doc_string")
    for function in document.functions:
        function.ClearField("metadata_props")
        for node in function.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the exported model: {reason(error)}") from error
    for node in onnx.load(path, load_external_data=False).graph.node:
        training = [a for a in node.attribute if a.name == "training_mode" and a.i]
        if training or (node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]):
            raise ExportError(f"{node.op_type} {node.name} was exported in training mode")


def _session(path: Path, *, precise: bool, plain: bool) -> Any:
    import onnxruntime

    options, providers = session_options(precise=precise, as_stored=True), ["CPUExecutionProvider"]
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    # onnxruntime's exceptions have no common base class.
    except Exception as error:
        if not precise:
            raise ExportError(f"onnxruntime cannot load the exported model: {reason(error)}") from error
    # Not every graph loads in precise mode. Without optimization it computes on dequantized values.
    return _session(path, precise=False, plain=True)


def _runtime(path: Path, *, precise: bool = False, plain: bool = False) -> Run:
    session = _session(path, precise=precise, plain=plain)
    name = session.get_inputs()[0].name

    def run(batch: Tensor) -> list[Tensor]:
        try:
            found = session.run(None, {name: batch.numpy()})
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot run the exported model on a batch of {len(batch)}: {reason(error)}"
            ) from error
        return [torch.from_numpy(value) for value in found]

    return run
