"""Ways to store a tensor, against numpy and against their own promises."""

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
from cctool.operations.quantize.stored import METHODS
from cctool.options.quantize.choices import TRAINED, QuantizeMethod
from cctool.quantization.encodings.table import ENCODINGS
from cctool.quantization.encodings.uint8 import from_levels, min_max, to_levels

AFFINE = ENCODINGS["affine-u8"]
ALL: list[tuple[str, dict[str, Any]]] = [
    ("fp16", {}),
    ("bf16", {}),
    ("affine-u8", {"axis": None}),
    ("affine-u8", {"axis": 0}),
    ("affine-u8", {"axis": 1}),
]


def numpy_levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q = round((w - min) / (max - min) * 255) and w' = q / 255 * (max - min) + min, one range."""
    wide = values.astype(np.float64)
    low, high = wide.min(), wide.max()
    if low == high:
        return np.zeros(values.shape, np.uint8), values
    levels = np.round((wide - low) / (high - low) * 255)
    return levels.astype(np.uint8), (levels / 255 * (high - low) + low).astype(values.dtype)


def same_parts(first: EncodedTensor, second: EncodedTensor) -> bool:
    return first.parts.keys() == second.parts.keys() and all(
        part.dtype == second.parts[name].dtype and torch.equal(part, second.parts[name])
        for name, part in first.parts.items()
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1.0, -50.0])
def test_affine_is_the_formula(scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(5, 4, 3, 3, generator=generator) + offset) * scale
    encoded = AFFINE.encode(weight, {"axis": None})
    levels, values = numpy_levels(weight.numpy())
    assert np.array_equal(encoded.parts["levels"].numpy(), levels)
    assert np.array_equal(AFFINE.decode(encoded).numpy(), values)


@pytest.mark.parametrize("axis", [0, 1])
def test_affine_per_channel_is_the_formula_for_each_channel(axis: int) -> None:
    weight = torch.randn(5, 4, 3, 3) * torch.logspace(-3, 3, 4).view(1, 4, 1, 1)
    encoded = AFFINE.encode(weight, {"axis": axis})
    decoded = AFFINE.decode(encoded)
    for channel in range(weight.shape[axis]):
        levels, values = numpy_levels(weight.select(axis, channel).numpy())
        assert np.array_equal(encoded.parts["levels"].select(axis, channel).numpy(), levels)
        assert np.array_equal(decoded.select(axis, channel).numpy(), values)
    assert encoded.parts["low"].shape == (weight.shape[axis],)


def test_halves_round_to_even() -> None:
    # 0..255 are the levels themselves; halves in between go to the even neighbour.
    weight = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 255.0])
    assert AFFINE.encode(weight, {"axis": None}).parts["levels"].tolist() == [0, 0, 2, 2, 4, 255]


def test_the_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(1000)
    decoded = AFFINE.decode(AFFINE.encode(weight, {"axis": None}))
    step = float(weight.max() - weight.min()) / 255
    assert float((decoded - weight).abs().max()) <= step / 2 * (1 + 1e-5)
    assert float((decoded - weight).abs().max()) > step / 4


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -1e30, 1e-40])
def test_constants_are_exact(value: float) -> None:
    weight = torch.full((3, 2), value)
    for parameters in ({"axis": None}, {"axis": 0}):
        assert torch.equal(AFFINE.decode(AFFINE.encode(weight, parameters)), weight)
    mixed = torch.stack([torch.full((4,), value), torch.arange(4.0)])
    assert torch.equal(AFFINE.decode(AFFINE.encode(mixed, {"axis": 0}))[0], mixed[0])


def test_min_and_max_are_exact_even_where_one_is_much_the_smaller() -> None:
    weight = torch.tensor([-1e10, 1e-10, -3.0])
    decoded = AFFINE.decode(AFFINE.encode(weight, {"axis": None}))
    assert decoded[0] == weight[0]
    assert decoded[1] == weight[1]


def test_fp16_and_bf16_are_the_casts() -> None:
    weight = torch.randn(64, 3)
    assert np.array_equal(
        ENCODINGS["fp16"].decode(ENCODINGS["fp16"].encode(weight, {})).numpy(),
        weight.numpy().astype(np.float16).astype(np.float32),
    )
    bits = weight.numpy().view(np.uint32).astype(np.uint64)
    # Rounded half to even on the upper 16 bits of a float32.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert np.array_equal(ENCODINGS["bf16"].decode(ENCODINGS["bf16"].encode(weight, {})).numpy(), rounded)


def test_bytes_are_what_they_should_be() -> None:
    weight = torch.randn(8, 4, 3, 3)
    sizes = [ENCODINGS[name].encode(weight, parameters).nbytes for name, parameters in ALL]
    assert sizes == [576, 576, 288 + 8, 288 + 64, 288 + 32]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.floats(-60_000, 60_000, width=32)


DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.sampled_from(DTYPES))
def test_encoding_what_was_decoded_gives_the_same_bytes(
    data: Any, rows: int, columns: int, dtype: torch.dtype
) -> None:
    number, count = data.draw(st.sampled_from([floats, small])), rows * columns
    values = data.draw(st.lists(number, min_size=count, max_size=count))
    weight = torch.tensor(values).reshape(rows, columns).to(dtype)
    if not weight.isfinite().all():
        return
    for name, parameters in ALL:
        if name == "fp16" and weight.abs().max() > 60_000:
            continue
        if name == "bf16" and weight.abs().max() > 3e38:
            continue
        encoding = ENCODINGS[name]
        encoded = encoding.encode(weight, parameters)
        decoded = encoding.decode(encoded)
        assert decoded.shape == weight.shape
        assert decoded.dtype == weight.dtype
        assert decoded.isfinite().all()
        assert same_parts(encoding.encode(decoded, encoded.parameters), encoded)
        if name == "affine-u8":
            axis = parameters["axis"]
            dims = () if axis is None else (1 - axis,)
            for bound in (torch.amin, torch.amax):
                assert torch.equal(bound(decoded, dims), bound(weight, dims))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(ALL), st.integers(0, 3), st.integers(0, 2**16))
def test_taking_is_cutting_what_is_decoded(
    data: Any, kind: tuple[str, dict[str, Any]], dim: int, seed: int
) -> None:
    name, parameters = kind
    weight = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(seed))
    indices = data.draw(st.lists(st.integers(0, weight.shape[dim] - 1), min_size=1, unique=True))
    encoding = ENCODINGS[name]
    encoded = encoding.encode(weight, parameters)
    for which in (dim, dim - 4):
        taken = encoding.take(encoded, which, torch.tensor(indices))
        assert torch.equal(
            encoding.decode(taken), encoding.decode(encoded).index_select(dim, torch.tensor(indices))
        )
        assert taken.shape == tuple(encoding.decode(taken).shape)
        assert taken.parameters == encoded.parameters
    # Cut twice, along both the channels and another dimension, is still what was decoded.
    twice = encoding.take(encoding.take(encoded, 0, torch.tensor([2, 0])), 1, torch.tensor([1]))
    assert torch.equal(encoding.decode(twice), encoding.decode(encoded)[[2, 0]][:, [1]])


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_odd_shapes_and_memory(name: str, parameters: dict[str, Any]) -> None:
    encoding = ENCODINGS[name]
    transposed = torch.randn(6, 4).t()
    for weight in (
        torch.empty(0, 3),
        transposed,
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ):
        encoded = encoding.encode(weight, parameters)
        assert all(part.is_contiguous() for part in encoded.parts.values())
        assert encoding.decode(encoded).shape == weight.shape
    for weight in (torch.tensor(3.0), torch.randn(5)):
        if parameters.get("axis") is None:
            assert encoding.decode(encoding.encode(weight, parameters)).shape == weight.shape
    trained = torch.nn.Parameter(torch.randn(3, 3))
    assert not encoding.decode(encoding.encode(trained, parameters)).requires_grad


@pytest.mark.parametrize(("name", "parameters"), ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_refused(bad: float, name: str, parameters: dict[str, Any]) -> None:
    weight = torch.zeros(2, 2)
    weight[0, 1] = bad
    with pytest.raises(QuantizationError, match="1 NaN or infinite"):
        ENCODINGS[name].encode(weight, parameters)


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_integers_are_refused(name: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match="floating-point tensors only, not int64"):
        ENCODINGS[name].encode(torch.arange(4).reshape(2, 2), parameters)


def test_overflow_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"65500.* 1e\+05|6\.55e\+04.*1e\+05"):
        ENCODINGS["fp16"].encode(torch.tensor([1e5]), {})
    with pytest.raises(QuantizationError, match="range"):
        AFFINE.encode(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64), {"axis": None})
    assert ENCODINGS["bf16"].encode(torch.tensor([1e5]), {}).nbytes == 2


@pytest.mark.parametrize("axis", [2, -1, 0.5, "0", True, [0]])
def test_an_axis_that_is_none(axis: Any) -> None:
    with pytest.raises(QuantizationError, match="axis"):
        AFFINE.encode(torch.zeros(2, 2), {"axis": axis})


def broken(encoded: EncodedTensor, **update: Any) -> EncodedTensor:
    parts = {key: value for key, value in {**encoded.parts, **update}.items() if value is not None}
    return replace(encoded, parts=parts)


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_parts_that_contradict_the_shape_are_refused(name: str, parameters: dict[str, Any]) -> None:
    encoding = ENCODINGS[name]
    encoded = encoding.encode(torch.randn(3, 4), parameters)
    faults = [
        replace(encoded, shape=(2**31 - 1, 2**31 - 1)),
        replace(encoded, shape=(12,)),
        replace(encoded, shape=(4, 3)),
        replace(encoded, dtype="int64"),
        replace(encoded, dtype="no such type"),
        broken(encoded, surprise=torch.zeros(1)),
        replace(encoded, parts={}),
    ]
    for key, part in encoded.parts.items():
        faults += [
            broken(encoded, **{key: None}),
            broken(encoded, **{key: part.reshape(1, *part.shape)}),
            broken(encoded, **{key: part.to(torch.int16)}),
        ]
    if name == "affine-u8":
        faults += [
            replace(encoded, parameters=p) for p in ({}, {"axis": 2}, {"axis": -1}, {"axis": 0, "x": 1})
        ]
        other = {"axis": None if parameters["axis"] is not None else 0}
        faults.append(replace(encoded, parameters=other))
    for fault in faults:
        with pytest.raises(CorruptCheckpointError):
            encoding.decode(fault)
    encoding.decode(encoded)


def test_names_and_methods_are_complete() -> None:
    assert {encoding.name for encoding in ENCODINGS.values()} == set(ENCODINGS)
    assert all(encoding.name == name for name, encoding in ENCODINGS.items())
    assert set(METHODS) == set(QuantizeMethod) - TRAINED
    assert all(ENCODINGS[encoding.name] is encoding for encoding in METHODS.values())


def test_level_arithmetic_for_other_numbers_of_levels() -> None:
    weight = torch.tensor([-1.0, -0.2, 0.3, 2.0])
    low, high = min_max(weight)
    levels: Tensor = to_levels(weight, low, high, 3)
    assert levels.tolist() == [0, 1, 1, 3]
    assert torch.equal(from_levels(levels, low, high, 3), torch.tensor([-1.0, 0.0, 0.0, 2.0]).double())
