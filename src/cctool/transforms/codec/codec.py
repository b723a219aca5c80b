"""The codec of a tap: feature maps to symbols and back.

    x -> integers -> [- mean of the sample] -> [channels decorrelated] -> transform -> / steps -> symbols

and the inverse; the next layer gets the reconstruction. Everything is computed in float64 and in a fixed
order, so that a decoder reproduces the encoder's reconstruction from the symbols bit for bit. The order and
the formulas are those of the code of "feature-compression" (2019), without its faults: it modified the
caller's map, dequantized edge blocks with other steps than it had quantized them with, and had no gradient
through the DCT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from cctool.base.errors import UsageError
from cctool.checkpoint.spec import Record
from cctool.transforms.codec.quantizers import PrequantizerLevels, Rounded, prequantizer_levels, to_symbols
from cctool.transforms.codec.steps import block_steps, check_table, quality_scale, wavelet_steps
from cctool.transforms.kernels.by_name import check_kernel, is_wavelet
from cctool.transforms.kernels.spatial import Blocks, CalibratedBlocks, NoTransform, Spatial, Wavelet

_Step = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


class CodecConfig(Record):
    """All settings of a tap's codec that are not tensors.

    Attributes:
        kernel: of the spatial transform; ``klt`` has calibrated bases.
        bits: of the quantizer before the transform.
        symbol_bits: that symbols are clamped to; None is as many as they need.
        block: nominal side of a block.
        levels: of a wavelet.
        norm: scale that the steps of a DCT, DST or DFT refer to.
        mean_shift: subtract each sample's mean, which is transmitted separately.
        prequantizer: how values become integers.
        k: order of the exponential-Golomb code.
        table: steps at quality 50, see `steps`. Empty if there is no second quantizer.
        original_units: whether the table is in units of the map's values, not of the integers.
        quality: 1 to 100, scales the steps; None does not.
        dead_zone: levels begin at n + 0.5 + dead_zone steps.
        channel_klt: decorrelate channels by a calibrated basis before the spatial transform.
        allocated: whether a calibrated table follows the outputs' sensitivity to each coefficient.
        calibrated: which of ``k``, ``prequantizer`` and ``table`` calibration chose, and may choose again.
        images: number of images used for calibration.
    """

    kernel: str = Field(max_length=32)
    bits: int = Field(default=8, ge=2, le=16, strict=True)
    symbol_bits: int | None = Field(default=None, ge=2, le=32, strict=True)
    block: int = Field(default=8, ge=2, le=64, strict=True)
    levels: int = Field(default=3, ge=1, le=10, strict=True)
    norm: Literal["ortho", "none"] = "ortho"
    mean_shift: bool = False
    prequantizer: Literal["unsigned", "offset", "signed"] = "unsigned"
    k: int = Field(default=1, ge=0, le=5, strict=True)
    table: tuple[_Step, ...] = Field(default=(), max_length=64 * 64)
    original_units: bool = False
    quality: float | None = Field(default=None, ge=1, le=100, allow_inf_nan=False)
    dead_zone: float = Field(default=0.0, ge=0, lt=0.5, allow_inf_nan=False)
    channel_klt: bool = False
    allocated: bool = False
    calibrated: tuple[Literal["k", "prequantizer", "table"], ...] = Field(default=(), max_length=3)
    images: int = Field(default=0, ge=0, strict=True)

    @field_validator("kernel")
    @classmethod
    def _known(cls, kernel: str) -> str:
        try:
            check_kernel(kernel, klt=True)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return kernel

    @model_validator(mode="after")
    def _consistent(self) -> CodecConfig:
        if self.norm == "none" and self.kernel not in ("dct", "dst", "dft"):
            raise ValueError(f"--norm none is a scale of dct, dst and dft, not of {self.kernel}")
        if self.allocated and self.norm == "none":
            raise ValueError("--allocate chooses steps of orthonormal coefficients: --norm ortho is needed")
        if not self.transforms:
            second = (
                self.table,
                self.mean_shift,
                self.dead_zone,
                self.quality,
                self.symbol_bits,
                self.allocated,
            )
            if any(second):
                raise ValueError(
                    "--kernel identity has one quantizer, of --bits: --q-table, --allocate, --mean-shift, "
                    "--dead-zone, --quality and --symbol-bits are for the one behind a transform "
                    "(--channel-klt is one)"
                )
            return self
        try:
            check_table(self.table, self.kernel, self.block, self.levels, "the table")
        except UsageError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def transforms(self) -> bool:
        """Whether there is a transform, and so a second quantizer."""
        return self.kernel != "identity" or self.channel_klt

    @property
    def signed(self) -> bool:
        """Whether symbols have a sign."""
        return self.transforms or self.prequantizer == "signed"


@dataclass(frozen=True)
class CodecState:
    """A codec with its calibrated tensors.

    Attributes:
        config: its settings.
        bounds: (2,) smallest and largest value of the map in calibration.
        bases: orthogonal matrices, one row per basis function: ``channels`` (C, C); for ``klt`` also
            ``rows``, ``rows_rest``, ``columns``, ``columns_rest``, as far as the map has blocks of these
            sides.
    """

    config: CodecConfig
    bounds: Tensor
    bases: Mapping[str, Tensor] = field(default_factory=dict)

    def grid(self) -> PrequantizerLevels:
        """Levels of the quantizer before the transform."""
        return prequantizer_levels(self.bounds, self.config.prequantizer, self.config.bits)

    def spatial(self) -> Spatial:
        """The spatial transform."""
        config = self.config
        if is_wavelet(config.kernel):
            return Wavelet(config.kernel, config.levels)
        if config.kernel == "klt":
            return CalibratedBlocks(config.block, self.bases)
        return NoTransform() if config.kernel == "identity" else Blocks(config.kernel, config.block)

    def steps(self, size: tuple[int, int], bands: int, device: torch.device) -> list[Tensor]:
        """Steps of the orthonormal coefficients of each band, float64, broadcastable to it."""
        config = self.config
        scale: Tensor | float = quality_scale(config.quality)
        if config.original_units:
            scale = scale / self.grid().step
        if is_wavelet(config.kernel):
            found = [torch.tensor(step, dtype=torch.float64) for step in wavelet_steps(config.table, bands)]
        else:
            found = [block_steps(config.table, config.kernel, config.norm, config.block, *size, device)]
        return [step * scale for step in found]


@dataclass(frozen=True)
class Symbols:
    """The symbols of one batch of maps.

    Attributes:
        bands: int32 tensors. One of shape (N, C, H, W) for block transforms and without a transform; for
            wavelets details (N, C, 3, h, w) from the finest to the coarsest, then LL (N, C, h, w).
        means: float32 (N,), if each sample's mean is transmitted separately; in units of the integers.
        shape: (N, C, H, W) of the maps.
        clamped: int64 (2,), how many values the first and the second quantizer clamped; None if not
            requested.
    """

    bands: tuple[Tensor, ...]
    means: Tensor | None
    shape: tuple[int, int, int, int]
    clamped: Tensor | None = None


def encode(x: Tensor, state: CodecState, *, look: bool = True) -> Symbols:
    """Encode maps ``x`` (N, C, H, W), floating point, on the codec's device; not modified.

    ``look`` counts what is clamped.
    """
    made = encoded_maps(x, state, look=look, look_inside=look)
    if not look:
        return made.symbols
    second = [item.clamped() for item in made.rounded]
    second = second or [torch.zeros((), dtype=torch.int64, device=x.device)]
    return replace(made.symbols, clamped=torch.stack((made.integers.clamped(), torch.stack(second).sum())))


@dataclass(frozen=True)
class EncodedMaps:
    """The symbols, and the intermediate results of the encoder.

    Attributes:
        symbols: without counts of clamped values.
        integers: result of the quantizer before the transform.
        rounded: result of the one behind it, per band; empty without a transform.
        scaled: what was rounded last, float64, in units of its step.
        steps: of these, in units of the integers.
    """

    symbols: Symbols
    integers: Rounded
    rounded: list[Rounded]
    scaled: list[Tensor]
    steps: list[Tensor]


@torch.no_grad()
def encoded_maps(x: Tensor, state: CodecState, *, look: bool, look_inside: bool) -> EncodedMaps:
    """`encode`, with intermediate results.

    ``look`` and ``look_inside`` find out what the quantizers before and behind the transform clamped.
    """
    config = state.config
    shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    integers = state.grid().to_integers(x, look=look)
    if not config.transforms:
        alone = Symbols((integers.values.to(torch.int32),), None, shape)
        return EncodedMaps(alone, integers, [], [integers.values], [torch.ones_like(state.grid().step)])
    v, means = integers.values, None
    if config.mean_shift:
        # Rounded to the float32 that is transmitted, so that the decoder adds what was subtracted.
        means = v.mean((1, 2, 3)).float()
        v = v - means.double()[:, None, None, None]
    coefficients = state.spatial().forward(mix_channels(v, state.bases.get("channels")))
    steps = state.steps(shape[2:], len(coefficients), x.device)
    scaled = [band / step for band, step in zip(coefficients, steps, strict=True)]
    rounded = [to_symbols(band, config.symbol_bits, config.dead_zone, look=look_inside) for band in scaled]
    symbols = Symbols(tuple(item.values for item in rounded), means, shape)
    return EncodedMaps(symbols, integers, rounded, scaled, steps)


@torch.no_grad()
def reconstruct(symbols: Symbols, state: CodecState) -> Tensor:
    """Decode ``symbols`` from `encode` or a bitstream, on the codec's device, to float32 (N, C, H, W)."""
    size = symbols.shape[2:]
    if not state.config.transforms:
        return state.grid().to_values(symbols.bands[0].double()).float()
    steps = state.steps(size, len(symbols.bands), symbols.bands[0].device)
    # Contiguous, because the order of a matrix product's sums, and so its rounding, depends on the memory
    # layout, and symbols from a bitstream have another one than the encoder's.
    coefficients = [band.contiguous() * step for band, step in zip(symbols.bands, steps, strict=True)]
    basis = state.bases.get("channels")
    v = mix_channels(state.spatial().inverse(coefficients, size), None if basis is None else basis.T)
    if symbols.means is not None:
        v = v + symbols.means.double()[:, None, None, None]
    return state.grid().to_values(v).to(torch.float32, memory_format=torch.contiguous_format)


def mix_channels(x: Tensor, basis: Tensor | None) -> Tensor:
    """Apply a matrix (C, C) to the channels of (N, C, H, W)."""
    if basis is None:
        return x
    return (basis.to(x) @ x.flatten(2)).view_as(x)
