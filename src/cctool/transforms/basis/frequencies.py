"""Rows of basis functions with trainable frequencies, of the DCT, the DST and the DFT.

For N samples t = 0..N-1, a period D and a real-valued frequency f:

    dct   cos(pi f (2t+1) / (2D)),        divided by its norm over the N samples
    dst   sin(pi (f+1) (2t+1) / (2D)),    divided by its norm over the N samples
    dft   exp(-2 pi j f t / D) / sqrt(N)

With D = N and f = 0..N-1 these are the orthonormal DCT-II, DST-II and DFT. The norm depends on the frequency,
not on the number of the row: it is sqrt(N) at frequency 0 and sqrt(N/2) at other integers, wherever training
moves a row.

More rows than samples need D > N: with D = N, row N of the DCT is zero and row N+j is minus row N-j. With
D = rows, the rows are the first N columns of an orthogonal matrix, and so have full rank N.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Smaller rows count as zero, for example a DST row whose frequency went to -1.
_SMALLEST_NORM = 1e-3


def real_rows(
    kernel: str, indices: Tensor, offsets: Tensor, positions: Tensor, *, size: int, period: int
) -> Tensor:
    """Normalised rows of the DCT or the DST.

    Args:
        kernel: ``dct`` or ``dst``.
        indices: (rows,) integers, the initial frequencies.
        offsets: (rows,) what training added to them.
        positions: (columns,) integers, which of the samples 0..size-1 to return.
        size: number of samples N that a row is normalised over.
        period: D.

    Returns:
        (rows, columns), of the type of ``offsets``; differentiable with respect to them.
    """
    whole = indices + 1 if kernel == "dst" else indices
    odd = 2 * positions + 1
    angles = _angles(whole, offsets, odd, 4 * period, math.pi / (2 * period))
    rows = angles.sin() if kernel == "dst" else angles.cos()
    return rows / row_norms(kernel, whole, offsets, size=size, period=period)[:, None]


def complex_rows(indices: Tensor, offsets: Tensor, positions: Tensor, *, size: int, period: int) -> Tensor:
    """Rows of the DFT, each of norm 1 over ``size`` samples, complex; arguments as in `real_rows`."""
    angles = _angles(indices, offsets, positions, period, 2 * math.pi / period)
    return torch.complex(angles.cos(), -angles.sin()) / math.sqrt(size)


def _angles(indices: Tensor, offsets: Tensor, positions: Tensor, turn: int, unit: float) -> Tensor:
    """(rows, columns): unit (indices + offsets) positions, less whole turns of ``turn`` units.

    The integer part is reduced exactly: float32 would lose three digits at 4096 x 4096 periods.
    """
    # The products of a layer's frequencies and samples are at most turn^2 / 8.
    kind = torch.int32 if turn * turn // 8 < 2**31 else torch.int64
    whole = torch.outer(indices.to(kind), positions.to(kind)).remainder_(turn).to(offsets.dtype)
    return torch.addr(whole, offsets, positions.to(offsets.dtype), beta=unit, alpha=unit)


def row_norms(kernel: str, whole: Tensor, offsets: Tensor, *, size: int, period: int) -> Tensor:
    """Norms of the DCT's or DST's rows before normalisation: (rows,) positive, of the type of ``offsets``.

    ``whole`` (rows,) are integers, to which ``offsets`` (rows,) are added; ``size`` is N and ``period`` D.
    With phi = pi f / D, the sum over t of cos((2t+1) phi) is sin(2 N phi) / (2 sin phi), so the squared norms
    are N/2 (1 +- sin(2 N phi) / (2 N sin phi)).
    """
    phi = (whole + offsets.double()) * (math.pi / period)
    nearest = (phi.detach() / math.pi).round()
    epsilon = phi - nearest * math.pi
    # Close to a multiple of pi the ratio is 0/0: there its Taylor series is used. The other branch gets a
    # safe argument, because `where` would pass on the NaN of its gradient.
    near = epsilon.detach().abs() * 2 * size < 1e-2
    safe = torch.where(near, torch.ones_like(epsilon), epsilon)
    ratio = torch.where(
        near,
        1 - epsilon.square() * ((4 * size * size - 1) / 6),
        (2 * size * safe).sin() / (2 * size * safe.sin()),
    )
    sign = 1 - 2 * nearest.remainder(2)
    squares = size / 2 * (1 + (-sign if kernel == "dst" else sign) * ratio)
    return squares.clamp_min(_SMALLEST_NORM**2).sqrt().to(offsets.dtype)


class _UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        scaled: Tensor = gradient / (gradient.norm() + 1e-8)
        return scaled


def unit_gradient(tensor: Tensor) -> Tensor:
    """The tensor itself; its gradient is divided by its norm, g / (||g|| + 1e-8).

    This is part of the computation, not a hook on the parameter, which copies and loaded files would lack.
    """
    return _UnitGradient.apply(tensor)  # type: ignore[no-any-return]
