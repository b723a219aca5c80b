"""Two-channel filter banks of PyWavelets' discrete wavelets along one axis, periodic at the borders.

One level of an even number N of samples, for filters of F taps (Mallat, A Wavelet Tour of Signal Processing,
3rd ed. 2008, section 7.3; the alignment is that of PyWavelets' mode "periodization"):

    a_i = sum_m dec_lo[m] x[(2i + F/2 - m) mod N],    d_i likewise with dec_hi
    x_n = sum_i rec_lo[n - 2i - 1 + F/2] a_i + rec_hi[...] d_i,    indices again mod N

What an odd number of samples does is a choice of the caller's. ``square=False`` replicates the last sample,
as PyWavelets does: (N + 1) / 2 coefficients of either kind. ``square=True`` transforms the other samples
and hands the last one to the approximation unchanged: N coefficients in all, and an orthonormal matrix
where the wavelet is orthogonal.

Coefficients stand in the order of `pywt.wavedec`: approximation, coarsest detail, ..., finest detail.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pywt
from numpy.typing import NDArray

__all__ = ["WAVELETS", "FilterBank", "band_sizes", "filter_bank", "wavelet_matrix"]

WAVELETS: tuple[str, ...] = tuple(name for name in pywt.wavelist(kind="discrete") if name != "dmey")
"""Names of the wavelets. dmey is left out: its filters are cut off, and their inverse is off by 0.2 %."""


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
    return FilterBank(
        np.array([wavelet.dec_lo, wavelet.dec_hi]),
        np.array([wavelet.rec_lo, wavelet.rec_hi]),
    )


def band_sizes(size: int, levels: int, *, square: bool) -> list[int]:
    """Number of coefficients of each band: the approximation, the coarsest detail, ..., the finest detail."""
    details = []
    for _ in range(levels):
        details.append(size // 2 if square else (size + 1) // 2)
        size = (size + 1) // 2
    return [size, *reversed(details)]


def wavelet_matrix(
    name: str, size: int, levels: int, *, square: bool, synthesis: bool
) -> NDArray[np.float64]:
    """The transform of ``size`` samples over ``levels`` levels as a matrix.

    Returns:
        Shape (coefficients, size), or (size, coefficients) for the synthesis.
    """
    step = _synthesis_step if synthesis else _analysis_step
    bank = filter_bank(name)
    coarser = np.eye(size)
    details: list[NDArray[np.float64]] = []
    for _ in range(levels):
        # Both kinds are built with a coefficient a row; the synthesis is turned over at the end.
        low, high = step(bank, coarser.shape[0], square)
        details.insert(0, high @ coarser)
        coarser = low @ coarser
    matrix = np.concatenate([coarser, *details])
    return np.ascontiguousarray(matrix.T) if synthesis else matrix


def _analysis_step(
    bank: FilterBank, size: int, square: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    taps = bank.taps
    offsets = taps // 2 - np.arange(taps)
    low, high = _periodic(bank.decomposition, offsets, size, square)
    if size % 2 and not square:
        # The replicated sample is the last one once more.
        low[:, -2] += low[:, -1]
        high[:, -2] += high[:, -1]
        low, high = low[:, :-1], high[:, :-1]
    return low, high


def _synthesis_step(
    bank: FilterBank, size: int, square: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    taps = bank.taps
    offsets = np.arange(taps) + 1 - taps // 2
    low, high = _periodic(bank.reconstruction, offsets, size, square)
    if size % 2 and not square:
        low, high = low[:, :-1], high[:, :-1]
    return low, high


def _periodic(
    filters: NDArray[np.float64], offsets: NDArray[np.int64], size: int, square: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of shifted filters; an odd ``size`` is rounded up, or its last sample handed on (square)."""
    half = size // 2 if square else (size + 1) // 2
    rows = np.zeros((2, half, 2 * half))
    if half:
        starts = 2 * np.arange(half)
        columns = (starts[:, None] + offsets) % (2 * half)
        for band in range(2):
            # add.at: filters longer than the signal meet the same sample more than once.
            np.add.at(rows[band], (np.arange(half)[:, None], columns), filters[band])
    low, high = rows
    if size % 2 and square:
        low = np.pad(low, ((0, 1), (0, 1)))
        low[-1, -1] = 1
        high = np.pad(high, ((0, 0), (0, 1)))
    return low, high
