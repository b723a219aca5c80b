"""Which layers of an ONNX file onnxruntime runs on integers, and whether they saturate on this CPU."""

from __future__ import annotations

import platform
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from cctool.base.errors import ExportError
from cctool.formats.onnx.graph import OnnxGraph
from cctool.formats.records import FloatLayer, Kernels

_BITS = "MatMulNBits"
_INTEGER = frozenset((
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeMatMul",
))  # fmt: skip
_FLOAT = frozenset((
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", _BITS,
))  # fmt: skip
_PRECISE = "session.x64quantprecision"
_BITS_LEVEL = "session.qdq_matmulnbits_accuracy_level"

SATURATES = (
    "this CPU has no VNNI: onnxruntime's kernels saturate here where two products of 8 bits add up to more "
    "than 16 bits hold; weights of 7 bits (quantize --reduce-range) do not, and CPUs with VNNI do not"
)


def rounds_inputs(what: str = "its input") -> str:
    """Why a layer whose weight alone has integers differs from what the file says."""
    return f"onnxruntime rounds {what} to 8 bits unless {_BITS_LEVEL} is 1"


@lru_cache(maxsize=1)
def saturating_cpu() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits: x86 without VNNI. Known on Linux only."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next(
        (line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), []
    )
    return bool(flags) and not {"avx512_vnni", "avx_vnni", "avx_vnni_int8"} & set(flags)


def session_options(*, precise: bool, as_stored: bool = False) -> Any:
    """Options of a session that logs nothing but fatal errors.

    Args:
        precise: whether to prefer kernels that do not saturate.
        as_stored: whether layers of which the file has integers for the weights alone get their inputs as
            they are; by default onnxruntime rounds those of matrix products to 8 bits.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if precise:
        options.add_session_config_entry(_PRECISE, "1")
    if as_stored:
        options.add_session_config_entry(_BITS_LEVEL, "1")
    return options


def kernels_of(path: Path) -> Kernels:
    """Count the layers that onnxruntime, its graph optimized, runs on integers, and name the others.

    Raises:
        ExportError: if it cannot load the file.
    """
    import onnx
    import onnxruntime

    options = session_options(precise=False)
    # One level below the highest, which changes layouts for this machine only.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            optimized = onnx.load(target)
        # onnxruntime's exceptions have no common base class.
        except Exception as error:
            raise ExportError(f"onnxruntime cannot optimize the exported model: {error}") from error
    integer = [node for node in optimized.graph.node if node.op_type in _INTEGER]
    others = [node for node in optimized.graph.node if node.op_type in _FLOAT]
    graph = OnnxGraph(onnx.load(path))
    named = {node.name: node for node in graph.nodes if node.op_type in _FLOAT}
    # A fused layer gets another name, but has the same weight.
    taking = {node.input[1]: node for node in named.values()}
    layers = []
    for node in others:
        source = named.get(node.name) or taking.get(node.input[1])
        name = (node if source is None else source).name or node.op_type
        why = rounds_inputs() if node.op_type == _BITS else _reason(graph, source)
        layers.append(FloatLayer(name, why))
    return Kernels(integer=len(integer), floating=tuple(layers))


def _reason(graph: OnnxGraph, node: Any | None) -> str:
    """Why a layer of the file runs in floating point."""
    if node is None:
        return "no layer of the network"
    weight = graph.maker(node.input[1])
    if weight is None or weight.op_type != "DequantizeLinear":
        return "its weight is in floating point"
    source = graph.maker(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return "its input is not quantized"
    if node.op_type == "ConvTranspose":
        return "onnxruntime has no integer kernel of it"
    takers = graph.takers(node.output[0])
    if not takers or any(taker.op_type != "QuantizeLinear" for taker in takers):
        return "its output is not quantized"
    return "onnxruntime takes no integer kernel for it"
