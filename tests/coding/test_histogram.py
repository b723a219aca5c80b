"""Counts of symbols against numpy's, and that counting on a GPU does not wait for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cctool.base.errors import TransformError
from cctool.coding import histogram as module
from cctool.coding.histogram import Histogram, histogram
from seg_reference import symbol


def numbers(dtype: torch.dtype, count: int = 4000) -> torch.Tensor:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    low, high = max(info.min, -40_000), min(info.max, 40_000)
    drawn = torch.randint(low, high + 1, (count // 10, 10), generator=generator)
    drawn[::2] = 0
    return drawn.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "signed"),
    [(torch.int8, True), (torch.uint8, False), (torch.int16, True), (torch.int32, True)],
)
def test_counts(dtype: torch.dtype, signed: bool) -> None:
    values = numbers(dtype)
    symbols = [symbol(v, signed) for v in values.flatten().tolist()]
    counts = histogram(values, signed=signed)
    assert counts.dtype == torch.int64
    expected = np.bincount(symbols, minlength=len(counts))
    assert counts.tolist() == expected.tolist()


def test_small_types_have_all_bins_at_once() -> None:
    assert len(histogram(torch.zeros(1, dtype=torch.int8), signed=True)) == 256
    assert len(histogram(torch.zeros(1, dtype=torch.int8), signed=False)) == 128
    assert len(histogram(torch.zeros(0, dtype=torch.int16), signed=True)) == 1 << 16


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers(torch.int8)
    whole = histogram(values, signed=True)
    monkeypatch.setattr(module, "_PIECE", 37)
    seen = Histogram(signed=True)
    for batch in values.split(100):
        seen.add(batch)
    assert torch.equal(seen.counts, whole)


def test_bins_grow_with_the_values() -> None:
    seen = Histogram(signed=True)
    seen.add(torch.tensor([0, 1], dtype=torch.int32))
    assert seen.counts.tolist() == [1, 0, 1]
    seen.add(torch.tensor([-3], dtype=torch.int32))
    assert seen.counts.tolist() == [1, 0, 1, 0, 0, 1]
    seen.add(torch.zeros(2, 2, dtype=torch.int32))
    assert seen.counts.tolist() == [5, 0, 1, 0, 0, 1]


def test_bins_are_bounded() -> None:
    seen = Histogram(signed=True, limit=100)
    seen.add(torch.tensor([49], dtype=torch.int32))
    with pytest.raises(TransformError, match="symbol 100: a histogram of at most 100 bins"):
        seen.add(torch.tensor([50], dtype=torch.int32))
    with pytest.raises(TransformError, match="-1: unsigned symbols"):
        histogram(torch.tensor([2, -1], dtype=torch.int8), signed=False)


def test_the_way_of_a_gpu_counts_alike() -> None:
    """The code path of a GPU, here on the CPU: it differs in arithmetic, not in what it calls."""
    for dtype in (torch.int8, torch.int16):
        values = numbers(dtype)
        seen = Histogram(signed=True)
        seen._reserve(torch.iinfo(dtype).max * 2 + 2)
        seen._scatter(values.long().flatten().abs())
        assert torch.equal(
            seen.counts, torch.bincount(values.long().flatten().abs(), minlength=len(seen.counts))
        )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_cuda_counts_as_the_cpu(dtype: torch.dtype) -> None:
    values = numbers(dtype)
    seen = Histogram(signed=True)
    seen.add(values[:0].cuda())
    if dtype != torch.int32:
        on_device = values.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.add(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        seen.add(values.cuda())
    assert seen.counts.is_cuda
    assert torch.equal(seen.counts.cpu(), histogram(values, signed=True))
