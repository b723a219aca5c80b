"""The operator that marks an activation's rounding in a traced program, for writers of other formats."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ON_GRID", "on_grid"]

_LIBRARY = torch.library.Library("cctool", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "on_grid(Tensor x, float scale, int zero_point, int low, int high) -> Tensor"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def on_grid(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale.

    Args:
        x: floating point.
        scale: above 0.
        zero_point: from ``low`` to ``high``.
        low: lowest integer.
        high: highest integer.

    Returns:
        A tensor of the shape and type of ``x``.
    """
    found: Tensor = torch.ops.cctool.on_grid(x, scale, zero_point, low, high)
    return found


def _compute(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    # A tensor, because CUDA multiplies by the reciprocal of a number.
    step = torch.full((), scale, dtype=x.dtype, device=x.device)
    return ((x / step).round() + zero_point).clamp(low, high).sub(zero_point).mul(step)


def _fake(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("on_grid", _compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("cctool::on_grid", _fake, lib=_LIBRARY)

ON_GRID = torch.ops.cctool.on_grid.default
"""The operator as it stands in traced programs."""
