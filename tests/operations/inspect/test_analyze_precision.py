"""`cctool analyze` of quantized networks: bits of each layer, and no rows for quantizers."""

from __future__ import annotations

import pytest

from cctool.analysis.layers import LayerRow, LayerTable
from cctool.analysis.sheets import LAYER_COLUMNS, macs_report
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.operations.inspect.analyze import run
from cctool.options.inspect.analyze import AnalyzeOptions
from cctool.options.quantize.choices import Edges, QuantizeMethod
from cctool.options.quantize.parts import LayerBits
from procedure_toys import context
from quantized_toys import network, quantized


def table(checkpoint: Checkpoint) -> LayerTable:
    analysis = run(checkpoint, AnalyzeOptions(), context()).analysis
    assert analysis is not None
    return analysis.layers


def rows(checkpoint: Checkpoint) -> dict[str, LayerRow]:
    return {layer.name: layer for layer in table(checkpoint).layers}


@pytest.fixture(scope="module")
def lsq() -> Checkpoint:
    return quantized(
        network("lenet"),
        method=QuantizeMethod.LSQ,
        weight_bits=3,
        activation_bits=5,
        layers=(LayerBits("classifier.0", 2, 6),),
        edges=Edges.EIGHT,
        epochs=0,
    )


def test_layers_state_the_bits_of_weights_and_of_what_they_take_in(lsq: Checkpoint) -> None:
    bits = {
        name: (row.precision.weight_bits, row.precision.input_bits)
        for name, row in rows(lsq).items()
        if row.precision.weight_bits
    }
    assert bits == {
        "features.0": (7, 8),
        "features.3": (3, 5),
        "features.6": (3, 5),
        "classifier.0": (2, 6),
        "classifier.2": (7, 8),
    }


def test_quantizers_have_no_rows_and_none_is_missed_by_the_pass(lsq: Checkpoint) -> None:
    plain, found = table(network("lenet")), table(lsq)
    assert [row.name for row in found.layers] == [row.name for row in plain.layers]
    assert found.unused == ()
    # Learnt steps: one of the weight and one of what comes in, in each of the three layers between the edges.
    gained = {
        row.name: row.sums.parameters - before.sums.parameters
        for row, before in zip(found.layers, plain.layers, strict=True)
    }
    assert {name: more for name, more in gained.items() if more} == {
        "features.3": 2,
        "features.6": 2,
        "classifier.0": 2,
    }
    assert found.totals.parameters == sum(p.numel() for p in lsq.model.parameters())


def test_what_kernels_put_out_has_bits_too() -> None:
    found = rows(quantized(network("lenet")))
    assert found["features.1"].precision.output_bits == 8
    assert found["features.0"].precision.weight_bits == 7
    assert found["features.0"].precision.output_bits is None


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (QuantizeMethod.FP16, 16),
        (QuantizeMethod.BF16, 16),
        (QuantizeMethod.UINT8, 8),
        (QuantizeMethod.INT3, 3),
        (QuantizeMethod.CODEBOOK, 5),
        (QuantizeMethod.APOT, 4),
    ],
)
def test_stored_bits_are_those_of_the_encoding(method: QuantizeMethod, bits: int) -> None:
    found = rows(quantized(network("lenet"), method=method))
    assert {row.precision.weight_bits for row in found.values() if row.sums.weights} == {bits}


def test_floats_have_no_bits_and_the_sheet_has_the_columns(lsq: Checkpoint) -> None:
    assert all(row.precision.weight_bits is None for row in rows(network("lenet")).values())
    analysis = run(lsq, AnalyzeOptions(), context()).analysis
    assert analysis is not None
    sheet = macs_report(analysis.layers, analysis.cross_check, ()).table
    place = [column.key for column in LAYER_COLUMNS].index("weight_bits")
    assert [row[place] for row in sheet.rows if row[0] == "features.6"] == [3]
