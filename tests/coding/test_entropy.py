"""Bits of histograms against bits of codewords, and the entropy against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from cctool.coding.exp_golomb import encode
from cctool.coding.histogram import best_k, code_bits, entropy_bits, histogram
from seg_reference import codeword


def laplace(scale: float, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    drawn = torch.empty(count).exponential_(1 / scale, generator=generator)
    return (signs * drawn).round().clamp(-128, 127).to(torch.int8)


@pytest.mark.parametrize("scale", [0.2, 2.0, 60.0])
def test_bits_of_a_histogram_are_those_of_the_payload(scale: float) -> None:
    values = laplace(scale, 5000)
    bits = code_bits(histogram(values, signed=True))
    assert bits.dtype == torch.int64
    assert bits.tolist() == [encode(values, k, signed=True).bits for k in range(6)]
    assert entropy_bits(histogram(values, signed=True)) <= bits.min()


@pytest.mark.parametrize(("scale", "expected"), [(0.2, 1), (4.0, 2), (100.0, 5)])
def test_the_best_order(scale: float, expected: int) -> None:
    counts = histogram(laplace(scale, 5000), signed=True)
    sums = [
        sum(int(count) * len(codeword(u, k)) for u, count in enumerate(counts.tolist())) for k in range(6)
    ]
    assert best_k(counts) == 1 + sums[1:].index(min(sums[1:])) == expected
    assert best_k(counts, smallest=0) == sums.index(min(sums))


def test_order_0_where_it_is_allowed() -> None:
    counts = torch.tensor([10, 10, 0, 0])
    assert best_k(counts, smallest=0) == 0
    assert best_k(counts) == 1


def test_entropy_in_closed_form() -> None:
    assert entropy_bits(torch.tensor([8, 8, 8, 8])) == pytest.approx(64)
    assert entropy_bits(torch.tensor([0, 90, 10])) == pytest.approx(
        -90 * math.log2(0.9) - 10 * math.log2(0.1), rel=1e-12
    )
    assert entropy_bits(torch.tensor([0, 5])) == 0
    assert entropy_bits(torch.tensor([0])) == 0
    assert math.copysign(1, entropy_bits(torch.tensor([7]))) == 1


def test_counts_beyond_32_bits_stay_exact() -> None:
    many = (1 << 40) + 1
    assert code_bits(torch.tensor([many, 1])).tolist() == [many + k + 2 for k in range(6)]
