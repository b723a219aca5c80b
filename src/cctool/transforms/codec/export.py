"""Codecs as arithmetic that exporters support: round, clamp and products with constant matrices.

It computes what `codec.py` does, but symbols are not integers and matrices are computed beforehand, for maps
of one size and any batch. It is only for exported files; every export is compared with the codec itself.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cctool.graph.execution import hidden
from cctool.transforms.codec.codec import CodecState
from cctool.transforms.codec.quantizers import symbol_bounds
from cctool.transforms.codec.taps import state_of, taps_of
from cctool.transforms.kernels.blocks import block_diagonal
from cctool.transforms.kernels.by_name import is_wavelet, wavelet_name
from cctool.transforms.kernels.filter_banks import wavelet_matrix
from cctool.transforms.kernels.spatial import Blocks, CalibratedBlocks, Wavelet
from cctool.transforms.kernels.wavelets import pyramid_levels


class _Level(nn.Module):
    """One separable step of a transform: y = A_h x A_w^T, and its inverse x = S_h y S_w^T.

    Args:
        height: analysis and synthesis matrix along the height.
        width: likewise along the width.
    """

    def __init__(self, height: tuple[Tensor, Tensor], width: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        for name, tensor in zip(("a_h", "s_h", "a_w", "s_w"), (*height, *width), strict=True):
            self.register_buffer(name, tensor.double())

    def analyse(self, x: Tensor) -> Tensor:
        return self.get_buffer("a_h") @ x @ self.get_buffer("a_w").T

    def synthesise(self, y: Tensor) -> Tensor:
        return self.get_buffer("s_h") @ y @ self.get_buffer("s_w").T


class ExportedCodec(nn.Module):
    """A codec for maps of one size.

    Args:
        state: the codec.
        size: (H, W) of the maps.
    """

    def __init__(self, state: CodecState, size: tuple[int, int]) -> None:
        super().__init__()
        config, grid = state.config, state.grid()
        self._config = config
        self._offset = 0.0 if grid.offset is None else float(grid.offset)
        self._step, self._bottom, self._top = float(grid.step), grid.bottom, grid.top
        self._symbols = symbol_bounds(config.symbol_bits)
        self.levels = nn.ModuleList()
        if not config.transforms:
            return
        basis = state.bases.get("channels")
        self.register_buffer("channels", None if basis is None else basis.detach().double())
        self.levels.extend(_levels(state, size))
        bands = len(self.levels) + 1 if is_wavelet(config.kernel) else 1
        for number, step in enumerate(state.steps(size, bands, torch.device("cpu"))):
            self.register_buffer(f"step_{number}", step.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        """The decoder's maps (N, C, H, W), in the type of ``x``."""
        v = torch.round((x.double() - self._offset) / self._step).clamp(self._bottom, self._top)
        if self._config.transforms:
            v = self._coded(v)
        return (v * self._step + self._offset).float().to(x.dtype)

    def _coded(self, v: Tensor) -> Tensor:
        # Means are transmitted as float32.
        mean = v.mean((1, 2, 3), keepdim=True).float().double() if self._config.mean_shift else None
        if mean is not None:
            v = v - mean
        basis = self._buffers.get("channels")
        shape = v.shape
        if basis is not None:
            v = (basis @ v.flatten(2)).reshape(shape)
        v = self._level(v, 0)
        if basis is not None:
            v = (basis.T @ v.flatten(2)).reshape(shape)
        return v if mean is None else v + mean

    def _level(self, v: Tensor, number: int) -> Tensor:
        """Code maps from one level of the pyramid downwards; the last band is the remaining approximation."""
        if number == len(self.levels):
            return self._rounded(v, number)
        level = self.levels[number]
        assert isinstance(level, _Level)
        y = level.analyse(v)
        if not is_wavelet(self._config.kernel):
            return level.synthesise(self._rounded(y, number))
        rows, columns = -(-v.shape[2] // 2), -(-v.shape[3] // 2)
        low = self._level(y[:, :, :rows, :columns], number + 1)
        beside = self._rounded(y[:, :, :rows, columns:], number)
        below = self._rounded(y[:, :, rows:, :], number)
        return level.synthesise(torch.cat((torch.cat((low, beside), 3), below), 2))

    def _rounded(self, y: Tensor, number: int) -> Tensor:
        step = self.get_buffer(f"step_{number}")
        # Through float32, so that ties are rounded as in `quantizers.to_symbols`.
        z, width = (y / step).float(), self._config.dead_zone
        z = torch.ceil(z.abs() - (0.5 + width)).clamp(min=0) * torch.sign(z) if width else torch.round(z)
        return z.clamp(*self._symbols).double() * step


def put_exported(target: nn.Module, model: nn.Module, names: Collection[str]) -> None:
    """Code the maps of ``target`` as the taps ``names`` of ``model`` do, in exportable arithmetic.

    ``target`` is a copy of ``model`` without taps, changed in place; ``model`` is on the CPU.
    """
    for name in names:
        codec = ExportedCodec(state_of(model, name), taps_of(model)[name].shape[1:])
        target.get_submodule(name).register_forward_hook(partial(_code, codec))


def _code(codec: ExportedCodec, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    with hidden():
        found: Tensor = codec(output)
    return found


def _levels(state: CodecState, size: tuple[int, int]) -> list[_Level]:
    spatial = state.spatial()
    if isinstance(spatial, Wavelet):
        name, levels = spatial.kernel, []
        for _ in range(pyramid_levels(name, *size, spatial.levels)):
            levels.append(_Level(_wavelet_pair(name, size[0]), _wavelet_pair(name, size[1])))
            size = (-(-size[0] // 2), -(-size[1] // 2))
        return levels
    if isinstance(spatial, Blocks):
        height, width = (_block_pair(spatial, side) for side in size)
        return [_Level(height, width)]
    if isinstance(spatial, CalibratedBlocks):
        return [_Level(_basis_pair(spatial, "columns", size[0]), _basis_pair(spatial, "rows", size[1]))]
    return []


def _wavelet_pair(name: str, size: int) -> tuple[Tensor, Tensor]:
    there, back = (
        torch.from_numpy(wavelet_matrix(wavelet_name(name), size, 1, square=False, synthesis=synthesis))
        for synthesis in (False, True)
    )
    return there, back


def _block_pair(spatial: Blocks, size: int) -> tuple[Tensor, Tensor]:
    there, back = (
        torch.from_numpy(block_diagonal(spatial.kernel, size, spatial.block, 1, synthesis))
        for synthesis in (False, True)
    )
    return there, back


def _basis_pair(spatial: CalibratedBlocks, axis: str, size: int) -> tuple[Tensor, Tensor]:
    matrix = spatial.diagonal(axis, size, torch.empty(0, dtype=torch.float64))
    return matrix, matrix.T.contiguous()
