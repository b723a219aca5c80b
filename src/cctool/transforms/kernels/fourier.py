"""DCT-II, DST-II and real DFT, orthonormal: as matrices, and by the fast Fourier transform.

    DCT-II:  y_k = s_k sum_n x_n cos(pi k (2n + 1) / 2N),        s_0     = sqrt(1/N), else sqrt(2/N)
    DST-II:  y_k = s_k sum_n x_n sin(pi (k + 1) (2n + 1) / 2N),  s_(N-1) = sqrt(1/N), else sqrt(2/N)
    DFT:     y   = (Re Y_0, Re Y_1, Im Y_1, Re Y_2, ...), Y = FFT(x) sqrt(2/N), but sqrt(1/N) for Re Y_0 and,
             where N is even, for the last one

The first two are `scipy.fft.dct` and `dst` of type 2 with ``norm="ortho"`` (Rao and Yip, Discrete Cosine
Transform, 1990); the third has the order of `scipy.fftpack.rfft`. The inverse of each matrix is its
transpose. The fast DCT is that of Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans.
ASSP 28, 1980: one FFT of N real numbers. Functions of tensors work along the last dim, take float32 or
float64 of any shape, and are differentiable.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def dct_matrix(size: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II, one row per frequency, shape (size, size)."""
    rows: NDArray[np.float64] = np.cos(_phases(size, np.arange(size)))
    rows[0] /= math.sqrt(2)
    rows *= math.sqrt(2 / size)
    return rows


def dst_matrix(size: int) -> NDArray[np.float64]:
    """The orthonormal DST-II, one row per frequency, shape (size, size)."""
    rows: NDArray[np.float64] = np.sin(_phases(size, np.arange(1, size + 1)))
    rows[-1] /= math.sqrt(2)
    rows *= math.sqrt(2 / size)
    return rows


def packed_dft_matrix(size: int) -> NDArray[np.float64]:
    """The real orthonormal DFT, rows in the order Re 0, Re 1, Im 1, Re 2, ..., shape (size, size)."""
    row = np.arange(size)
    turns = np.outer((row + 1) // 2, np.arange(size)) % size
    phase = 2 * math.pi / size * turns
    rows: NDArray[np.float64] = np.where(
        (row % 2 == 1)[:, None] | (row == 0)[:, None], np.cos(phase), -np.sin(phase)
    )
    rows[0] /= math.sqrt(2)
    if size % 2 == 0:
        rows[-1] /= math.sqrt(2)
    rows *= math.sqrt(2 / size)
    return rows


def dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II."""
    size = x.shape[-1]
    folded = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)
    spectrum = torch.fft.rfft(folded) * _twiddle(size, -1, x)
    low, high = spectrum.real, -spectrum.imag[..., 1 : (size + 1) // 2].flip(-1)
    return torch.cat((low, high), -1) * _dct_scale(size, x)


def idct(y: Tensor) -> Tensor:
    """Inverse of `dct`."""
    size = y.shape[-1]
    middle = (size + 1) // 2
    y = y / _dct_scale(size, y)
    low = y[..., : size // 2 + 1]
    high = torch.cat((torch.zeros_like(y[..., :1]), y[..., middle:].flip(-1)), -1)
    folded = torch.fft.irfft(torch.complex(low, -high) * _twiddle(size, 1, y), n=size)
    # Undoes the reordering of `dct`: even samples ascending, then odd ones descending.
    order = torch.empty(size, dtype=torch.long, device=y.device)
    order[::2] = torch.arange(middle, device=y.device)
    order[1::2] = torch.arange(size - 1, middle - 1, -1, device=y.device)
    samples: Tensor = folded.index_select(-1, order)
    return samples


def dst(x: Tensor) -> Tensor:
    """Orthonormal DST-II: the DCT-II of the signal with alternating signs, in reverse order."""
    return dct(x * _signs(x)).flip(-1)


def idst(y: Tensor) -> Tensor:
    """Inverse of `dst`."""
    return idct(y.flip(-1)) * _signs(y)


def packed_dft(x: Tensor) -> Tensor:
    """Orthonormal real DFT in the order of `packed_dft_matrix`."""
    size = x.shape[-1]
    parts = torch.view_as_real(torch.fft.rfft(x, norm="ortho")).flatten(-2)
    # The imaginary parts of frequency 0 and of half the sampling rate are zero and are left out.
    packed = torch.cat((parts[..., :1], parts[..., 2 : size + 1]), -1)
    return packed * _dft_scale(size, x)


def packed_idft(y: Tensor) -> Tensor:
    """Inverse of `packed_dft`."""
    size = y.shape[-1]
    y = y / _dft_scale(size, y)
    zero = torch.zeros_like(y[..., :1])
    parts = torch.cat((y[..., :1], zero, y[..., 1:], *((zero,) if size % 2 == 0 else ())), -1)
    samples: Tensor = torch.fft.irfft(torch.complex(parts[..., ::2], parts[..., 1::2]), n=size, norm="ortho")
    return samples


def _phases(size: int, frequencies: NDArray[np.int64]) -> NDArray[np.float64]:
    # Reduced to one turn in integers: in floating point, large arguments of cos lose digits.
    quarters = np.outer(frequencies, 2 * np.arange(size) + 1) % (4 * size)
    return quarters.astype(np.float64) * (math.pi / (2 * size))


def _twiddle(size: int, sign: int, like: Tensor) -> Tensor:
    # In float64, and rounded once at the end.
    unit = sign * math.pi / (2 * size)
    angle = torch.arange(size // 2 + 1, dtype=torch.float64, device=like.device) * unit
    return torch.complex(angle.cos().to(like.dtype), angle.sin().to(like.dtype))


def _dct_scale(size: int, like: Tensor) -> Tensor:
    scale = like.new_full((size,), math.sqrt(2 / size))
    scale[0] = math.sqrt(1 / size)
    return scale


def _dft_scale(size: int, like: Tensor) -> Tensor:
    scale = like.new_full((size,), math.sqrt(2))
    scale[0] = 1
    if size % 2 == 0:
        scale[-1] = 1
    return scale


def _signs(like: Tensor) -> Tensor:
    signs = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    return signs
