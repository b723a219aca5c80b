"""The spatial transforms that a codec can use, with one interface; all are linear.

Blocks of a fixed kernel or of calibrated bases, a wavelet pyramid, or none. A codec sits behind a module of a
network, at what this package calls a *tap*; the module's outputs are its *maps*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cctool.transforms.kernels.blocks import block_forward, block_inverse
from cctool.transforms.kernels.matmul import along, full_precision
from cctool.transforms.kernels.wavelets import Pyramid, wavedec2, waverec2


class Spatial(Protocol):
    """A linear transform of maps."""

    @property
    def orthonormal(self) -> bool:
        """Whether the inverse is the transpose for maps of every size."""
        ...

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Transform (N, C, H, W) maps into bands."""
        ...

    def inverse(self, bands: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Inverse of `forward` for maps of ``size`` (H, W)."""
        ...


@dataclass(frozen=True)
class NoTransform:
    """No transform: one band, the map itself."""

    orthonormal = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The map."""
        return (x,)

    def inverse(self, bands: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """The map."""
        return bands[0]


@dataclass(frozen=True)
class Blocks:
    """Blocks of an orthonormal kernel: one band, coefficients in the place of their block.

    Attributes:
        kernel: ``dct``, ``dst`` or ``dft``.
        block: nominal side of a block.
    """

    kernel: str
    block: int
    orthonormal = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Transform every block."""
        return (block_forward(x, self.kernel, self.block),)

    def inverse(self, bands: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Inverse transform of every block."""
        return block_inverse(bands[0], self.kernel, self.block)


@dataclass(frozen=True)
class CalibratedBlocks:
    """Blocks of calibrated orthonormal bases, one for each axis and block side.

    Attributes:
        block: nominal side of a block.
        bases: (side, side), one row per basis function: ``rows`` along the width of whole blocks,
            ``rows_rest`` along that of the right strip, ``columns`` and ``columns_rest`` along heights.
    """

    block: int
    bases: Mapping[str, Tensor]
    orthonormal = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Transform every block."""
        with full_precision(x) as work:
            for axis, dim in (("columns", 2), ("rows", 3)):
                work = along(self.diagonal(axis, work.shape[dim], work), work, dim)
        return (work,)

    def inverse(self, bands: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Inverse transform of every block."""
        with full_precision(bands[0]) as work:
            for axis, dim in (("columns", 2), ("rows", 3)):
                work = along(self.diagonal(axis, work.shape[dim], work).T, work, dim)
        return work

    def diagonal(self, axis: str, size: int, like: Tensor) -> Tensor:
        """The transform along ``rows`` or ``columns`` of a map, (size, size), in the type of ``like``."""
        matrix, start = like.new_zeros(size, size), 0
        for side in block_sizes(size, self.block):
            basis = self.bases[axis if side == self.block else f"{axis}_rest"]
            matrix[start : start + side, start : start + side] = basis
            start += side
        return matrix


@dataclass(frozen=True)
class Wavelet:
    """A wavelet pyramid with periodic borders: details (N, C, 3, h, w), finest first, then LL."""

    kernel: str
    levels: int
    orthonormal = False  # not for biorthogonal wavelets, nor for any where a side is odd

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Decompose."""
        pyramid = wavedec2(x, self.kernel, self.levels)
        return (*pyramid.details, pyramid.approximation)

    def inverse(self, bands: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Compose again."""
        return waverec2(Pyramid(bands[-1], bands[:-1]), self.kernel, size)


def block_sizes(size: int, block: int) -> tuple[int, ...]:
    """Sides of the blocks along an axis.

    >>> block_sizes(20, 8)
    (8, 8, 4)
    """
    rest = size % block
    return (*[block] * (size // block), *([rest] if rest else []))
