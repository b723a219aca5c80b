"""All transforms by name: DCT-II, DST-II, real DFT, wavelets and the identity, along one axis of a tensor.

The cosine, sine and Fourier transforms are orthonormal (`fourier.py`); wavelets are those of PyWavelets with
periodic borders (`filter_banks.py`), and ``dwt`` is ``haar``. A KLT is computed from data, so it has no fixed
matrix here; `check_kernel` accepts its name where the caller provides the basis.

bfloat16 and float16 are computed in float32 and converted back; autocast is off inside.

Inverses are exact up to rounding, except for the sym wavelets and bior and rbio 4.4, 5.5 and 6.8: 3e-11, the
precision of their filters in PyWavelets.
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
# Sizes from which the FFT (or filtering, with 48 samples per filter tap) is faster than a matrix product,
# measured with 4 million float32 values on one CPU thread. Above the largest, matrices take too much memory.
_LARGE = 256
_PER_TAP = 48
_LARGEST = 1024

KERNELS: tuple[str, ...] = ("dct", "dst", "dft", "dwt", "identity", *WAVELETS)
"""Names of all kernels that are a fixed matrix."""


def check_kernel(name: str, *, klt: bool = False) -> None:
    """Raise UsageError, naming what is allowed, unless ``name`` is a kernel, or ``klt`` with ``klt=True``."""
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
    """Levels until the approximation is one sample; 0 for size 1 and for kernels without levels.

    Everywhere, more levels than this count as this many.

    >>> max_levels("db2", 7)
    3
    """
    return (size - 1).bit_length() if is_wavelet(name) else 0


def coefficient_count(name: str, size: int, *, levels: int = 1, square: bool = True) -> int:
    """Number of coefficients of ``size`` samples: ``size``, except for wavelets with ``square=False``.

    >>> coefficient_count("haar", 7, levels=3, square=False)
    8
    """
    return sum(band_sizes(size, _levels(name, size, levels), square=square))


def kernel_matrix(name: str, size: int, levels: int, square: bool, synthesis: bool) -> NDArray[np.float64]:
    """The transform as a matrix: the forward one with a row per coefficient, or the inverse one.

    Args:
        name: one of `KERNELS`.
        size: number of samples, at least 1.
        levels: of a wavelet, at most `max_levels`; other kernels have none.
        square: how wavelets treat an odd number of samples. True: the last one goes to the approximation
            unchanged, and the matrix is square. False: it is replicated, as in PyWavelets.
        synthesis: whether to return the inverse.

    Returns:
        A new array of shape (coefficients, size), or (size, coefficients) for the inverse.
    """
    if is_wavelet(name):
        levels = _levels(name, size, levels)
        return wavelet_matrix(wavelet_name(name), size, levels, square=square, synthesis=synthesis)
    rows = _ORTHONORMAL[name](size)
    return np.ascontiguousarray(rows.T) if synthesis else rows


def forward(x: Tensor, name: str, dim: int = -1, *, levels: int = 1, square: bool = True) -> Tensor:
    """Transform ``x``, any shape, along ``dim``; differentiable. Other arguments as in `kernel_matrix`.

    Returns:
        The shape of ``x``, with `coefficient_count` coefficients along ``dim``.

    Raises:
        TransformError: if ``x`` is not floating point.
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
    """Inverse of `forward` along ``dim``, to ``size`` samples; differentiable.

    Along ``dim``, ``c`` may hold only the first coefficients; the others count as 0.

    Raises:
        TransformError: if ``c`` is not floating point, or has more coefficients than there are.
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
    """Whether one matrix product is faster than the FFT, or than filtering level by level."""
    if is_wavelet(name):
        return size <= min(max(_LARGE, _PER_TAP * filter_bank(wavelet_name(name)).taps), _LARGEST)
    return name != "identity" and size <= _LARGE


def wavelet_name(name: str) -> str:
    """PyWavelets' name of a wavelet: ``dwt`` is ``haar``."""
    return "haar" if name == "dwt" else name


def _decomposed(x: Tensor, name: str, levels: int, square: bool) -> Tensor:
    """Wavelet levels of a long signal along the last dim: by filtering while it is long, then by a matrix."""
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
