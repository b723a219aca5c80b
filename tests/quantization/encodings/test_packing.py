"""Packed integers against Python's own arithmetic of long integers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.quantization.encodings import packing
from cctool.quantization.encodings.packing import pack_integers, packed_size, unpack_integers


def as_one_number(values: list[int], bits: int) -> list[int]:
    """The stream of bits as one long integer, written little-endian."""
    number = sum(value << (bits * i) for i, value in enumerate(values))
    return list(number.to_bytes(-(-len(values) * bits // 8), "little"))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 16))
def test_packing_is_one_long_little_endian_number(data: Any, bits: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_integers(torch.tensor(values, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == as_one_number(values, bits)
    assert len(packed) == packed_size(len(values), bits)
    found = unpack_integers(packed, bits, len(values), "x")
    assert found.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert found.tolist() == values


@pytest.mark.parametrize("bits", [3, 8, 11])
def test_pieces_join_without_a_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, 75)
    monkeypatch.setattr(packing, "_PIECE", 16)
    packed = pack_integers(torch.from_numpy(values).reshape(5, 15), bits)
    assert packed.tolist() == as_one_number(values.tolist(), bits)
    assert unpack_integers(packed, bits, 75, "x").tolist() == values.tolist()


@pytest.mark.parametrize(("value", "bits"), [(4, 2), (-1, 2), (256, 8), (2**16, 16)])
def test_integers_that_do_not_fit_are_refused(value: int, bits: int) -> None:
    with pytest.raises(QuantizationError, match=f"do not fit into {bits} bits"):
        pack_integers(torch.tensor([0, value]), bits)


def test_other_types_and_widths_are_refused() -> None:
    with pytest.raises(QuantizationError, match="not float32"):
        pack_integers(torch.ones(2), 4)
    for bits in (0, 17):
        with pytest.raises(QuantizationError, match="cannot be packed"):
            pack_integers(torch.ones(2, dtype=torch.int64), bits)


def test_bytes_that_contradict_the_count_are_refused_before_anything_is_allocated() -> None:
    packed = pack_integers(torch.tensor([1, 2, 3]), 3)
    padded = packed.clone()
    padded[-1] |= 128
    for fault, count in (
        (packed, 2**60),
        (packed, 2),
        (packed, 6),
        (packed[:1], 3),
        (packed.reshape(1, -1), 3),
        (packed.to(torch.int8), 3),
        (padded, 3),
    ):
        with pytest.raises(CorruptCheckpointError, match="x: "):
            unpack_integers(fault, 3, count, "x")
