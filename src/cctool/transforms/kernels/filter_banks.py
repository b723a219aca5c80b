"""Two-channel filter banks of PyWavelets' discrete wavelets along one axis, periodic at the borders.

One level of an even number N of samples, for filters of F taps (Mallat, A Wavelet Tour of Signal Processing,
3rd ed. 2008, section 7.3; the alignment is that of PyWavelets' mode "periodization"):

    a_i = sum_m dec_lo[m] x[(2i + F/2 - m) mod N],    d_i likewise with dec_hi
    x_n = sum_i rec_lo[n - 2i - 1 + F/2] a_i + rec_hi[...] d_i,    indices again mod N

For an odd number of samples the caller has the choice. ``square=False`` replicates the last sample, as
PyWavelets does: (N + 1) / 2 coefficients of either kind. ``square=True`` transforms the other samples and
appends the last one to the approximation unchanged: N coefficients in all, and an orthonormal matrix where
the wavelet is orthogonal.

Coefficients are in the order of `pywt.wavedec`: approximation, coarsest detail, ..., finest detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pywt
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

WAVELETS: tuple[str, ...] = tuple(name for name in pywt.wavelist(kind="discrete") if name != "dmey")
"""Names of the wavelets, without dmey: its filters are truncated, and its inverse is off by 0.2 %."""


@dataclass(frozen=True)
class FilterBank:
    """The four filters of a wavelet, each of F taps, F even.

    Attributes:
        decomposition: low and high pass, shape (2, F).
        reconstruction: low and high pass, shape (2, F).
    """

    decomposition: NDArray[np.float64]
    reconstruction: NDArray[np.float64]

    @property
    def taps(self) -> int:
        """F."""
        return int(self.decomposition.shape[1])


@cache
def filter_bank(name: str) -> FilterBank:
    """The filters of one of `WAVELETS`."""
    wavelet = pywt.Wavelet(name)
    return FilterBank(np.array([wavelet.dec_lo, wavelet.dec_hi]), np.array([wavelet.rec_lo, wavelet.rec_hi]))


def band_sizes(size: int, levels: int, *, square: bool) -> list[int]:
    """Number of coefficients of each band: approximation, coarsest detail, ..., finest detail."""
    details = []
    for _ in range(levels):
        details.append(size // 2 if square else (size + 1) // 2)
        size = (size + 1) // 2
    return [size, *reversed(details)]


def wavelet_matrix(
    name: str, size: int, levels: int, *, square: bool, synthesis: bool
) -> NDArray[np.float64]:
    """The transform of ``size`` samples over ``levels`` levels as a matrix.

    Its shape is (coefficients, size), or (size, coefficients) for the synthesis.
    """
    bank = filter_bank(name)
    bands = [sparse.csr_array(sparse.identity(size))]
    for _ in range(levels):
        # Both kinds are built with one row per coefficient; the synthesis is transposed at the end.
        low, high = _step_rows(bank, bands[0].shape[0], square, synthesis)
        bands[:1] = [low @ bands[0], high @ bands[0]]
    rows: NDArray[np.float64] = sparse.vstack(bands).toarray()
    return np.ascontiguousarray(rows.T) if synthesis else rows


def analyze(x: Tensor, name: str, *, square: bool) -> tuple[Tensor, Tensor]:
    """One level along the last dim by filtering: for signals much longer than the filters.

    Args:
        x: shape (..., N), N at least the number of taps.
        name: one of `WAVELETS`.
        square: how an odd N is treated, see above.

    Returns:
        Approximation and detail, of sizes `band_sizes`.
    """
    last = x[..., -1:]
    odd = x.shape[-1] % 2
    if odd:
        x = x[..., :-1] if square else torch.cat((x, last), -1)
    bank = filter_bank(name)
    half, reach = x.shape[-1] // 2, bank.taps // 2
    # Periodic borders.
    padded = torch.cat((x[..., x.shape[-1] - reach + 1 :], x, x[..., :reach]), -1)
    taken = [padded[..., tap : tap + 2 * half - 1 : 2] for tap in range(bank.taps)]
    low, high = (_weighted(taken, filters[::-1]) for filters in bank.decomposition)
    return (torch.cat((low, last), -1) if odd and square else low), high


def synthesize(low: Tensor, high: Tensor, name: str, size: int, *, square: bool) -> Tensor:
    """Inverse of `analyze`; returns shape (..., size)."""
    last = low[..., -1:]
    carried = size % 2 == 1 and square
    low = low[..., :-1] if carried else low
    bank = filter_bank(name)
    half, reach = high.shape[-1], bank.taps // 2
    phases = []
    for phase in (0, 1):
        taps = range((phase + 1 + reach) % 2, bank.taps, 2)
        # Sample 2m + phase and coefficient m - shift share the tap 2 * shift + phase - 1 + F/2.
        shifts = [(tap - phase + 1 - reach) // 2 for tap in taps]
        parts = []
        for band, filters in zip((low, high), bank.reconstruction, strict=True):
            padded = torch.cat((band[..., half - reach :], band, band[..., :reach]), -1)
            taken = [padded[..., reach - shift : reach - shift + half] for shift in shifts]
            parts.append(_weighted(taken, filters[list(taps)]))
        phases.append(parts[0] + parts[1])
    samples = torch.stack(phases, -1).flatten(-2)
    return torch.cat((samples, last), -1) if carried else samples[..., :size]


def _weighted(parts: Sequence[Tensor], weights: NDArray[np.float64]) -> Tensor:
    total = parts[0] * float(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total.add(part, alpha=float(weight))
    return total


def _step_rows(
    bank: FilterBank, size: int, square: bool, synthesis: bool
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """One level as sparse rows of the low and of the high pass, with ``size`` columns."""
    taps, half = bank.taps, size // 2 if square else (size + 1) // 2
    offsets = np.arange(taps) + 1 - taps // 2 if synthesis else taps // 2 - np.arange(taps)
    rows = np.repeat(np.arange(half), taps)
    columns = (2 * np.arange(half)[:, None] + offsets).ravel() % max(2 * half, 1)
    filters = np.tile(bank.reconstruction if synthesis else bank.decomposition, half)
    if size % 2 and not square and synthesis:
        # The replicated sample is no output.
        kept = columns < size
        rows, columns, filters = rows[kept], columns[kept], filters[:, kept]
    elif size % 2 and not square:
        columns = np.minimum(columns, size - 1)
    # A filter longer than the signal wraps around: csr_array adds up entries at the same place.
    low, high = (sparse.csr_array((band, (rows, columns)), shape=(half, size)) for band in filters)
    if size % 2 and square:
        carried = sparse.csr_array(([1.0], ([0], [size - 1])), shape=(1, size))
        low = sparse.vstack((low, carried), format="csr")
    return low, high
