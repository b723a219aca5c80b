"""Statistics of what passes through taps: accumulated batch by batch on the device, read once at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cctool.coding.histogram import best_k, code_bits, entropy_bits
from cctool.coding.symbols import to_unsigned
from cctool.transforms.codec.codec import Symbols
from cctool.transforms.codec.stream import StreamHeader, overhead_bytes, pass_bytes, state_size
from cctool.transforms.codec.taps import TapHook, taps_of
from cctool.transforms.kernels.blocks import block_positions
from cctool.transforms.kernels.by_name import is_wavelet


@dataclass(frozen=True)
class BandCounts:
    """How often each symbol occurred in one sub-band.

    Attributes:
        name: ``LL``, ``LH1`` (finest) and so on for wavelets; for blocks ``0``, ``1``, ..., the anti-diagonal
            i + j of a block from low to high frequencies; ``all`` without a transform.
        counts: by unsigned symbol; signed symbols are numbered 0, -1, 1, -2, 2, ...
    """

    name: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TapFigures:
    """One tap on one split.

    Attributes:
        name: of the module.
        shape: (C, H, W) of its maps.
        samples: number of images; a tap that is passed twice counts each image twice.
        elements: values of all maps; rates refer to them.
        symbols: number of coded symbols; more than elements if odd sizes are padded.
        minimum: smallest value.
        maximum: largest value.
        mean: of all values.
        zeros: percent of the values that are 0.
        zero_symbols: percent of the symbols that are 0, the sparsity in the transform domain.
        k: order of the code.
        payload_bits: of all symbols at the orders 0 to 5.
        best_k: the order with the fewest.
        side_bits: all other bits of the tap's stream, with one chunk per batch at the tap's own order: header
            with the steps, range and bases, means, block tables, checksums, and padding of the last bytes.
        entropy_bits: zero-order entropy of all symbols together, the bound for codes of single symbols.
        clamped_values: values that the quantizer before the transform clamped.
        clamped_symbols: coefficients that the one behind it clamped.
        sqnr_db: signal-to-quantization-noise ratio, 10 log10 of the map's energy over that of its error; None
            if either is 0.
        signed: whether symbols have a sign.
        bands: histograms, too long for the JSON of a command.
    """

    name: str
    shape: tuple[int, int, int]
    samples: int
    elements: int
    symbols: int
    minimum: float
    maximum: float
    mean: float
    zeros: float
    zero_symbols: float
    k: int
    payload_bits: tuple[int, ...]
    best_k: int
    side_bits: int
    entropy_bits: float
    clamped_values: int
    clamped_symbols: int
    sqnr_db: float | None
    signed: bool
    bands: tuple[BandCounts, ...] = field(metadata={"json": False})

    @property
    def bits(self) -> int:
        """Payload at the tap's own order, plus side information."""
        return self.payload_bits[self.k] + self.side_bits

    @property
    def bits_per_element(self) -> float:
        """`bits` per value of the maps."""
        return self.bits / self.elements

    @property
    def ratio_8bit(self) -> float:
        """Eight bits per value over `bits`."""
        return 8 * self.elements / self.bits

    @property
    def ratio_float32(self) -> float:
        """32 bits per value over `bits`."""
        return 32 * self.elements / self.bits


class SymbolCounts:
    """Counts of symbols, on their device.

    Args:
        signed: whether symbols have a sign.
        groups: number of histograms.
    """

    def __init__(self, signed: bool, groups: int = 1) -> None:
        self.signed = signed
        self.groups = groups
        self._counts: Tensor | None = None

    def add(self, values: Tensor, group: Tensor | None = None) -> None:
        """Count the symbols of an int32 tensor of any shape.

        Args:
            values: the symbols.
            group: number of the histogram of each value, int64, broadcast to ``values``; None is the first.
        """
        if not values.numel():
            return
        symbols = to_unsigned(values) if self.signed else values.long()
        size = int(symbols.max()) + 1
        if group is not None:
            symbols = symbols + group * size
        found = torch.bincount(symbols.reshape(-1), minlength=self.groups * size).view(self.groups, size)
        counted = SymbolCounts(self.signed, self.groups)
        counted._counts = found
        self.merge(counted)

    def merge(self, other: SymbolCounts) -> None:
        """Add the counts of another instance with as many groups."""
        if other._counts is None or self._counts is None:
            self._counts = self._counts if other._counts is None else other._counts
            return
        # Batches have different largest symbols.
        size = max(other._counts.shape[1], self._counts.shape[1])
        pad = torch.nn.functional.pad
        self._counts = sum(
            (pad(counts, (0, size - counts.shape[1])) for counts in (self._counts, other._counts)),
            start=torch.zeros((), dtype=torch.int64, device=self._counts.device),
        )

    def pass_of(self) -> tuple[int, Tensor]:
        """Largest symbol counted, and bits of all in the codes of order 0 to 5, on their device."""
        assert self._counts is not None
        return self._counts.shape[1] - 1, code_bits(self._counts.sum(0))

    def table(self) -> Tensor:
        """Counts (groups, symbols), int64 on the CPU; without trailing zeros."""
        found = torch.zeros(self.groups, 1, dtype=torch.int64) if self._counts is None else self._counts.cpu()
        used = found.any(0).nonzero()
        return found[:, : int(used[-1]) + 1 if len(used) else 1]

    def bits(self) -> tuple[int, ...]:
        """Bits of all symbols at the orders 0 to 5."""
        return tuple(code_bits(self.table().sum(0)).tolist())

    def best_order(self) -> int:
        """The order with the fewest bits; of equal ones the smallest."""
        return best_k(self.table().sum(0), smallest=0)

    def entropy_bits(self) -> float:
        """Zero-order entropy of all symbols together, times their number."""
        return entropy_bits(self.table().sum(0))


@dataclass(frozen=True)
class _PassSize:
    """What determines the size of one pass in a stream; bits by order, on their device."""

    samples: int
    symbols: int
    largest: int
    bits: Tensor


class TapStatistics:
    """Running figures of one tap; everything stays on the device until `figures`."""

    def __init__(self, name: str, hook: TapHook) -> None:
        self.name = name
        self.codec = hook.codec
        self.shape = hook.shape
        self.samples = 0
        self.elements = 0
        self._counts = SymbolCounts(hook.codec.signed, len(self._names()))
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._sums: Tensor | None = None
        self._passes: list[_PassSize] = []
        self._dtype = "float32"

    def add(self, symbols: Symbols, x: Tensor, y: Tensor) -> None:
        """Count one pass: the symbols, the maps and their reconstructions."""
        x, y = x.detach(), y.detach()
        self.samples += x.shape[0]
        self.elements += x.numel()
        low, high = torch.aminmax(x)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        x = x.float()
        assert symbols.clamped is not None
        sums = torch.stack(
            (
                x.sum(dtype=torch.float64),
                (x * x).sum(dtype=torch.float64),
                (x - y.float()).square_().sum(dtype=torch.float64),
                torch.count_nonzero(x).double(),
                *symbols.clamped.double(),
            )
        )
        self._sums = sums if self._sums is None else self._sums + sums
        counts = SymbolCounts(self._counts.signed, self._counts.groups)
        for band, group in self._grouped(symbols):
            counts.add(band, group)
        self._counts.merge(counts)
        self._dtype = str(y.dtype).removeprefix("torch.")
        size = sum(band.numel() for band in symbols.bands)
        self._passes.append(_PassSize(x.shape[0], size, *counts.pass_of()))

    def figures(self) -> TapFigures:
        """The figures of all passes; waits for the device. Raises ValueError if there were none."""
        if self._sums is None or self._low is None or self._high is None:
            raise ValueError(f"{self.name}: nothing was passed")
        total, energy, noise, nonzero, values, coefficients = self._sums.tolist()
        table = self._counts.table()
        symbols = int(table.sum())
        names = self._names()
        return TapFigures(
            name=self.name,
            shape=self.shape,
            samples=self.samples,
            elements=self.elements,
            symbols=symbols,
            minimum=float(self._low),
            maximum=float(self._high),
            mean=total / self.elements,
            zeros=100 * (1 - nonzero / self.elements),
            zero_symbols=100 * int(table[:, 0].sum()) / symbols,
            k=self.codec.k,
            payload_bits=self._counts.bits(),
            best_k=self._counts.best_order(),
            side_bits=self._side_bits(),
            entropy_bits=self._counts.entropy_bits(),
            clamped_values=int(values),
            clamped_symbols=int(coefficients),
            sqnr_db=10 * math.log10(energy / noise) if noise and energy else None,
            signed=self.codec.signed,
            bands=tuple(
                BandCounts(name, tuple(row[: int(row.nonzero()[-1]) + 1].tolist()))
                for name, row in zip(names, table, strict=True)
                if row.any()
            ),
        )

    def _side_bits(self) -> int:
        header = StreamHeader.model_validate(
            {"tap": self.name, "codec": self.codec, "shape": self.shape, "dtype": self._dtype}
        )
        bits = torch.stack([found.bits[self.codec.k] for found in self._passes]).tolist()
        size = overhead_bytes(header, state_size(self.codec, self.shape)) + sum(
            pass_bytes(header, found.symbols, found.largest, payload, found.samples)
            for found, payload in zip(self._passes, bits, strict=True)
        )
        return 8 * size - int(sum(bits))

    def _names(self) -> list[str]:
        if is_wavelet(self.codec.kernel):
            levels = range(1, self.codec.levels + 1)
            return [f"{band}{level}" for level in levels for band in ("LH", "HL", "HH")] + ["LL"]
        if self.codec.kernel == "identity":
            return ["all"]
        return [str(diagonal) for diagonal in range(2 * self.codec.block - 1)]

    def _grouped(self, symbols: Symbols) -> list[tuple[Tensor, Tensor | None]]:
        """Bands with the histogram number of each of their values."""
        device = symbols.bands[0].device
        if is_wavelet(self.codec.kernel):
            *details, low = symbols.bands
            three = torch.arange(3, device=device)[:, None, None]
            last = torch.tensor(3 * self.codec.levels, device=device)
            return [*((band, 3 * level + three) for level, band in enumerate(details)), (low, last)]
        if self.codec.kernel == "identity":
            return [(symbols.bands[0], None)]
        place = block_positions(*symbols.shape[2:], self.codec.block)
        return [(symbols.bands[0], (place.row + place.column).to(device))]


class NetworkStatistics:
    """The statistics of all taps of a network; an instance is a `taps.Sink`."""

    def __init__(self, model: nn.Module) -> None:
        self.taps: Mapping[str, TapStatistics] = {
            name: TapStatistics(name, hook) for name, hook in taps_of(model).items()
        }

    def __call__(self, name: str, symbols: Symbols, x: Tensor, y: Tensor) -> None:
        """Count one pass of one tap."""
        self.taps[name].add(symbols, x, y)

    def figures(self) -> tuple[TapFigures, ...]:
        """The figures of the taps that maps passed through."""
        return tuple(tap.figures() for tap in self.taps.values() if tap.samples)
