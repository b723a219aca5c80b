"""The encoding ``codebook``: look-ups against numpy, and what its tables are made of."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.checkpoint.encoding import EncodedTensor
from cctool.quantization.encodings.apot_levels import apot_levels, best_scale
from cctool.quantization.encodings.codebook import CODEBOOK, encode_codebook
from cctool.quantization.encodings.codebook_fit import kmeans

KMEANS = {"kind": "kmeans", "bits": 3, "axis": None, "init": "linear", "seed": 0}
APOT = {"kind": "apot", "bits": 4, "axis": None, "terms": 2}
DISTINCT = {"kind": "distinct", "bits": 8, "axis": None}
SETTINGS: list[dict[str, Any]] = [
    KMEANS,
    {**KMEANS, "bits": 1, "init": "density"},
    {**KMEANS, "bits": 8, "init": "random", "seed": 5},
    APOT,
    {**APOT, "axis": 0},
    {**APOT, "bits": 8, "axis": 1, "terms": 3},
    DISTINCT,
    {**DISTINCT, "axis": 1},
]


def example(shape: tuple[int, ...] = (3, 4, 2, 5), seed: int = 0) -> Tensor:
    """Few distinct values, so that every kind can store them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(8).round().div(8)


def same_parts(first: EncodedTensor, second: EncodedTensor) -> bool:
    return first.parts.keys() == second.parts.keys() and all(
        part.dtype == second.parts[name].dtype and torch.equal(part, second.parts[name])
        for name, part in first.parts.items()
    )


def test_kmeans_takes_the_nearest_centre() -> None:
    weight = torch.randn(40, 5)
    encoded = CODEBOOK.encode(weight, KMEANS)
    centres = kmeans(weight.numpy().astype(np.float64).reshape(-1), 8).astype(np.float32)
    nearest = np.abs(weight.numpy()[..., None] - centres).argmin(-1)
    assert torch.equal(encoded.parts["table"], torch.from_numpy(centres))
    assert np.array_equal(CODEBOOK.decode(encoded).numpy(), centres[nearest])


def test_each_setting_changes_what_is_decoded() -> None:
    weight = torch.randn(30, 30)
    for base, changes in (
        (KMEANS, ({"bits": 4}, {"init": "density"}, {"init": "random"}, {"init": "random", "seed": 1})),
        (APOT, ({"bits": 5}, {"terms": 3}, {"axis": 0}, {"axis": 1})),
    ):
        found = [CODEBOOK.decode(CODEBOOK.encode(weight, {**base, **change})) for change in ({}, *changes)]
        assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_additive_powers_have_the_best_scale_of_each_slice(axis: int | None) -> None:
    weight, levels = torch.randn(4, 6, 5), apot_levels(4, 2)
    encoded = CODEBOOK.encode(weight, {**APOT, "axis": axis})
    found = encoded.parts
    assert np.array_equal(found["table"].numpy(), levels.astype(np.float32))
    whole = weight.double().numpy()
    slices = [whole] if axis is None else [whole.take(i, axis) for i in range(whole.shape[axis])]
    scales = np.array([best_scale(values.reshape(-1), levels) for values in slices], dtype=np.float32)
    assert np.array_equal(found["scales"].reshape(-1).numpy(), scales)
    decoded = CODEBOOK.decode(encoded).numpy()
    after = [decoded] if axis is None else [decoded.take(i, axis) for i in range(whole.shape[axis])]
    for values, stored, scale in zip(slices, after, scales, strict=True):
        grid = (levels.astype(np.float32) * scale).astype(np.float64)
        error = np.abs(values[..., None] - grid).min(-1)
        assert np.isin(stored, grid.astype(np.float32)).all()
        np.testing.assert_allclose(np.abs(stored - values), error, atol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_distinct_values_are_stored_exactly_and_are_the_table(axis: int | None) -> None:
    weight = example()
    encoded = CODEBOOK.encode(weight, {**DISTINCT, "axis": axis})
    assert torch.equal(CODEBOOK.decode(encoded), weight)
    table = encoded.parts["table"]
    if axis is None:
        assert table.tolist() == sorted(set(weight.flatten().tolist()))
    else:
        for row, values in zip(table, weight.movedim(axis, 0).flatten(1), strict=True):
            wanted = sorted(set(values.tolist()))
            assert row.tolist() == wanted + [0.0] * (len(row) - len(wanted))
    with pytest.raises(QuantizationError, match="more than 1 bits tell apart"):
        CODEBOOK.encode(weight, {**DISTINCT, "axis": axis, "bits": 1})


@pytest.mark.parametrize(
    ("parameters", "bytes_"),
    [
        (KMEANS, 900 * 3 / 8 + 8 * 4),
        ({**KMEANS, "bits": 1}, 900 / 8 + 2 * 4),
        (APOT, 900 * 4 / 8 + 15 * 4 + 4),
        ({**APOT, "axis": 0}, 900 * 4 / 8 + 15 * 4 + 30 * 4),
    ],
)
def test_bytes_are_what_they_should_be(parameters: dict[str, Any], bytes_: float) -> None:
    assert CODEBOOK.encode(torch.randn(30, 30), parameters).nbytes == -(-bytes_ // 1)


floats = st.floats(-60_000, 60_000, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_encoding_what_was_decoded_gives_the_same_bytes(
    data: Any, rows: int, columns: int, dtype: torch.dtype
) -> None:
    values = data.draw(st.lists(floats, min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(values).reshape(rows, columns).to(dtype)
    for parameters in SETTINGS:
        if parameters["kind"] == "apot":
            continue
        encoded = CODEBOOK.encode(weight, parameters)
        decoded = CODEBOOK.decode(encoded)
        assert decoded.dtype == dtype
        assert decoded.shape == weight.shape
        assert same_parts(CODEBOOK.encode(decoded, encoded.parameters), encoded)


def test_additive_powers_of_additive_powers_stay_close() -> None:
    for bits, terms in ((3, 1), (4, 2), (5, 2), (6, 3)):
        parameters = {"kind": "apot", "bits": bits, "terms": terms, "axis": 0}
        decoded = CODEBOOK.decode(CODEBOOK.encode(torch.randn(8, 90), parameters))
        torch.testing.assert_close(CODEBOOK.decode(CODEBOOK.encode(decoded, parameters)), decoded)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(SETTINGS), st.integers(0, 3), st.integers(0, 2**16))
def test_taking_is_cutting_what_is_decoded(
    data: Any, parameters: dict[str, Any], dim: int, seed: int
) -> None:
    encoded = CODEBOOK.encode(example(seed=seed), parameters)
    current, decoded = encoded, CODEBOOK.decode(encoded)
    for which in (dim, dim - 4, (dim + 1) % 4):
        size = decoded.shape[which]
        indices = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True)))
        current, decoded = CODEBOOK.take(current, which, indices), decoded.index_select(which, indices)
        assert torch.equal(CODEBOOK.decode(current), decoded)
        assert current.shape == tuple(decoded.shape)
        assert current.parameters == encoded.parameters


def test_given_indices_are_looked_up_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for entries in (1, 2, 3, 16, 17, 300):
        indices = torch.randint(0, entries, (5, 4, 3), generator=generator)
        table = torch.randn(entries, generator=generator)
        found = CODEBOOK.decode(encode_codebook(indices, table))
        assert np.array_equal(found.numpy(), table.numpy()[indices.numpy()])
        tables = torch.randn(4, entries, generator=generator)
        found = CODEBOOK.decode(encode_codebook(indices, tables, 1))
        wanted = tables.numpy()[np.arange(4)[None, :, None], indices.numpy()]
        assert np.array_equal(found.numpy(), wanted)


def test_given_indices_that_cannot_be_stored() -> None:
    indices, table = torch.tensor([[0, 1], [2, 3]]), torch.arange(4.0)
    for changes, message in (
        ({"table": torch.arange(3.0)}, "not one of 0..2"),
        ({"indices": indices - 1}, "not one of 0..3"),
        ({"indices": indices.float()}, "an index is not"),
        ({"table": torch.empty(0)}, "0 entries"),
        ({"table": torch.tensor(1.0)}, "0 entries"),
        ({"table": torch.arange(4)}, "floating-point"),
        ({"table": table + float("inf")}, "not finite"),
        ({"table": table.repeat(2, 1)}, "part 'table'"),
        ({"axis": 2}, "axis 2"),
        ({"axis": 0}, "part 'table'"),
    ):
        asked: dict[str, Any] = {"indices": indices, "table": table, **changes}
        with pytest.raises(QuantizationError, match=message):
            encode_codebook(asked.pop("indices"), asked.pop("table"), **asked)


def malformed(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = [
        {"x": 1}, {"kind": "best"}, {"kind": None}, {"bits": 0}, {"bits": 17}, {"bits": True}, {"bits": "4"},
        {"axis": 3}, {"axis": -1}, {"axis": False},
    ]  # fmt: skip
    if parameters["kind"] == "kmeans":
        changes += [{"init": "best"}, {"seed": -1}, {"seed": 0.5}, {"axis": 0}, {"bits": 9}]
    if parameters["kind"] == "apot":
        changes += [{"terms": 0}, {"terms": parameters["bits"]}, {"bits": 9}, {"bits": 1}]
    return [{}, *({**parameters, **change} for change in changes)]


@pytest.mark.parametrize("parameters", SETTINGS)
def test_parts_that_contradict_the_shape_are_refused(parameters: dict[str, Any]) -> None:
    encoded = CODEBOOK.encode(example((3, 4, 3)), parameters)
    faults = [replace(encoded, parts={}), replace(encoded, dtype="int64"), replace(encoded, dtype="x")]
    faults += [replace(encoded, shape=shape) for shape in ((2**31, 2**31), (300,), (0, 2**62, 2**62))]
    faults += [replace(encoded, parts={**encoded.parts, "x": torch.zeros(1)})]
    faults += [replace(encoded, parameters=given_) for given_ in malformed(parameters)]
    for key, part in encoded.parts.items():
        others = {name: value for name, value in encoded.parts.items() if name != key}
        changed = [part.reshape(1, *part.shape), part.to(torch.int64), torch.cat([part.reshape(-1)] * 40)]
        if part.is_floating_point():
            changed += [part * float("nan"), part + float("inf")]
        if key != "scales":
            # Scales may be missing: the table is then read as values, but for its shape.
            faults += [replace(encoded, parts=others)]
        faults += [replace(encoded, parts={**others, key: value}) for value in changed]
    for fault in faults:
        with pytest.raises(CorruptCheckpointError):
            CODEBOOK.decode(fault)
    for given_ in malformed(parameters):
        with pytest.raises(QuantizationError):
            CODEBOOK.encode(example((3, 4, 3)), given_)


def test_an_index_without_an_entry_is_refused() -> None:
    encoded = encode_codebook(torch.tensor([0, 1, 2]), torch.arange(3.0))
    fault = replace(encoded, parts={**encoded.parts, "indices": torch.tensor([0b110100], dtype=torch.uint8)})
    with pytest.raises(CorruptCheckpointError, match="an index is not one of"):
        CODEBOOK.decode(fault)


bytes_ = st.binary(max_size=24).map(lambda raw: torch.tensor(list(raw), dtype=torch.uint8))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 2**31]), max_size=3),
    st.sampled_from([*SETTINGS, {}, {**DISTINCT, "axis": 0}]),
    st.dictionaries(
        st.sampled_from(["indices", "table", "scales"]),
        st.one_of(bytes_, bytes_.map(lambda part: part.float()), st.just(torch.ones(2, 2))),
    ),
)
def test_any_content_decodes_or_is_refused(
    shape: list[int], parameters: dict[str, Any], parts: dict[str, Tensor]
) -> None:
    encoded = EncodedTensor("codebook", tuple(shape), "float32", parts, parameters)
    try:
        decoded = CODEBOOK.decode(encoded)
    except CorruptCheckpointError:
        return
    assert decoded.shape == tuple(shape)
    assert decoded.numel() <= 8 * 24


@pytest.mark.parametrize("parameters", SETTINGS)
def test_empty_and_small_tensors(parameters: dict[str, Any]) -> None:
    for weight in (torch.empty(0, 3), torch.empty(2, 0), torch.tensor([[-3.0]]), torch.zeros(2, 2)):
        encoded = CODEBOOK.encode(weight, parameters)
        assert torch.equal(CODEBOOK.decode(encoded), weight)
        assert all(part.is_contiguous() for part in encoded.parts.values())
    if parameters["axis"] is None:
        assert CODEBOOK.decode(CODEBOOK.encode(torch.tensor(3.0), parameters)) == 3
    turned = example((2, 3, 4, 4)).to(memory_format=torch.channels_last)
    assert same_parts(CODEBOOK.encode(turned, parameters), CODEBOOK.encode(turned.contiguous(), parameters))
    for bad in (float("nan"), -float("inf")):
        with pytest.raises(QuantizationError, match="1 NaN or infinite"):
            CODEBOOK.encode(torch.tensor([[0.0, bad]]), parameters)
    with pytest.raises(QuantizationError, match="floating-point tensors only"):
        CODEBOOK.encode(torch.zeros(2, 2, dtype=torch.int64), parameters)
