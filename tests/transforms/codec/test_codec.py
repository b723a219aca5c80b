"""The codec against straightforward numpy, scipy and PyWavelets, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pywt
import scipy.fft
import torch
from pydantic import ValidationError
from torch import Tensor

from cctool.options.transform.choices import TransformPreset
from cctool.transforms.codec.codec import CodecConfig, CodecState, Symbols, encode, reconstruct
from cctool.transforms.codec.steps import default_table, preset_tables
from cctool.transforms.codec.training import simulate, simulate_rated

DCT = {"kernel": "dct", "norm": "none", "symbol_bits": 8}
SIZES = [(8, 8), (7, 7), (14, 14), (20, 20), (1, 1), (7, 20), (32, 32), (3, 50)]
Array = Any


def maps(n: int, c: int, h: int, w: int, *, negative: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(n, c, max(1, h // 3), max(1, w // 3), generator=generator)
    x = torch.nn.functional.interpolate(smooth, size=(h, w), mode="bilinear")
    x = x + 0.1 * torch.randn(n, c, h, w, generator=generator)
    return x if negative else x.relu()


def state(x: Tensor, bases: dict[str, Tensor] | None = None, **config: Any) -> CodecState:
    given = {"kernel": "dct", "table": (4.0,)} | config
    return CodecState(CodecConfig(**given), torch.stack((x.min(), x.max())), bases or {})


def orthogonal(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q.float()


def integers(x: Tensor, bits: int = 8) -> Array:
    top = 2**bits - 1
    return np.clip(np.round(x.double().numpy() / (float(x.max()) / top)), 0, top)


def in_blocks(v: Array, change: Callable[[Array], Array], block: int = 8) -> Array:
    out = np.zeros_like(v)
    for top in range(0, v.shape[2], block):
        for left in range(0, v.shape[3], block):
            place = np.s_[:, :, top : top + block, left : left + block]
            out[place] = change(v[place])
    return out


def published_dct(v: Array, qlist: tuple[float, ...]) -> tuple[Array, Array]:
    """Coefficients in steps, and the steps, as the published coder has them, block by block."""
    q = np.array([[qlist[i + j] for j in range(8)] for i in range(8)])
    steps = in_blocks(np.ones_like(v), lambda block: block * q[: block.shape[2], : block.shape[3]])
    return in_blocks(v, lambda b: scipy.fft.dctn(b, type=2, axes=(2, 3), norm=None)) / steps, steps


def clamped(y: Array, bits: int = 8) -> Array:
    return np.clip(np.round(y), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def assert_symbols(found: Tensor, y: Array, bits: int = 8) -> None:
    """Equal; ties go to the even number, and what is one to float32's precision may go either way."""
    distance = np.abs(np.abs(y) % 1 - 0.5)
    tie, near = distance < 1e-11 * np.maximum(np.abs(y), 1), distance < 1e-7 * np.abs(y)
    expected = np.where(tie, np.clip(2 * np.round(y / 2), -128, 127), clamped(y, bits))
    assert (near & ~tie).mean() < 0.01
    assert np.array_equal(found.numpy()[tie | ~near], expected[tie | ~near])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", list(TransformPreset)[:2])
def test_dct_presets_are_the_published_coder(size: tuple[int, int], preset: TransformPreset) -> None:
    x = maps(2, 3, *size)
    choice = preset_tables(preset, 8, 3)
    assert choice is not None
    assert choice.last is not None
    for table in (choice.table, choice.last):
        codec = state(x, table=table.steps, **DCT)
        y, steps = published_dct(integers(x), table.steps)
        found = encode(x, codec)
        assert_symbols(found.bands[0], y)
        coefficients = found.bands[0].double().numpy() * steps
        back = in_blocks(coefficients, lambda b: scipy.fft.idctn(b, type=2, axes=(2, 3), norm=None))
        expected = back * (float(x.max()) / 255)
        assert np.allclose(reconstruct(found, codec).numpy(), expected, atol=1e-5 * float(x.max()))


@pytest.mark.parametrize("size", SIZES)
def test_dwt_preset_is_the_published_coder(size: tuple[int, int]) -> None:
    x = maps(2, 3, *size, seed=1)
    choice = preset_tables(TransformPreset.FEATURE_COMPRESSION_DWT, 8, 3)
    assert choice is not None
    codec = state(
        x,
        kernel="dwt",
        symbol_bits=8,
        mean_shift=True,
        table=choice.table.steps,
        original_units=choice.table.original,
    )
    v = integers(x)
    mean = v.mean((1, 2, 3), dtype=np.float64).astype(np.float32)
    step = 0.1 * 255 / float(x.max())
    levels = min(3, max(0, (max(size) - 1).bit_length()))
    low = v - mean[:, None, None, None].astype(np.float64)
    expected = []
    for _ in range(levels):
        low, (lh, hl, hh) = pywt.dwt2(low, "haar", mode="periodization", axes=(2, 3))
        expected.append(np.stack((lh, hl, hh), 2))
    found = encode(x, codec)
    assert found.means is not None
    assert np.array_equal(found.means.numpy(), mean)
    assert len(found.bands) == levels + 1
    for band, y in zip(found.bands, [*expected, low], strict=True):
        assert_symbols(band, y / step)
    coefficients = [band.double().numpy() * step for band in found.bands]
    back = coefficients[-1]
    for detail in reversed(coefficients[:-1]):
        back = back[:, :, : detail.shape[3], : detail.shape[4]]
        bands = back, tuple(np.moveaxis(detail, 2, 0))
        back = pywt.idwt2(bands, "haar", mode="periodization", axes=(2, 3))
    back = (back[:, :, : size[0], : size[1]] + mean[:, None, None, None]) * float(x.max()) / 255
    assert np.allclose(reconstruct(found, codec).numpy(), back, atol=1e-5 * float(x.max()))


def test_ties_round_to_even_whatever_the_sum_was() -> None:
    # A constant block of v has a mean coefficient of exactly 8 v: 8 * 10 / 32 = 2.5.
    x = torch.full((1, 1, 8, 8), 10.0)
    codec = CodecState(CodecConfig(kernel="dct", table=(32.0,)), torch.tensor([0.0, 255.0]))
    assert int(encode(x, codec).bands[0][0, 0, 0, 0]) == 2
    assert int(encode(x + 2, codec).bands[0][0, 0, 0, 0]) == 3
    assert int(encode(x + 4, codec).bands[0][0, 0, 0, 0]) == 4  # 3.5


@pytest.mark.parametrize("prequantizer", ["unsigned", "offset", "signed"])
def test_the_prequantizer_alone(prequantizer: str) -> None:
    x = maps(2, 3, 9, 5, negative=prequantizer != "unsigned")
    low, high = float(x.min()), float(x.max())
    codec = state(x, kernel="identity", prequantizer=prequantizer, table=(), bits=6)
    values = x.double().numpy()
    if prequantizer == "signed":
        step, shift, least, most = max(-low, high) / 31, 0.0, -31, 31
    elif prequantizer == "offset":
        step, shift, least, most = (high - low) / 63, low, 0, 63
    else:
        step, shift, least, most = high / 63, 0.0, 0, 63
    expected = np.clip(np.round((values - shift) / step), least, most)
    found = encode(x, codec)
    assert np.array_equal(found.bands[0].numpy(), expected)
    assert np.allclose(reconstruct(found, codec).numpy(), expected * step + shift, atol=1e-6)
    assert codec.config.signed == (prequantizer == "signed")
    assert found.clamped is not None
    assert found.clamped.tolist() == [0, 0]


def test_clamped_values_and_symbols_are_counted() -> None:
    x = torch.full((1, 1, 8, 8), 200.0)
    x[0, 0, 0, :3] = 300.0  # above the range: clamped to 255
    codec = CodecState(CodecConfig(kernel="dct", table=(1.0,), symbol_bits=8), torch.tensor([0.0, 255.0]))
    found = encode(x, codec)
    y = scipy.fft.dctn(np.clip(x.numpy(), 0, 255), axes=(2, 3), norm="ortho")
    assert found.clamped is not None
    assert found.clamped.tolist() == [3, int(((np.round(y) > 127) | (np.round(y) < -128)).sum())]
    assert found.clamped[1] > 0
    wide = CodecState(codec.config.model_copy(update={"symbol_bits": None}), codec.bounds)
    found = encode(x, wide)
    assert found.clamped is not None
    assert found.clamped.tolist() == [3, 0]
    assert int(found.bands[0].max()) > 1600


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft", "haar", "bior2.2", "db3", "klt", "identity"])
@pytest.mark.parametrize("size", [(1, 1), (7, 20), (16, 16)])
@pytest.mark.parametrize("channel_klt", [False, True])
def test_fine_steps_give_the_map_back(kernel: str, size: tuple[int, int], channel_klt: bool) -> None:
    x = maps(2, 5, *size, negative=True)
    bases = {"channels": orthogonal(5)} if channel_klt else {}
    if kernel == "klt":
        for axis, length in (("columns", size[0]), ("rows", size[1])):
            if length >= 8:
                bases[axis] = orthogonal(8, seed=1)
            if length % 8:
                bases[f"{axis}_rest"] = orthogonal(length % 8, seed=2)
    plain = kernel == "identity" and not channel_klt
    codec = state(
        x,
        bases,
        kernel=kernel,
        bits=16,
        prequantizer="offset",
        table=() if plain else (0.5,),
        channel_klt=channel_klt,
        mean_shift=not plain,
    )
    back = reconstruct(encode(x, codec), codec)
    assert back.shape == x.shape
    assert (back - x).abs().max() < 1e-3 * (x.max() - x.min())


def test_all_zero_maps_and_empty_ranges() -> None:
    x = torch.zeros(2, 3, 9, 9)
    for kernel in ("dct", "dwt"):
        codec = state(x, kernel=kernel, mean_shift=True)
        found = encode(x, codec)
        assert not any(band.any() for band in found.bands)
        assert torch.equal(reconstruct(found, codec), x)
    # What was zero in calibration is clamped later: it has no other level.
    assert torch.equal(reconstruct(encode(x + 5, codec), codec).round(), x + 5)


def test_not_a_number_becomes_zero() -> None:
    x = maps(1, 1, 8, 8)
    codec = state(x, kernel="identity", table=())
    x = x.clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1], x[0, 0, 0, 2] = float("nan"), float("inf"), -float("inf")
    assert encode(x, codec).bands[0][0, 0, 0, :3].tolist() == [0, 255, 0]


@pytest.mark.parametrize("kernel", ["dct", "dwt", "identity"])
@pytest.mark.parametrize("work", [encode, simulate])
def test_the_callers_map_is_not_written_to(kernel: str, work: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        x = maps(2, 3, 7, 7, negative=True).to(dtype)
        codec = state(x, kernel=kernel, prequantizer="offset", table=() if kernel == "identity" else (4.0,))
        before = x.clone()
        work(x, codec)
        assert torch.equal(x, before)


@pytest.mark.parametrize("kernel", ["dct", "dst", "dwt", "bior2.2", "identity"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("options", [{}, {"channel_klt": True}, {"mean_shift": True}])
def test_gradients_pass_straight_through(kernel: str, size: tuple[int, int], options: dict[str, Any]) -> None:
    """Against autograd through the same steps written out, with the transform as its explicit matrix."""
    if kernel == "identity" and options != {"channel_klt": True}:
        options = {}
    plain = kernel == "identity" and not options
    x = maps(2, 3, *size, seed=3).requires_grad_()
    basis = orthogonal(3)
    bases = {"channels": basis} if "channel_klt" in options else {}
    bound = 0.8 * x.detach().max()
    config = CodecConfig(
        kernel=kernel, table=() if plain else (3.1,), symbol_bits=None if plain else 4, **options
    )
    codec = CodecState(config, torch.stack((bound * 0, bound)), bases)
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    (simulate(x, codec) * weights).sum().backward()
    found = x.grad
    assert found is not None

    def straight(y: Tensor, low: float, high: float) -> Tensor:
        rounded = y.detach().round()
        inside = (rounded >= low) & (rounded <= high)
        return torch.where(inside, y + (rounded - y).detach(), rounded.clamp(low, high))

    z = x.detach().double().requires_grad_()
    step = float(bound) / 255
    v = straight(z / step, 0, 255)
    if not plain:
        mean = v.mean((1, 2, 3), keepdim=True) if "mean_shift" in options else torch.zeros(())
        turned = v - mean
        if bases:
            turned = torch.einsum("dc,nchw->ndhw", basis.double(), turned)
        bands = [straight(band / 3.1, -8, 7) * 3.1 for band in codec.spatial().forward(turned)]
        turned = codec.spatial().inverse(bands, size)
        if bases:
            turned = torch.einsum("cd,nchw->ndhw", basis.double(), turned)
        v = turned + mean
    (v * step * weights).sum().backward()
    assert z.grad is not None
    assert torch.allclose(found.double(), z.grad, atol=1e-5)
    assert found.abs().max() > 0.1
    assert (found == 0).any()  # above the range nothing passes


def test_simulation_is_the_reconstruction_bit_for_bit() -> None:
    x = maps(2, 3, 20, 20).requires_grad_()
    for kernel in ("dct", "dwt", "identity"):
        codec = state(x.detach(), kernel=kernel, table=() if kernel == "identity" else (4.0,))
        found = simulate(x, codec)
        assert torch.equal(found, reconstruct(encode(x, codec), codec))
        assert found.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_in(dtype: torch.dtype) -> None:
    x = maps(2, 3, 8, 8).to(dtype)
    codec = state(x)
    assert torch.equal(encode(x, codec).bands[0], encode(x.float().to(dtype), codec).bands[0])
    assert reconstruct(encode(x, codec), codec).dtype == torch.float32


BASE: dict[str, Any] = {"kernel": "dct", "table": default_table("dct", 8, 3, 8).steps}


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "dst"},
        {"kernel": "dwt", "table": default_table("dwt", 8, 3, 8).steps},
        {"bits": 6},
        {"symbol_bits": 3},
        {"block": 4, "table": (8.0,)},
        {"norm": "none"},
        {"mean_shift": True},
        {"prequantizer": "signed"},
        {"quality": 80.0},
        {"dead_zone": 0.3},
        {"table": (5.0,)},
        {"original_units": True},
    ],
)
def test_every_setting_changes_the_symbols(change: dict[str, Any]) -> None:
    x = maps(2, 3, 20, 20)

    def coded(**config: Any) -> Symbols:
        return encode(x, state(x, **config))

    before, after = coded(**BASE), coded(**BASE | change)
    assert len(before.bands) != len(after.bands) or not torch.equal(before.bands[0], after.bands[0])


def test_levels_are_those_asked_for() -> None:
    x = maps(1, 2, 32, 32)
    for levels in (1, 2, 5):
        assert len(encode(x, state(x, kernel="haar", levels=levels)).bands) == levels + 1


def test_a_dead_zone_rounds_up_later() -> None:
    x = torch.tensor([10.0, 16.0, 17.5, 18.5, 26.0]).view(1, 1, 1, 5)
    codec = state(x * 10, kernel="dct", block=8, table=(1.0,))
    codec = CodecState(codec.config, torch.tensor([0.0, 255.0]))
    one = torch.full((1, 1, 1, 1), 10.0)
    for step, zone, symbol in ((16.0, 0.0, 1), (16.0, 0.2, 0), (14.0, 0.2, 1), (6.0, 0.2, 1), (6.0, 0.1, 2)):
        config = CodecConfig(kernel="dct", table=(step,), dead_zone=zone)
        assert int(encode(one, CodecState(config, codec.bounds)).bands[0]) == symbol


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kernel": "fft"}, "kernel"),
        ({"kernel": "dct", "table": (1.0, 2.0)}, "2 steps"),
        ({"kernel": "dct", "table": (0.0,)}, "greater than 0"),
        ({"kernel": "dct", "table": (float("nan"),)}, "finite"),
        ({"kernel": "dct", "table": ()}, "0 steps"),
        ({"kernel": "haar", "table": (1.0, 1.0)}, "2 steps"),
        ({"kernel": "haar", "table": (1.0,), "norm": "none"}, "norm none"),
        ({"kernel": "identity", "table": (1.0,)}, "one quantizer"),
        ({"kernel": "identity", "mean_shift": True}, "one quantizer"),
        ({"kernel": "dct", "table": (1.0,), "bits": 1}, "greater than or equal to 2"),
        ({"kernel": "dct", "table": (1.0,), "quality": 0.5}, "greater than or equal to 1"),
        ({"kernel": "dct", "table": (1.0,) * 4097}, "4096"),
        ({"kernel": "dct", "table": (1.0,), "code": "x"}, "not permitted"),
    ],
)
def test_a_hostile_record_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CodecConfig(**config)


@pytest.mark.parametrize("kernel", ["dct", "dwt", "bior2.2", "identity"])
@pytest.mark.parametrize("options", [{}, {"channel_klt": True, "mean_shift": True}])
@pytest.mark.parametrize("symbol_bits", [None, 4])
def test_the_rate_and_its_gradient(kernel: str, options: dict[str, Any], symbol_bits: int | None) -> None:
    """Against autograd through the same steps written out."""
    plain = kernel == "identity" and not options
    x = maps(2, 3, 7, 8, seed=3).requires_grad_()
    bases = {"channels": orthogonal(3)} if options else {}
    bound = 0.8 * x.detach().max()
    table = () if plain else (3.1,)
    config = CodecConfig(kernel=kernel, table=table, symbol_bits=None if plain else symbol_bits, **options)
    codec = CodecState(config, torch.stack((bound * 0, bound)), bases)
    values, found = simulate_rated(x, codec)
    assert torch.equal(values, reconstruct(encode(x, codec), codec))
    (3 * found).backward()

    z = x.detach().double().requires_grad_()
    step = float(bound) / 255
    rounded = (z.detach() / step).round()
    v = torch.where(rounded <= 255, z / step + (rounded - z / step).detach(), 255.0)
    bands: tuple[Tensor, ...] = (v,)
    if not plain:
        turned = v - v.mean((1, 2, 3), keepdim=True) if options else v
        if bases:
            turned = torch.einsum("dc,nchw->ndhw", bases["channels"].double(), turned)
        bands = tuple(band / 3.1 for band in codec.spatial().forward(turned))
    bits = torch.zeros((), dtype=torch.float64)
    for band in bands:
        free = (
            band
            if plain or symbol_bits is None
            else torch.where((band.round() >= -8) & (band.round() <= 7), band, band.detach())
        )
        bits = bits + (1 + 2 * torch.log2(1 + free.abs())).sum()
    (3 * bits).backward()
    assert z.grad is not None
    assert x.grad is not None
    assert float(found.detach()) == pytest.approx(float(bits.detach()), rel=1e-6)
    assert torch.allclose(x.grad.double(), z.grad, rtol=1e-4, atol=1e-4 * float(z.grad.abs().max()))


def test_gradients_of_values_and_rate_add_up() -> None:
    x = maps(2, 3, 8, 8, seed=5)
    codec = state(x, mean_shift=True, channel_klt=True, bases={"channels": orthogonal(3)})

    def gradient(of_values: float, of_bits: float) -> Tensor:
        here = x.clone().requires_grad_()
        values, bits = simulate_rated(here, codec)
        (of_values * values.square().sum() + of_bits * bits).backward()
        assert here.grad is not None
        return here.grad

    together = gradient(1.0, 0.5)
    assert torch.allclose(together, gradient(1.0, 0.0) + gradient(0.0, 0.5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, gradient(1.0, 0.0), rtol=1e-2)
