"""Every transform by its name: DCT-II, DST-II, real DFT, wavelets, identity, along one axis of a tensor.

The cosine, sine and Fourier transforms are orthonormal (`fourier.py`); wavelets are those of PyWavelets with
periodic borders (`filter_banks.py`), ``dwt`` being ``haar``. A data-driven KLT is no fixed matrix: whoever
offers it makes its basis, and `check_kernel` knows its name.

bfloat16 and float16 are computed in float32 and given back as they came; autocast does not reach in here.

Inverses are exact to rounding, but for the sym wavelets and bior and rbio 4.4, 5.5 and 6.8: to 3e-11, as many
digits as PyWavelets has of their filters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cctool.base.errors import TransformError, UsageError
from cctool.transforms.kernels import fourier
from cctool.transforms.kernels.filter_banks import (
    WAVELETS,
    analyze,
    band_sizes,
    filter_bank,
    synthesize,
    wavelet_matrix,
)
from cctool.transforms.kernels.matmul import along, constant, full_precision

__all__ = [
    "KERNELS",
    "analysis_matrix",
    "check_kernel",
    "coefficient_count",
    "forward",
    "inverse",
    "is_wavelet",
    "kernel_matrix",
    "max_levels",
    "synthesis_matrix",
    "wavelet_name",
]

_ORTHONORMAL: Mapping[str, Callable[[int], NDArray[np.float64]]] = {
    "dct": fourier.dct_matrix,
    "dst": fourier.dst_matrix,
    "dft": fourier.packed_dft_matrix,
    "identity": np.eye,
}
_FAST: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "dct": (fourier.dct, fourier.idct),
    "dst": (fourier.dst, fourier.idst),
    "dft": (fourier.packed_dft, fourier.packed_idft),
    "identity": (torch.clone, torch.clone),
}
# Sizes from which the FFT, or the filters of a wavelet, take less time than a product with a matrix, measured
# on one thread of a CPU, 4 million float32 numbers. Matrices above the largest would cost too much memory.
_LARGE = 256
_PER_TAP = 48
_LARGEST = 1024

KERNELS: tuple[str, ...] = ("dct", "dst", "dft", "dwt", "identity", *WAVELETS)
"""Names of all kernels that are a fixed matrix."""


def check_kernel(name: str, *, klt: bool = False) -> None:
    """Refuse what is no kernel.

    Args:
        name: what the user asked for.
        klt: whether the caller has a data-driven Karhunen-Loeve transform to offer.

    Raises:
        UsageError: naming what is allowed.
    """
    if name in KERNELS or (klt and name == "klt"):
        return
    if name == "dmey":
        raise UsageError(
            "--kernel dmey: its filters have no exact inverse; another wavelet is allowed, as sym8"
        )
    allowed = ["dct", "dst", "dft", "dwt (haar)", *(["klt"] if klt else []), "identity"]
    families = "db1-db38, sym2-sym20, coif1-coif17, bior1.1-bior6.8, rbio1.1-rbio6.8"
    raise UsageError(f"--kernel {name}: {', '.join(allowed)} or a wavelet ({families}) is allowed")


def is_wavelet(name: str) -> bool:
    """Whether a kernel is a wavelet, and so has levels."""
    return name == "dwt" or name in WAVELETS


def max_levels(name: str, size: int) -> int:
    """Levels after which the approximation is one sample; 0 for size 1 and for kernels that have no levels.

    More levels than these are taken as these everywhere.

    >>> max_levels("db2", 7)
    3
    """
    return (size - 1).bit_length() if is_wavelet(name) else 0


def coefficient_count(name: str, size: int, *, levels: int = 1, square: bool = True) -> int:
    """Number of coefficients of ``size`` samples; ``size`` itself but for wavelets with ``square=False``.

    >>> coefficient_count("haar", 7, levels=3, square=False)
    8
    """
    return sum(band_sizes(size, _levels(name, size, levels), square=square))


def kernel_matrix(name: str, size: int, levels: int, square: bool, synthesis: bool) -> NDArray[np.float64]:
    """`analysis_matrix` or `synthesis_matrix` as an array."""
    if is_wavelet(name):
        levels = _levels(name, size, levels)
        return wavelet_matrix(wavelet_name(name), size, levels, square=square, synthesis=synthesis)
    rows = _ORTHONORMAL[name](size)
    return np.ascontiguousarray(rows.T) if synthesis else rows


def analysis_matrix(
    name: str, size: int, *, levels: int = 1, square: bool = True, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The forward transform as a matrix, one row a coefficient.

    Args:
        name: one of `KERNELS`.
        size: number of samples, at least 1.
        levels: of a wavelet, at most `max_levels`; other kernels have none.
        square: what wavelets do with an odd number of samples. True: they hand the last one to the
            approximation, and the matrix is square. False: they replicate it, as PyWavelets does.
        dtype: of the result, which is rounded from float64.

    Returns:
        Shape (coefficients, size), on the CPU; the caller's own.
    """
    return torch.from_numpy(kernel_matrix(name, size, levels, square, False)).to(dtype)


def synthesis_matrix(
    name: str, size: int, *, levels: int = 1, square: bool = True, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The inverse transform as a matrix, one column a coefficient; arguments as in `analysis_matrix`.

    Returns:
        Shape (size, coefficients), on the CPU; the caller's own.
    """
    return torch.from_numpy(kernel_matrix(name, size, levels, square, True)).to(dtype)


def forward(x: Tensor, name: str, dim: int = -1, *, levels: int = 1, square: bool = True) -> Tensor:
    """Transform along one dim; differentiable.

    Args:
        x: any shape, floating point.
        name: one of `KERNELS`.
        dim: along which.
        levels: of a wavelet.
        square: as in `analysis_matrix`.

    Returns:
        The shape of ``x`` but for ``dim``, which holds `coefficient_count` coefficients.

    Raises:
        TransformError: if ``x`` holds no floating-point numbers.
    """
    with full_precision(x) as work:
        size = x.shape[dim]
        if _takes_matrix(name, size):
            levels = _levels(name, size, levels)
            result = along(constant(kernel_matrix, name, size, levels, square, False, like=work), work, dim)
        else:
            last = work.movedim(dim, -1)
            found = _FAST[name][0](last) if name in _FAST else _decomposed(last, name, levels, square)
            result = found.movedim(-1, dim)
    return result.to(x.dtype)


def inverse(
    c: Tensor, name: str, dim: int = -1, *, size: int, levels: int = 1, square: bool = True
) -> Tensor:
    """Undo `forward` along one dim; differentiable.

    Args:
        c: any shape, floating point. Along ``dim`` it holds the first coefficients, up to all of them; those
            behind are taken as zero.
        name: one of `KERNELS`.
        dim: along which.
        size: number of samples.
        levels: of a wavelet.
        square: as in `analysis_matrix`.

    Returns:
        The shape of ``c`` but for ``dim``, which holds ``size`` samples.

    Raises:
        TransformError: if ``c`` holds no floating-point numbers, or more coefficients than there are.
    """
    count = coefficient_count(name, size, levels=levels, square=square)
    given = c.shape[dim]
    if given > count:
        raise TransformError(f"{name} of {size} samples has {count} coefficients; {given} were given")
    with full_precision(c) as work:
        if _takes_matrix(name, size):
            matrix = constant(kernel_matrix, name, size, _levels(name, size, levels), square, True, like=work)
            result = along(matrix[:, :given], work, dim)
        else:
            last = F.pad(work.movedim(dim, -1), (0, count - given))
            found = _FAST[name][1](last) if name in _FAST else _composed(last, name, size, levels, square)
            result = found.movedim(-1, dim)
    return result.to(c.dtype)


def _levels(name: str, size: int, levels: int) -> int:
    return min(levels, max_levels(name, size))


def _takes_matrix(name: str, size: int) -> bool:
    """Whether one product takes less time than the FFT, or than the filters of a wavelet in turn."""
    if is_wavelet(name):
        return size <= min(max(_LARGE, _PER_TAP * filter_bank(wavelet_name(name)).taps), _LARGEST)
    return name != "identity" and size <= _LARGE


def wavelet_name(name: str) -> str:
    """PyWavelets' name of a wavelet: ``dwt`` is ``haar``."""
    return "haar" if name == "dwt" else name


def _decomposed(x: Tensor, name: str, levels: int, square: bool) -> Tensor:
    """Levels of a long signal along the last dim: by filters while it is long, then by a matrix."""
    levels = _levels(name, x.shape[-1], levels)
    details: list[Tensor] = []
    while levels and not _takes_matrix(name, x.shape[-1]):
        x, detail = analyze(x, wavelet_name(name), square=square)
        details.insert(0, detail)
        levels -= 1
    if levels:
        x = forward(x, name, levels=levels, square=square)
    return torch.cat((x, *details), -1)


def _composed(c: Tensor, name: str, size: int, levels: int, square: bool) -> Tensor:
    levels = _levels(name, size, levels)
    if not levels:
        return c
    if _takes_matrix(name, size):
        return inverse(c, name, size=size, levels=levels, square=square)
    detail = band_sizes(size, 1, square=square)[1]
    rest = c.shape[-1] - detail
    low = _composed(c[..., :rest], name, (size + 1) // 2, levels - 1, square)
    return synthesize(low, c[..., rest:], wavelet_name(name), size, square=square)
