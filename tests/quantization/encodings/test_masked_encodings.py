"""Bits, and masked weights, against numpy and against their own promises."""

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
from cctool.quantization.encodings.masked import Inner, encode_masked, inner_form, inner_of, narrowed, widened
from cctool.quantization.encodings.table import ENCODINGS

BITS, MASKED = ENCODINGS["bits"], ENCODINGS["masked"]
INNERS = [
    Inner(),
    Inner("fp16"),
    Inner("bf16"),
    Inner("affine-u8"),
    Inner("affine-u8", 0),
    Inner("affine-u8", 1),
    Inner("intn", None, {"bits": 4, "symmetric": True, "group": None}),
    Inner("intn", 0, {"bits": 3, "symmetric": False, "group": None}),
    Inner("intn", 0, {"bits": 5, "symmetric": True, "group": 4}),
    Inner("intn", None, {"bits": 8, "symmetric": False, "group": 7}),
    Inner("codebook", None, {"kind": "kmeans", "bits": 1, "init": "density", "seed": 0}),
    Inner("codebook", 1, {"kind": "apot", "bits": 4, "terms": 2}),
    Inner("codebook", 0, {"kind": "distinct", "bits": 16}),
]


def example(
    shape: tuple[int, ...] = (5, 4, 3, 3), density: float = 0.4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    return torch.randn(shape, generator=generator) * mask, mask


def same_parts(first: EncodedTensor, second: EncodedTensor) -> bool:
    return first.parts.keys() == second.parts.keys() and all(
        part.dtype == second.parts[name].dtype and torch.equal(part, second.parts[name])
        for name, part in first.parts.items()
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**16))
def test_bits_are_numpys(shape: list[int], seed: int) -> None:
    mask = torch.from_numpy(np.asarray(np.random.default_rng(seed).random(tuple(shape)) < 0.5))
    encoded = BITS.encode(mask, {})
    bits = [
        sum(int(b) << i for i, b in enumerate(mask.flatten()[j : j + 8])) for j in range(0, mask.numel(), 8)
    ]
    assert encoded.parts["bits"].tolist() == bits
    decoded = BITS.decode(encoded)
    assert decoded.dtype == torch.bool
    assert torch.equal(decoded, mask)
    for dim, size in enumerate(mask.shape):
        indices = torch.arange(size - 1, -1, -2)
        assert torch.equal(BITS.decode(BITS.take(encoded, dim, indices)), mask.index_select(dim, indices))


def test_bits_store_booleans_only() -> None:
    with pytest.raises(QuantizationError, match="booleans only, not uint8"):
        BITS.encode(torch.zeros(3, dtype=torch.uint8), {})


def test_a_masked_weight_is_its_bits_and_its_values() -> None:
    weight, mask = example()
    encoded = encode_masked(weight, mask)
    assert encoded.parts["values"].tolist() == weight.numpy()[mask.numpy()].tolist()
    assert encoded.nbytes == -(-180 // 8) + 4 * int(mask.sum())
    assert torch.equal(MASKED.decode(encoded), weight)


def test_kept_zeros_stay_kept() -> None:
    weight, mask = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([True, True, False])
    assert encode_masked(weight, mask).parts["values"].tolist() == [0.0, 2.0]
    # Where nobody says what the mask is, zeros are taken for masked.
    assert MASKED.encode(weight, {"inner": None, "axis": None}).parts["values"].tolist() == [2.0]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_levels_have_the_range_of_the_kept_values(axis: int | None) -> None:
    weight, mask = example()
    weight = (weight + 5) * mask  # a range that does not hold zero
    mask[2], weight[2] = False, 0
    encoded = encode_masked(weight, mask, Inner("affine-u8", axis))
    decoded = MASKED.decode(encoded).numpy()
    assert not decoded[~mask.numpy()].any()
    dense, kept = weight.numpy().astype(np.float64), mask.numpy()
    slices = (
        [...] if axis is None else [np.s_[(slice(None),) * axis + (c,)] for c in range(weight.shape[axis])]
    )
    for where in slices:
        values = dense[where][kept[where]]
        if not values.size:
            continue
        low, high = values.min(), values.max()
        wanted = np.round((values - low) / (high - low) * 255) / 255 * (high - low) + low
        assert np.array_equal(decoded[where][kept[where]], wanted.astype(np.float32))


def test_halves_are_the_casts() -> None:
    weight, mask = example()
    decoded = MASKED.decode(encode_masked(weight, mask, Inner("fp16")))
    assert np.array_equal(decoded.numpy(), weight.numpy().astype(np.float16).astype(np.float32))


floats = st.floats(-60_000, 60_000, width=32)


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(INNERS),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_encoding_what_was_decoded_gives_the_same_bytes(
    data: Any, rows: int, columns: int, inner: Inner, dtype: torch.dtype
) -> None:
    count = rows * columns
    values = data.draw(st.lists(floats, min_size=count, max_size=count))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(
        rows, columns
    )
    weight = torch.tensor(values, dtype=dtype).reshape(rows, columns).masked_fill(~mask, 0)
    encoded = encode_masked(weight, mask, inner)
    decoded = MASKED.decode(encoded)
    assert decoded.dtype == dtype
    assert not decoded[~mask].any()
    again = encode_masked(decoded, mask, inner)
    if inner.settings.get("kind") == "apot":
        # Values may lie on a coarser grid with another scale, too.
        torch.testing.assert_close(MASKED.decode(again), decoded)
    else:
        assert same_parts(again, encoded)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("group", [None, 5])
def test_integers_have_the_scales_of_the_kept_values(axis: int | None, group: int | None) -> None:
    weight, mask = example((4, 3, 5))
    weight[1, 2, 3], mask[1, 2, 3] = 50.0, True
    second = mask.clone()
    second[1, 2, 3] = False
    settings_ = {"bits": 6, "symmetric": True, "axis": axis, "group": group}
    inner = inner_of("intn", settings_)
    assert torch.equal(
        MASKED.decode(encode_masked(weight, mask, inner)),
        ENCODINGS["intn"].decode(ENCODINGS["intn"].encode(weight, settings_)),
    )
    kept = encode_masked(weight * second, second, inner)
    dense = ENCODINGS["intn"].encode(weight * second, settings_)
    assert torch.equal(kept.parts["values.scale"], dense.parts["scale"])
    assert float(kept.parts["values.scale"].max()) < 50 / 31


def test_a_codebook_is_that_of_the_kept_values() -> None:
    weight, mask = example()
    parameters: dict[str, Any] = {"kind": "kmeans", "bits": 3, "axis": None, "init": "linear", "seed": 0}
    encoded = encode_masked(weight, mask, inner_of("codebook", parameters))
    row = ENCODINGS["codebook"].encode(weight[mask], parameters)
    assert torch.equal(encoded.parts["values.table"], row.parts["table"])
    assert 0 not in encoded.parts["values.table"]
    assert encoded.nbytes == 180 // 8 + 1 + -(-int(mask.sum()) * 3 // 8) + 8 * 4
    form = inner_form(encoded)
    assert form is not None
    assert same_parts(form, row)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(INNERS), st.integers(0, 3), st.integers(0, 2**16))
def test_taking_is_cutting_what_is_decoded(data: Any, inner: Inner, dim: int, seed: int) -> None:
    weight, mask = example((3, 4, 2, 5), seed=seed)
    indices = torch.tensor(
        data.draw(st.lists(st.integers(0, weight.shape[dim] - 1), min_size=1, unique=True))
    )
    encoded = encode_masked(weight, mask, inner)
    for which in (dim, dim - 4):
        taken = MASKED.take(encoded, which, indices)
        assert torch.equal(MASKED.decode(taken), MASKED.decode(encoded).index_select(dim, indices))
        assert taken.parameters == encoded.parameters
    twice = MASKED.take(MASKED.take(encoded, 0, torch.tensor([2, 0])), 1, torch.tensor([1]))
    assert torch.equal(MASKED.decode(twice), MASKED.decode(encoded)[[2, 0]][:, [1]])


@pytest.mark.parametrize("inner", INNERS)
def test_a_second_mask_rounds_nothing_again(inner: Inner) -> None:
    weight, mask = example()
    second = mask & example(seed=1)[1]
    bits = BITS.encode(second, {}).parts["bits"]
    for encoded in (
        encode_masked(weight, mask, inner),
        *([ENCODINGS[inner.encoding].encode(weight, inner.parameters)] if inner.encoding else []),
    ):
        found = narrowed(encoded, second, bits)
        before = ENCODINGS[encoded.encoding].decode(encoded)
        assert torch.equal(MASKED.decode(found), before * second)
        assert found.parts["bits"] is bits
        assert inner_of("masked", found.parameters) == inner
    with pytest.raises(QuantizationError, match="cannot let stay"):
        narrowed(encode_masked(weight * second, second, inner), mask, bits)


@pytest.mark.parametrize("inner", INNERS)
def test_a_mask_that_takes_nothing_away_leaves_the_inner_form(inner: Inner) -> None:
    weight, mask = example((4, 3, 2), density=1.1)
    encoded = encode_masked(weight, mask, inner)
    found = widened(encoded)
    if inner.encoding is None:
        assert found is None
    else:
        assert found is not None
        assert found.encoding == inner.encoding
        assert torch.equal(ENCODINGS[inner.encoding].decode(found), MASKED.decode(encoded))
    sparse = encode_masked(*example((4, 3, 2)), inner)
    assert widened(sparse) is sparse


@pytest.mark.parametrize("inner", INNERS)
def test_odd_shapes_and_memory(inner: Inner) -> None:
    for weight, mask in (
        example((6, 4)),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)),
        example((2, 3, 4, 4), density=0.0),
        example((2, 3, 4, 4), density=1.1),
    ):
        encoded = encode_masked(
            weight.t() if weight.dim() == 2 else weight, mask.t() if mask.dim() == 2 else mask, inner
        )
        assert all(part.is_contiguous() for part in encoded.parts.values())
        assert MASKED.decode(encoded).shape == (weight.t() if weight.dim() == 2 else weight).shape
    weight, mask = example((2, 3, 4, 4))
    turned = encode_masked(weight.to(memory_format=torch.channels_last), mask, inner)
    assert same_parts(turned, encode_masked(weight, mask.to(memory_format=torch.channels_last), inner))


def test_what_cannot_be_encoded() -> None:
    weight, mask = example((4, 3))
    with pytest.raises(QuantizationError, match="not zero where its mask"):
        encode_masked(weight + 1, mask)
    with pytest.raises(QuantizationError, match="not zero where its mask"):
        encode_masked(weight[:2], mask)
    with pytest.raises(QuantizationError, match="axis 2"):
        encode_masked(weight, mask, Inner("affine-u8", 2))
    with pytest.raises(QuantizationError, match="floating-point tensors only"):
        encode_masked(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    bad = weight.masked_fill(mask, float("nan"))
    for inner in INNERS[1:]:
        with pytest.raises(QuantizationError, match="NaN"):
            encode_masked(bad, mask, inner)
    for name, parameters in (("masked", {"inner": "masked"}), ("bits", {}), ("fp16", {"axis": 0}), ("x", {})):
        with pytest.raises(QuantizationError, match="cannot be stored as"):
            inner_of(name, parameters)  # type: ignore[arg-type]


def broken(encoded: EncodedTensor, **update: Any) -> EncodedTensor:
    return replace(encoded, parts={k: v for k, v in {**encoded.parts, **update}.items() if v is not None})


@pytest.mark.parametrize("inner", INNERS)
def test_parts_that_contradict_the_shape_are_refused(inner: Inner) -> None:
    weight, mask = example((3, 5))
    encoded = encode_masked(weight, mask, inner)
    flipped = encoded.parts["bits"].clone()
    flipped[0] ^= 1
    padded = encoded.parts["bits"].clone()
    padded[-1] |= 128
    faults = [
        replace(encoded, shape=(2**31 - 1, 2**31 - 1)),
        replace(encoded, shape=(0, 2**31 - 1, 2**31 - 1, 2**31 - 1)),
        replace(encoded, shape=(17,)),
        replace(encoded, shape=(2, 4)),
        replace(encoded, dtype="int64"),
        replace(encoded, dtype="no such type"),
        replace(encoded, parts={}),
        broken(encoded, bits=padded),
        broken(encoded, surprise=torch.zeros(1)),
        broken(encoded, **{"values.surprise": torch.zeros(1)}),
    ]
    if inner.encoding not in ("intn", "codebook"):
        # One packed value more or fewer may end in the same byte; the file's checksum sees it.
        faults.append(broken(encoded, bits=flipped))
    for key, part in encoded.parts.items():
        faults += [
            broken(encoded, **{key: None}),
            broken(encoded, **{key: part.reshape(1, *part.shape)}),
            broken(encoded, **{key: part.to(torch.int16)}),
            broken(encoded, **{key: torch.cat([part.reshape(-1), part.reshape(-1)])}),
        ]
    parameters: list[dict[str, Any]] = [
        {},
        {"inner": None},
        {"inner": "masked", "axis": None},
        {"inner": "nothing", "axis": None},
        {"inner": "fp16", "axis": 0},
        {"inner": 3, "axis": None},
        {"inner": "affine-u8", "axis": 2},
        {"inner": "affine-u8", "axis": -1},
        {"inner": "affine-u8", "axis": True},
        {**encoded.parameters, "x": 1},
    ]
    faults += [replace(encoded, parameters=given) for given in parameters]
    for fault in faults:
        with pytest.raises(CorruptCheckpointError):
            MASKED.decode(fault)
    MASKED.decode(encoded)


def test_bits_that_contradict_the_shape_are_refused() -> None:
    encoded = BITS.encode(torch.ones(3, 5, dtype=torch.bool), {})
    for fault in (
        replace(encoded, shape=(2**31 - 1, 2**31 - 1)),
        replace(encoded, shape=(17,)),
        replace(encoded, shape=(3, 4)),  # 12 bits: the other three are no padding
        replace(encoded, dtype="float32"),
        replace(encoded, parameters={"x": 1}),
        broken(encoded, bits=None),
        broken(encoded, more=torch.zeros(1)),
        broken(encoded, bits=encoded.parts["bits"].to(torch.int8)),
        broken(encoded, bits=encoded.parts["bits"][:1]),
    ):
        with pytest.raises(CorruptCheckpointError):
            BITS.decode(fault)
