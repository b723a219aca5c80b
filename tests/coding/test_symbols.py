"""Numbering of signed values and lengths of codewords, against the published table and a bitwise coder."""

from __future__ import annotations

import pytest
import torch

from cctool.base.errors import TransformError, UsageError
from cctool.coding.symbols import code_length, code_lengths, symbol_limit, to_unsigned
from seg_reference import codeword, to_signed

VALUES = [0, -1, 1, -2, 2, 3, 8, 127, -128]
# Lengths of the values above that the table generator of the published code gives.
PUBLISHED = {
    1: [1, 3, 3, 5, 5, 5, 9, 15, 17],
    2: [1, 4, 4, 4, 4, 6, 8, 16, 16],
    3: [1, 5, 5, 5, 5, 5, 7, 15, 15],
    4: [1, 6, 6, 6, 6, 6, 6, 14, 14],
    5: [1, 7, 7, 7, 7, 7, 7, 13, 13],
}


@pytest.mark.parametrize("k", PUBLISHED)
def test_the_published_lengths(k: int) -> None:
    symbols = to_unsigned(torch.tensor(VALUES, dtype=torch.int8)).long()
    assert code_lengths(257, k)[symbols].tolist() == PUBLISHED[k]
    assert [code_length(u, k) for u in symbols.tolist()] == PUBLISHED[k]


@pytest.mark.parametrize("k", range(6))
def test_lengths_are_those_of_the_codewords(k: int) -> None:
    expected = [len(codeword(u, k)) for u in range(2000)]
    lengths = code_lengths(2000, k)
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == expected
    for u in (2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32):
        assert code_length(u, k) == len(codeword(u, k))


def test_no_length_of_no_symbols() -> None:
    assert code_lengths(0, 2).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_numbering_is_a_bijection(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    inner = torch.arange(max(info.min, -1000), min(info.max, 1000) + 1).to(dtype)
    values = torch.cat([inner, torch.tensor([info.min, info.max], dtype=dtype)])
    symbols = to_unsigned(values)
    assert (symbols >= 0).all()
    assert symbols.max() == symbol_limit(dtype, signed=True) == 2**info.bits - 1
    assert torch.equal(to_signed(symbols).to(dtype), values)
    assert symbols[values == -1] == 1  # the negative one comes first


def test_refusals() -> None:
    with pytest.raises(TransformError, match="float32: the signed code takes int8"):
        to_unsigned(torch.zeros(3))
    with pytest.raises(TransformError, match="uint8: the signed code"):
        to_unsigned(torch.zeros(3, dtype=torch.uint8))
    for k in (-1, 6):
        with pytest.raises(UsageError, match="0 to 5"):
            code_lengths(4, k)
