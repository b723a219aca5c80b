"""The codec against straightforward numpy, scipy and PyWavelets, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from pydantic import ValidationError
from torch import Tensor

from cctool.options.transform_choices import TransformPreset
from cctool.transforms.codec import CodecConfig, CodecState, Symbols, encode, reconstruct, simulate
from cctool.transforms.tables import default_table, preset_tables

DCT = {"kernel": "dct", "norm": "none", "symbol_bits": 8}
SIZES = [(8, 8), (7, 7), (14, 14), (20, 20), (1, 1), (7, 20), (32, 32), (3, 50)]


def maps(n: int, c: int, h: int, w: int, *, negative: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(n, c, max(1, h // 3), max(1, w // 3), generator=generator)
    x = torch.nn.functional.interpolate(smooth, size=(h, w), mode="bilinear")
    x = x + 0.1 * torch.randn(n, c, h, w, generator=generator)
    return x if negative else x.relu()


def state(x: Tensor, bases: dict[str, Tensor] | None = None, **config: Any) -> CodecState:
    given = {"table": (4.0,)} | config
    return CodecState(CodecConfig(**given), torch.stack((x.min(), x.max())), bases or {})


def integers(x: Tensor, bits: int = 8) -> Any:
    top = 2**bits - 1
    return np.clip(np.round(x.double().numpy() / (float(x.max()) / top)), 0, top)


def published_dct(v: Any, qlist: tuple[float, ...], bits: int = 8) -> Any:
    """Semantics of the published coder, block by block; also its reconstruction."""
    q = np.array([[qlist[i + j] for j in range(8)] for i in range(8)])
    symbols, back = np.zeros_like(v), np.zeros_like(v)
    for top in range(0, v.shape[2], 8):
        for left in range(0, v.shape[3], 8):
            block = v[:, :, top : top + 8, left : left + 8]
            steps = q[: block.shape[2], : block.shape[3]]
            found = scipy.fft.dctn(block, type=2, axes=(2, 3), norm=None) / steps
            found = np.clip(np.round(found), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            place = np.s_[:, :, top : top + 8, left : left + 8]
            symbols[place] = found
            back[place] = scipy.fft.idctn(found * steps, type=2, axes=(2, 3), norm=None)
    return symbols, back


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", list(TransformPreset)[:2])
def test_dct_presets_are_the_published_coder(size: tuple[int, int], preset: TransformPreset) -> None:
    x = maps(2, 3, *size)
    choice = preset_tables(preset, 8, 3)
    assert choice is not None
    assert choice.last is not None
    for table in (choice.table, choice.last):
        codec = state(x, table=table.steps, **DCT)
        symbols, back = published_dct(integers(x), table.steps)
        found = encode(x, codec)
        assert np.array_equal(found.bands[0].numpy(), symbols)
        expected = back * (float(x.max()) / 255)
        assert np.allclose(reconstruct(found, codec).numpy(), expected, atol=1e-5 * float(x.max()))
