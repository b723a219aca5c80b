"""The spreadsheets of layers and weights: their columns, totals and notes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cctool.analysis.crosscheck import CrossCheck
from cctool.analysis.layers import LayerRow, LayerTable
from cctool.analysis.sparsity import NonFinite, TensorSparsity
from cctool.analysis.table import WHOLE, Cell, Chart, Column, Report, Table, complement, counted, mean_by

Notes = tuple[tuple[str, str], ...]

_PERCENT, _SMALL = "0.00", "0.000000"


LAYER_COLUMNS = (
    Column("name", "Name", "Qualified name of the module."),
    Column("type", "Type", "Class of the module."),
    Column("attributes", "Attrs", "k kernel, s stride, p padding, d dilation, g groups."),
    Column("calls", "Calls", "Counted functions called in one pass; 0: it computes nothing itself.", WHOLE),
    Column("ifm", "IFM", "Shape of the input feature map, batch of one."),
    Column("ifm_volume", "IFM volume", "Elements of the input feature map.", WHOLE),
    Column("ofm", "OFM", "Shape of the output feature map, batch of one."),
    Column("ofm_volume", "OFM volume", "Elements of the output feature map.", WHOLE),
    counted("weights_volume", "Weights volume", "Elements of the weights: no biases, no norms."),
    counted("parameters", "Parameters", "Elements of all parameters, tied ones once."),
    counted(
        "macs", "MACs", "Multiply-accumulates of convolutions and linear layers; biases are not counted."
    ),
    counted(
        "effective_macs",
        "Effective MACs",
        "MACs times the share of weights that are not zero: what a perfect sparse kernel would still do.",
    ),
    counted(
        "matmul_macs", "Matmul MACs", "Multiply-accumulates between activations: attention, matmul, einsum."
    ),
    counted("norm_ops", "Norm ops", "Elements normalised."),
    counted("activation_ops", "Activation ops", "Elements put through a nonlinearity or softmax."),
    counted("pooling_ops", "Pooling ops", "Elements read by poolings, reductions and resampling."),
    counted("elementwise_ops", "Elementwise ops", "Elements of additions, products and other arithmetic."),
    Column(
        "sparsity",
        "Sparsity (%)",
        "Zero weights, percent of the weights.",
        _PERCENT,
        # Rows have the percent of zeros; the total follows from the sums of these two columns.
        complement("nonzeros", "weights_volume"),
    ),
    counted("nonzeros", "Non-zero weights", "Weights that are not zero."),
    counted("masked", "Masked", "Parameters that a mask holds at zero, while training too."),
    counted("bytes", "Bytes", "Of the tensors as the checkpoint stores them, without names and headers."),
    counted("nonfinite", "NaN or inf", "Elements that are NaN or infinite."),
    Column("weight_bits", "Weight bits", "Of a weight, as it is rounded or stored; blank: floating point."),
    Column("input_bits", "Input bits", "Of what the layer takes in, where a quantizer of its own rounds it."),
    Column("output_bits", "Output bits", "Of what the layer puts out, the same."),
)

TENSOR_COLUMNS = (
    Column("name", "Name", "Qualified name of the weight."),
    Column("shape", "Shape", "Its shape."),
    counted("nnz_dense", "NNZ (dense)", "Elements."),
    counted("nnz_sparse", "NNZ (sparse)", "Elements that are not zero."),
    Column("cols", "Cols (%)", "All-zero columns of the weight flattened to [outputs, rest].", _PERCENT),
    Column("rows", "Rows (%)", "All-zero rows of the same matrix.", _PERCENT),
    Column("channels", "Ch (%)", "Input channels that no filter reads.", _PERCENT),
    Column("kernels_2d", "2D (%)", "All-zero kernels.", _PERCENT),
    Column("filters_3d", "3D (%)", "All-zero filters.", _PERCENT),
    Column("fine", "Fine (%)", "Zero elements.", _PERCENT, complement("nnz_sparse", "nnz_dense")),
    Column("std", "Std", "Standard deviation of all elements.", _SMALL),
    Column("mean", "Mean", "Mean of all elements.", _SMALL, mean_by("mean", "nnz_dense")),
    Column(
        "abs_mean", "Abs-Mean", "Mean magnitude of all elements.", _SMALL, mean_by("abs_mean", "nnz_dense")
    ),
)

_CROSS_COLUMNS = (
    Column("kind", "Operations", "What is counted."),
    counted("ours", "cctool", "As the traced pass counts it."),
    counted("thop", "thop", "As thop's module hooks count it."),
    counted("difference", "Difference", "thop minus cctool."),
    Column("explanation", "Explanation", "Why they differ."),
)


def macs_report(table: LayerTable, check: CrossCheck, notes: Notes) -> Report:
    """Build the sheet of layers, with thop's figures on a second sheet.

    Args:
        table: the layers.
        check: thop's figures.
        notes: what identifies the model.
    """
    layers = Table(
        "MACs",
        LAYER_COLUMNS,
        tuple(_layer_row(layer) for layer in table.layers),
        Chart("MACs by layer, largest first", "name", "macs", "macs"),
    )
    lines = tuple(
        (line.kind, line.ours, line.thop, line.thop - line.ours, line.explanation) for line in check.lines
    )
    others = (Table("thop", _CROSS_COLUMNS, lines),) if lines else ()
    return Report("MACs by layer", layers, others, (*notes, *_counting_notes(table, check)))


def sparsity_report(tensors: Sequence[TensorSparsity], faults: Sequence[NonFinite], notes: Notes) -> Report:
    """Build the sheet of weights.

    Args:
        tensors: one row each.
        faults: tensors with NaN or infinities, for the notes.
        notes: what identifies the model.
    """
    rows = tuple(_tensor_row(tensor) for tensor in tensors)
    chart = Chart("Zero elements of the largest weights (%)", "name", "fine", "nnz_dense", 100)
    conventions = (
        (
            "Weights",
            "Parameters of two or four dimensions and weights of convolutions of other dimensions; "
            "biases and norms are left out. A tied weight is listed once.",
        ),
        ("Blank cells", "The granularity does not apply: a linear layer has no kernels."),
        *((f"NaN or infinite: {fault.name}", _fault(fault)) for fault in faults),
    )
    return Report(
        "Sparsity by weight", Table("Sparsity", TENSOR_COLUMNS, rows, chart), (), (*notes, *conventions)
    )


def _fault(fault: NonFinite) -> str:
    return f"{fault.nan:,} NaN and {fault.infinite:,} infinite of {fault.elements:,} elements"


def _layer_row(layer: LayerRow) -> tuple[Cell, ...]:
    sums = layer.sums
    values: dict[str, Any] = {**vars(layer), **vars(sums), **vars(layer.precision)}
    for key, shape in (("ifm", layer.input_shape), ("ofm", layer.output_shape)):
        values[key], values[f"{key}_volume"] = _shape(shape), None if shape is None else math.prod(shape)
    values |= {"weights_volume": sums.weights, "nonzeros": sums.weights - sums.zeros}
    return tuple(values[column.key] for column in LAYER_COLUMNS)


def _tensor_row(tensor: TensorSparsity) -> tuple[Cell, ...]:
    values = (getattr(tensor, column.key) for column in TENSOR_COLUMNS)
    return tuple(_shape(value) if isinstance(value, tuple) else value for value in values)


def _shape(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape)) or "scalar"


def _counting_notes(table: LayerTable, check: CrossCheck) -> Notes:
    uncounted = ", ".join(f"{name} ({calls} calls)" for name, calls in table.uncounted.items())
    if check.total is None:
        compared = check.failure or "thop gave no figure"
    else:
        compared = (
            f"{check.total:,} operations, of which convolution and linear compare with our MACs column; "
            "the sheet 'thop' explains the rest"
        )
    return (
        ("Unit", "One multiply-accumulate (MAC) is one multiplication and one addition: two FLOPs."),
        ("Not counted", uncounted or "Nothing: every function of the pass has a rule, or only moves data."),
        ("Never run", ", ".join(table.unused) or "Nothing: the pass touched every parameter."),
        ("Masked layers", ", ".join(table.masked) or "None."),
        ("Cross-check with thop", compared),
    )
