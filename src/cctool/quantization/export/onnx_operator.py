"""The operator that represents an activation's rounding in a traced program, for exporters."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("cctool", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "on_grid(Tensor x, float scale, int zero_point, int low, int high) -> Tensor"
_LIBRARY.define(_SCHEMA)  # type: ignore[no-untyped-call]


def on_grid(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale, in the shape and type of ``x``.

    ``x`` is floating point, ``scale`` above 0, and ``zero_point`` from ``low`` to ``high``.
    """
    found: Tensor = torch.ops.cctool.on_grid(x, scale, zero_point, low, high)
    return found


def _compute(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    # A tensor, because CUDA would multiply by the reciprocal of a Python number, which rounds differently.
    step = torch.full((), scale, dtype=x.dtype, device=x.device)
    return ((x / step).round() + zero_point).clamp(low, high).sub(zero_point).mul(step)


def _fake(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("on_grid", _compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("cctool::on_grid", _fake, lib=_LIBRARY)

ON_GRID = torch.ops.cctool.on_grid.default
"""The operator as it appears in traced programs."""
