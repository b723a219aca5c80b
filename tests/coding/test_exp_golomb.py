"""The vectorised coder against one that goes bit by bit, and against streams that lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cctool.base.errors import BitstreamError, TransformError, UsageError
from cctool.coding.exp_golomb import CodedIntegers, block_size, decode, encode
from cctool.coding.symbols import code_lengths, to_unsigned
from seg_reference import bit_string, bits_of, decoded, encoded

SIGNED = [torch.int8, torch.int16, torch.int32]


def assert_round_trip(values: Tensor, k: int, *, signed: bool) -> CodedIntegers:
    coded = encode(values, k, signed=signed)
    assert coded.bits == bits_of(to_unsigned(values) if signed else values, k)
    assert coded.bits == int(coded.block_bits.sum())
    assert len(coded.payload) == -(-coded.bits // 8)
    found = decode(coded, k, signed=signed, dtype=values.dtype)
    assert found.dtype == values.dtype
    assert torch.equal(found, values.flatten())
    return coded


@pytest.mark.parametrize(
    ("values", "k", "signed", "expected"),
    [
        ([0, 0, 0], 3, True, "111"),
        ([-1], 0, True, "01"),
        ([-1], 1, True, "010"),
        ([1], 1, True, "011"),
        ([-2, 2], 1, True, "00100" + "00101"),
        ([0, 3, 0], 1, True, "1" + "00111" + "1"),
        ([1, -2, 2], 2, True, "0101" + "0110" + "0111"),
        ([3], 2, True, "001001"),
        ([1, 2, 3, 4], 0, False, "01" + "0010" + "0011" + "000100"),
        ([8], 3, False, "01111"),
        ([9], 3, False, "0010000"),
        ([127], 5, True, "0" + "000" + "1" + "00011101"),
    ],
)
def test_bits_written_by_hand(values: list[int], k: int, signed: bool, expected: str) -> None:
    coded = encode(torch.tensor(values, dtype=torch.int8), k, signed=signed)
    assert bit_string(coded.payload, coded.bits) == expected
    assert decode(coded, k, signed=signed, dtype=torch.int8).tolist() == values


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("dtype", SIGNED)
@pytest.mark.parametrize("signed", [True, False])
def test_equals_the_bitwise_coder(k: int, dtype: torch.dtype, signed: bool) -> None:
    rng = np.random.default_rng(k)
    info = torch.iinfo(dtype)
    parts = [rng.laplace(0, scale, 200).round() for scale in (0.2, 2, 40, 1e4, 1e9)]
    drawn = np.concatenate([*parts, [info.min, info.max, 0, info.max, info.min]]).clip(info.min, info.max)
    values = torch.from_numpy(drawn if signed else np.abs(drawn).clip(0, info.max)).to(dtype)
    coded = encode(values, k, signed=signed)
    bits = bit_string(coded.payload, coded.bits)
    assert bits == encoded(values.tolist(), k, signed)
    assert decoded(bits, len(values), k, signed) == decode(coded, k, signed=signed, dtype=dtype).tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(0, 12), max_size=4),
    law=st.sampled_from(["geometric", "uniform", "sparse", "constant", "extremes"]),
    dtype=st.sampled_from([*SIGNED, torch.uint8]),
    k=st.integers(0, 5),
)
def test_any_shape_and_law_comes_back(
    seed: int, shape: list[int], law: str, dtype: torch.dtype, k: int
) -> None:
    rng, info = np.random.default_rng(seed), torch.iinfo(dtype)
    signed = dtype != torch.uint8
    draws = {
        "geometric": lambda: (rng.geometric(0.3, shape) - 1) * rng.choice([-1, 1], shape),
        "uniform": lambda: rng.integers(info.min, info.max, shape, endpoint=True),
        "sparse": lambda: (rng.random(shape) < 0.02) * rng.integers(-100, 100, shape),
        "constant": lambda: np.full(shape, rng.integers(info.min, info.max, endpoint=True)),
        "extremes": lambda: rng.choice([info.min, info.max, 0], shape),
    }
    drawn = torch.as_tensor(np.asarray(draws[law]()).clip(info.min, info.max))
    assert_round_trip(drawn.to(dtype), k, signed=signed)


@pytest.mark.parametrize(
    ("dtype", "scale", "k"), [(torch.int8, 0.3, 1), (torch.int8, 20.0, 2), (torch.int32, 100.0, 5)]
)
def test_a_million_symbols(dtype: torch.dtype, scale: float, k: int) -> None:
    info = torch.iinfo(dtype)
    drawn = np.random.default_rng(1).laplace(0, scale, 1_000_003).round().clip(info.min, info.max)
    assert_round_trip(torch.from_numpy(drawn).to(dtype), k, signed=True)


def test_blocks_that_differ_much() -> None:
    """Some blocks are done long before others, and long codewords come in bursts."""
    generator = torch.Generator().manual_seed(3)
    values = torch.zeros(1 << 16, dtype=torch.int32)
    values[5000:6500] = torch.randint(-(2**31), 2**31 - 1, (1500,), generator=generator, dtype=torch.int32)
    values[20_000:40_000:7] = 1 << 20
    values[-1] = -(2**31)
    for k in (1, 5):
        assert_round_trip(values, k, signed=True)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1023, 1024, 1025, 131_071, 131_072, 131_073])
def test_lengths_around_a_block(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(-3, 3, (count,), generator=generator, dtype=torch.int8)
    coded = assert_round_trip(values, 1, signed=True)
    assert coded.block == block_size(count)
    assert coded.block % 64 == 0


def test_memory_that_is_not_contiguous() -> None:
    values = torch.arange(-60, 60, dtype=torch.int16).view(2, 3, 20)
    for view in (values.transpose(0, 2), values[:, ::2, 1::3], values.expand(4, 2, 3, 20)):
        assert_round_trip(view, 3, signed=True)


def test_nothing_and_a_single_number() -> None:
    empty = assert_round_trip(torch.zeros(3, 0, 2, dtype=torch.int8), 1, signed=True)
    assert (empty.payload, empty.bits, empty.count, len(empty.block_bits)) == (b"", 0, 0, 0)
    assert assert_round_trip(torch.tensor(-5, dtype=torch.int8), 1, signed=True).bits == 9 - 2


def test_what_cannot_be_coded() -> None:
    with pytest.raises(TransformError, match="-3: the unsigned code"):
        encode(torch.tensor([1, -3], dtype=torch.int8), 1, signed=False)
    with pytest.raises(TransformError, match="float32"):
        encode(torch.zeros(2), 1, signed=True)
    with pytest.raises(TransformError, match="int64"):
        decode(encode(torch.zeros(2, dtype=torch.int8), 1, signed=True), 1, signed=True, dtype=torch.int64)
    with pytest.raises(UsageError, match="k 6"):
        encode(torch.zeros(2, dtype=torch.int8), 6, signed=True)


@pytest.fixture
def sound() -> CodedIntegers:
    generator = torch.Generator().manual_seed(0)
    return encode(torch.randint(-9, 9, (3000,), generator=generator, dtype=torch.int8), 1, signed=True)


def table(*sizes: int) -> np.ndarray:
    return np.array(sizes, dtype=np.uint32)


def lies(sound: CodedIntegers) -> dict[str, CodedIntegers]:
    first, second, third = sound.block_bits.tolist()
    return {
        "more values": replace(sound, count=3001),
        "fewer values": replace(sound, count=2999),
        "negative count": replace(sound, count=-1),
        "huge count": replace(sound, count=1 << 62),
        "no block size": replace(sound, block=0),
        "negative block size": replace(sound, block=-4),
        "huge block size": replace(sound, block=1 << 40),
        "too few blocks": replace(sound, block_bits=table(first, second + third)),
        "a block of nothing": replace(sound, block_bits=table(first + second, 0, third)),
        "a block that takes from the next": replace(sound, block_bits=table(first + 1, second - 1, third)),
        "a block that leaves to the next": replace(sound, block_bits=table(first - 1, second + 1, third)),
        "sizes that wrap around": replace(sound, block_bits=table(first, 2**32 - 1, third)),
        "a block too long": replace(sound, block_bits=table(sound.bits - 2048, 1024, 1024)),
        "payload cut": replace(sound, payload=sound.payload[:-1]),
        "payload longer": replace(sound, payload=sound.payload + b"\0"),
        "more bits": replace(sound, bits=sound.bits + 8, payload=sound.payload + b"\0"),
        "only zeros": replace(sound, payload=bytes(len(sound.payload))),
        "only ones": replace(sound, payload=b"\xff" * (len(sound.payload) - 1) + b"\0"),
    }


@pytest.mark.parametrize("lie", lies(encode(torch.zeros(3000, dtype=torch.int8), 1, signed=True)))
def test_lies_are_refused(sound: CodedIntegers, lie: str) -> None:
    with pytest.raises(BitstreamError):
        decode(lies(sound)[lie], 1, signed=True, dtype=torch.int8)


def test_blocks_may_have_any_size(sound: CodedIntegers) -> None:
    """The format allows other block sizes than this coder chooses."""
    expected = decode(sound, 1, signed=True, dtype=torch.int8)
    single = replace(sound, block=3000, block_bits=table(sound.bits))
    assert torch.equal(decode(single, 1, signed=True, dtype=torch.int8), expected)
    lengths = code_lengths(256, 1)[to_unsigned(expected).long()].numpy()
    for block in (1, 7, 512):
        sums = np.add.reduceat(lengths, np.arange(0, 3000, block)).astype(np.uint32)
        cut = replace(sound, block=block, block_bits=sums)
        assert torch.equal(decode(cut, 1, signed=True, dtype=torch.int8), expected)


def test_values_beyond_the_type_are_refused() -> None:
    coded = encode(torch.tensor([1, 128], dtype=torch.int16), 1, signed=True)
    with pytest.raises(BitstreamError, match=r"symbol 256 .* above 255"):
        decode(coded, 1, signed=True, dtype=torch.int8)
    wide = encode(torch.full((5,), 300, dtype=torch.int16), 1, signed=True)
    with pytest.raises(BitstreamError, match="symbol 600"):
        decode(wide, 1, signed=True, dtype=torch.int8)
    unsigned = encode(torch.tensor([128], dtype=torch.uint8), 1, signed=False)
    with pytest.raises(BitstreamError, match="above 127"):
        decode(unsigned, 1, signed=False, dtype=torch.int8)


@settings(max_examples=150, deadline=None)
@given(payload=st.binary(max_size=64), count=st.integers(0, 600), k=st.integers(0, 5), signed=st.booleans())
def test_random_bytes_are_read_rightly_or_refused(payload: bytes, count: int, k: int, signed: bool) -> None:
    bits = 8 * len(payload)
    coded = CodedIntegers(payload, bits, table(bits) if count else table(), count, 1024)
    try:
        found = decode(coded, k, signed=signed, dtype=torch.int32)
    except BitstreamError:
        return
    assert encoded(found.tolist(), k, signed) == bit_string(payload, bits)
