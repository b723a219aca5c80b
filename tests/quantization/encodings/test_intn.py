"""The encoding ``intn`` against loops over slices and runs in numpy."""

import math
from collections.abc import Iterator
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
from cctool.quantization.encodings.intn import INTN, encode_integers, integers_of

SETTINGS = [
    {"bits": bits, "symmetric": symmetric, "axis": axis, "group": group}
    for bits, symmetric, axis, group in (
        (8, True, None, None),
        (8, False, None, None),
        (2, True, 0, None),
        (3, False, 1, None),
        (4, True, 0, 5),
        (4, False, 0, 5),
        (5, True, None, 7),
        (6, False, 2, 1),
        (7, True, 1, 1000),
    )
]


def example(shape: tuple[int, ...] = (3, 4, 2, 5), seed: int = 0, offset: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def runs(weight: np.ndarray, axis: int | None, group: int | None) -> Iterator[np.ndarray]:
    """The values of each range, slice by slice and run by run."""
    slices = [weight] if axis is None else [weight.take(i, axis) for i in range(weight.shape[axis])]
    for values in slices:
        row = values.reshape(-1)
        step = group or len(row)
        yield from (row[start : start + step] for start in range(0, len(row), step))


def same_parts(first: EncodedTensor, second: EncodedTensor) -> bool:
    return first.parts.keys() == second.parts.keys() and all(
        part.dtype == second.parts[name].dtype and torch.equal(part, second.parts[name])
        for name, part in first.parts.items()
    )


@pytest.mark.parametrize("parameters", SETTINGS)
def test_scales_and_integers_are_those_of_each_run(parameters: dict[str, Any]) -> None:
    weight = example()
    encoded = INTN.encode(weight, parameters)
    found = integers_of(encoded)
    axis, group, bits = parameters["axis"], parameters["group"], parameters["bits"]
    scales = found.scale.reshape(-1).tolist()
    zeros = [0] * len(scales) if found.zero_point is None else found.zero_point.reshape(-1).tolist()
    wanted = list(runs(weight.numpy().astype(np.float64), axis, group))
    stored = list(runs(found.integers.numpy(), axis, group))
    decoded = list(runs(INTN.decode(encoded).numpy(), axis, group))
    assert len(scales) == len(wanted)
    for values, integers, after, scale, zero in zip(wanted, stored, decoded, scales, zeros, strict=True):
        low, high = min(values.min(), 0), max(values.max(), 0)
        if parameters["symmetric"]:
            top = 2 ** (bits - 1) - 1
            exact, bounds = max(-low, high) / top, (-top, top)
        else:
            exact, bounds = (high - low) / (2**bits - 1), (0, 2**bits - 1)
            assert abs(zero - -low / scale) <= 0.5 + 1e-9
        assert exact * (1 - 2**-15) <= scale <= exact
        steps = np.clip(np.rint(values / scale) + zero, *bounds)
        assert np.abs(integers - steps).max() <= (0 if parameters["symmetric"] else 1)
        assert np.abs(after - values).max() <= scale * (0.5 + 2**-6)
        assert np.array_equal(after, (integers - zero).astype(np.float32) * np.float32(scale))


def test_integers_by_hand() -> None:
    weight = torch.tensor([[-3.0, 1.4, 1.5, 2.5], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 15.0]])
    symmetric = INTN.encode(weight, {"bits": 3, "symmetric": True, "axis": 0, "group": None})
    found = integers_of(symmetric)
    assert found.scale.tolist() == [1.0, 1.0, 5.0]
    # Halves go to the even neighbour.
    assert found.integers.tolist() == [[-3, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 3]]
    affine = integers_of(INTN.encode(weight, {"bits": 4, "symmetric": False, "axis": 0, "group": 2}))
    assert affine.zero_point is not None
    assert affine.scale[2].tolist() == [pytest.approx(1 / 15, rel=2**-19), 1.0]
    assert affine.zero_point[:2].tolist() == [[10, 0], [0, 0]]
    assert affine.integers[2].tolist() == [0, 15, 2, 15]


@pytest.mark.parametrize(
    ("shape", "parameters", "bytes_"),
    [
        ((8, 4, 3, 3), {"bits": 4, "symmetric": True, "axis": None, "group": None}, 144 + 4),
        ((8, 4, 3, 3), {"bits": 4, "symmetric": False, "axis": None, "group": None}, 144 + 5),
        ((8, 4, 3, 3), {"bits": 3, "symmetric": True, "axis": 0, "group": None}, 108 + 32),
        ((8, 4, 3, 3), {"bits": 2, "symmetric": True, "axis": 0, "group": 10}, 72 + 8 * 4 * 4),
    ],
)
def test_bytes_are_what_they_should_be(
    shape: tuple[int, ...], parameters: dict[str, Any], bytes_: int
) -> None:
    assert INTN.encode(torch.randn(shape), parameters).nbytes == bytes_


def test_each_setting_changes_what_is_decoded() -> None:
    base = {"bits": 4, "symmetric": True, "axis": None, "group": None}
    weight = example()
    plain = INTN.decode(INTN.encode(weight, base))
    for change in ({"bits": 5}, {"symmetric": False}, {"axis": 0}, {"axis": 1}, {"group": 6}):
        assert not torch.equal(INTN.decode(INTN.encode(weight, {**base, **change})), plain)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_stays_zero(bits: int, symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(1), torch.linspace(0.7, 3.3, 50)])
    for values in (weight, -weight, weight - 3 * (weight > 2)):
        encoded = INTN.encode(values, {"bits": bits, "symmetric": symmetric, "axis": None, "group": None})
        assert INTN.decode(encoded)[0] == 0


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.floats(-60_000, 60_000, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.data(), st.integers(1, 4), st.integers(1, 7), st.integers(2, 8), st.booleans(),
    st.sampled_from([None, 0, 1]), st.sampled_from([None, 1, 2, 5]),
)  # fmt: skip
def test_encoding_what_was_decoded_gives_the_same_bytes(
    data: Any, rows: int, columns: int, bits: int, symmetric: bool, axis: int | None, group: int | None
) -> None:
    number, count = data.draw(st.sampled_from([floats, small])), rows * columns
    values = data.draw(st.lists(number, min_size=count, max_size=count))
    weight = torch.tensor(values).reshape(rows, columns)
    parameters = {"bits": bits, "symmetric": symmetric, "axis": axis, "group": group}
    try:
        encoded = INTN.encode(weight, parameters)
    except QuantizationError as error:
        assert "larger than its type" in str(error)  # noqa: PT017
        assert weight.abs().max() > 1e38
        return
    decoded = INTN.decode(encoded)
    assert decoded.isfinite().all()
    assert same_parts(INTN.encode(decoded, encoded.parameters), encoded)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float64, 8), (torch.float16, 8), (torch.bfloat16, 6)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_types_keep_their_integers(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    weight = example((20, 30)).to(dtype)
    parameters = {"bits": bits, "symmetric": symmetric, "axis": 0, "group": None}
    encoded = INTN.encode(weight, parameters)
    decoded = INTN.decode(encoded)
    assert decoded.dtype == dtype
    assert encoded.parts["scale"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    again = integers_of(INTN.encode(decoded, parameters))
    assert torch.equal(again.integers, integers_of(encoded).integers)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(SETTINGS), st.integers(0, 3), st.integers(0, 2**16))
def test_taking_is_cutting_what_is_decoded(
    data: Any, parameters: dict[str, Any], dim: int, seed: int
) -> None:
    weight = example(seed=seed)
    encoded = INTN.encode(weight, parameters)
    current, decoded = encoded, INTN.decode(encoded)
    for which in (dim, dim - 4, (dim + 1) % 4):
        size = decoded.shape[which]
        indices = torch.tensor(
            data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
        )
        current, decoded = INTN.take(current, which, indices), decoded.index_select(which, indices)
        assert torch.equal(INTN.decode(current), decoded)
        assert current.shape == tuple(decoded.shape)
        assert current.parameters == encoded.parameters


def test_a_cut_keeps_the_scales_of_what_is_left_only() -> None:
    encoded = INTN.encode(example((4, 6)), {"bits": 4, "symmetric": True, "axis": 0, "group": 2})
    assert encoded.parts["scale"].shape == (4, 3)
    first = INTN.take(encoded, 1, torch.tensor([0, 1, 4]))
    assert torch.equal(first.parts["scale"], encoded.parts["scale"][:, [0, 2]])
    # Two and one: the regular runs of three elements need no lengths.
    assert "lengths" not in first.parts
    second = INTN.take(encoded, 1, torch.tensor([0, 2, 3]))
    assert second.parts["lengths"].tolist() == [1, 2]
    assert "lengths" not in INTN.take(encoded, 0, torch.tensor([3, 1])).parts


def test_given_integers_decode_to_their_products_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        scale = torch.rand(6, 3, generator=generator) + 0.01  # 24 digits each: products are rounded
        signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 4, 2), generator=generator)
        each = np.repeat(scale.numpy(), 3, axis=1)[:, :8].reshape(6, 4, 2)
        found = INTN.decode(encode_integers(signed, scale, bits=bits, axis=0, group=3))
        assert np.array_equal(found.numpy(), signed.numpy().astype(np.float32) * each)
        unsigned = torch.randint(0, 2**bits, (6, 4, 2), generator=generator)
        zero = torch.randint(0, 2**bits, (6, 3), generator=generator)
        shifted = unsigned.numpy() - np.repeat(zero.numpy(), 3, axis=1)[:, :8].reshape(6, 4, 2)
        found = INTN.decode(encode_integers(unsigned, scale, zero, bits=bits, axis=0, group=3))
        assert np.array_equal(found.numpy(), shifted.astype(np.float32) * each)


def test_given_integers_that_cannot_be_stored() -> None:
    integers, scale = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    for changes, message in (
        ({"scale": torch.ones(3)}, "scales of shape"),
        ({"scale": torch.ones(2, dtype=torch.int64)}, "scales of shape"),
        ({"scale": torch.tensor([1.0, float("nan")])}, "negative, not finite"),
        ({"scale": torch.tensor([1.0, -1.0])}, "negative, not finite"),
        ({"scale": torch.tensor([1.0, 0.1], dtype=torch.float64)}, "no torch.float32 number"),
        ({"zero_point": torch.zeros(2)}, "zero points are integers"),
        ({"zero_point": torch.tensor([0, 16])}, "zero point is not one of"),
        ({"integers": integers + 8}, "do not fit"),
        ({"integers": integers - 9}, "do not fit"),
        ({"integers": integers.float()}, "only integers"),
        ({"bits": 1}, "2 to 8 bits"),
        ({"axis": 2}, "axis"),
        ({"group": 0}, "groups"),
        ({"integers": integers + 7, "scale": torch.full((2,), 3e38)}, "larger than float32"),
        ({"dtype": torch.int64}, "floating-point"),
    ):
        given_: dict[str, Any] = {"integers": integers, "scale": scale, "bits": 4, "axis": 0, **changes}
        with pytest.raises(QuantizationError, match=message):
            encode_integers(given_.pop("integers"), given_.pop("scale"), **given_)


@pytest.mark.parametrize("parameters", SETTINGS)
def test_parts_that_contradict_the_shape_are_refused(parameters: dict[str, Any]) -> None:
    encoded = INTN.encode(example((3, 4, 3)), parameters)
    cut = INTN.take(encoded, 1, torch.tensor([0, 2, 3]))
    for form in (encoded, cut):
        INTN.decode(form)
        faults = [replace(form, parts={}), replace(form, dtype="int64"), replace(form, dtype="x")]
        faults += [replace(form, shape=shape) for shape in ((2**31, 2**31), (40,), (0, 2**62, 2**62), ())]
        faults += [replace(form, parts={**form.parts, "x": torch.zeros(1)})]
        for key, part in form.parts.items():
            others = {name: value for name, value in form.parts.items() if name != key}
            changed = [part.reshape(1, *part.shape), part.to(torch.int64), torch.cat([part.reshape(-1)] * 2)]
            if part.is_floating_point():
                changed += [part * float("nan"), part * float("inf"), -part]
            faults += [replace(form, parts=others)]
            faults += [replace(form, parts={**others, key: value}) for value in changed]
        faults += [
            replace(form, parameters=given_)
            for given_ in (
                {}, {**parameters, "x": 1}, {**parameters, "bits": 9}, {**parameters, "bits": True},
                {**parameters, "bits": 4.0}, {**parameters, "axis": 3}, {**parameters, "axis": -1},
                {**parameters, "group": 0}, {**parameters, "group": "1"}, {**parameters, "symmetric": 1},
            )
        ]  # fmt: skip
        for fault in faults:
            with pytest.raises(CorruptCheckpointError):
                INTN.decode(fault)
            with pytest.raises(CorruptCheckpointError):
                integers_of(fault)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    parameters = {"bits": 4, "symmetric": True, "axis": 0, "group": 2}
    cut = INTN.take(INTN.encode(example((4, 6)), parameters), 1, torch.tensor([0, 2, 3]))
    for lengths in ([1, 3], [0, 3], [-1, 4], [2**31 - 1, 1], [3]):
        with pytest.raises(CorruptCheckpointError):
            INTN.decode(
                replace(cut, parts={**cut.parts, "lengths": torch.tensor(lengths, dtype=torch.int32)})
            )


bytes_ = st.binary(max_size=24).map(lambda raw: torch.tensor(list(raw), dtype=torch.uint8))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 2**31]), max_size=3),
    st.fixed_dictionaries(
        {
            "bits": st.integers(0, 9),
            "symmetric": st.booleans(),
            "axis": st.sampled_from([None, 0, 1]),
            "group": st.sampled_from([None, 1, 2, 2**40]),
        }
    ),
    st.dictionaries(
        st.sampled_from(["integers", "scale", "zero_point", "lengths"]),
        st.one_of(
            bytes_,
            bytes_.map(lambda part: part.float()),
            st.just(torch.tensor(1.0)),
            st.lists(st.integers(-2, 4), max_size=3).map(lambda v: torch.tensor(v, dtype=torch.int32)),
        ),
    ),
)
def test_any_content_decodes_or_is_refused(
    shape: list[int], parameters: dict[str, Any], parts: dict[str, Tensor]
) -> None:
    encoded = EncodedTensor("intn", tuple(shape), "float32", parts, parameters)
    try:
        decoded = INTN.decode(encoded)
    except CorruptCheckpointError:
        return
    assert decoded.shape == tuple(shape)
    assert decoded.numel() <= 8 * 24


@pytest.mark.parametrize("parameters", SETTINGS)
def test_empty_and_small_tensors(parameters: dict[str, Any]) -> None:
    axis = parameters["axis"]
    for weight in (
        torch.empty(0, 3, 2),
        torch.empty(2, 0, 1),
        torch.tensor([[[-3.0]]]),
        torch.zeros(2, 2, 2),
    ):
        encoded = INTN.encode(weight, parameters)
        decoded = INTN.decode(encoded)
        assert decoded.shape == weight.shape
        assert decoded.isfinite().all()
        assert not decoded[weight == 0].any()
        assert all(part.is_contiguous() for part in encoded.parts.values())
    single = INTN.decode(INTN.encode(torch.tensor([[[-3.0]]]), parameters))
    assert math.isclose(float(single), -3, rel_tol=2**-14)
    if axis is None:
        assert INTN.decode(INTN.encode(torch.tensor(3.0), parameters)).shape == ()
    turned = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert same_parts(INTN.encode(turned, parameters), INTN.encode(turned.contiguous(), parameters))


def test_what_cannot_be_encoded() -> None:
    parameters = {"bits": 4, "symmetric": False, "axis": None, "group": None}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(QuantizationError, match="1 NaN or infinite"):
            INTN.encode(torch.tensor([0.0, bad]), parameters)
    with pytest.raises(QuantizationError, match="floating-point tensors only"):
        INTN.encode(torch.arange(3), parameters)
    with pytest.raises(QuantizationError, match="range of a tensor"):
        INTN.encode(torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64), parameters)
    with pytest.raises(QuantizationError, match="larger than its type"):
        INTN.encode(torch.tensor([-5.2e37, 3.4e38]), {**parameters, "bits": 2})
