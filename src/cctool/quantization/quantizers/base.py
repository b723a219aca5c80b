"""What all fake quantizers have in common: values of a grid forward, a straight-through gradient back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid, aligned

__all__ = ["Quantizer", "straight_through", "tracked"]


class Quantizer(nn.Module):
    """Replaces a weight or an activation by the values that few bits can tell apart.

    In training mode ranges that follow what passes through are computed anew and written to buffers. In
    evaluation mode only buffers and parameters count, so neither a cut nor a reload changes what a value
    becomes.

    Attributes:
        config: the rest of it.
        weight: whether it quantizes a weight, else an activation whose first dimension is the batch.
        channels: size along ``config.axis``; None where there is one scale.
        has_range: whether calibration sets its range; else that is fixed, or of the weight itself.
    """

    has_range: ClassVar[bool] = False

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__()
        self.config, self.weight, self.channels = config, weight, channels

    def forward(self, x: Tensor, fold: Tensor | None = None) -> Tensor:
        """Quantize.

        Args:
            x: floating point. float64 is computed in float64, all other types in float32.
            fold: of a weight, factors of the batch norm behind it (gamma / sigma): (C,) along dimension 0, or
                of as many dimensions as ``x``. They matter where there is one scale: the result is
                Q(x * fold) / fold, so that the folded weight lies on one grid; a channel whose factor is 0 is
                quantized as it is. Where ``config.axis`` gives each slice a scale, they are ignored.

        Returns:
            The shape and type of ``x``.

        Raises:
            QuantizationError: if an activation is given a fold.
        """
        if not x.numel():
            return x
        work, factor = self._times_fold(x, fold)
        found = self._quantized(work)
        return (found if factor is None else found / factor).to(x.dtype)

    def initialise(self, x: Tensor, fold: Tensor | None = None) -> None:
        """Take the first range or step from a weight or a batch of activations, as the method's paper says.

        Args:
            x: finite values; where there are none, state stays as it is.
            fold: as in `forward`.
        """
        if not x.numel():
            return
        with torch.no_grad():
            self._initialise(self.folded(x, fold))

    def folded(self, x: Tensor, fold: Tensor | None = None) -> Tensor:
        """What is rounded when ``x`` is quantized: ``x`` times its fold, where that matters; else ``x``.

        Args:
            x: floating point.
            fold: as in `forward`.

        Returns:
            float64 or float32, of the shape of ``x``.
        """
        return self._times_fold(x, fold)[0]

    def settled(self, weight: Tensor, fold: Tensor | None = None) -> Tensor:
        """The weight that few bits can store and that in evaluation mode quantizes to what ``weight`` does.

        Args:
            weight: float32 or float64. Types of fewer bits round what the table holds.
            fold: as in `forward`.

        Returns:
            ``table[indices]`` of `levels`, of the type of ``weight``.
        """
        indices, table = self.levels(weight, fold)
        index = indices.long()
        if table.dim() == 1:
            return table[index].to(weight.dtype)
        dim = self._channel_dim(fold)
        rows = torch.arange(table.shape[0], device=index.device)
        return table[aligned(rows, weight.dim(), dim), index].to(weight.dtype)

    def levels(self, weight: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The numbers of a weight's levels, and the values to store for them.

        Args:
            weight: floating point, finite.
            fold: as in `forward`.

        Returns:
            Indices of the shape of ``weight``, uint8 for up to 256 levels, else uint16; and a table, float32
            (L,) with at most 2^bits entries, or (C, L) with a row for each slice along ``config.axis`` or
            along the fold's dimension.

        Raises:
            QuantizationError: for activations.
        """
        if not self.weight:
            raise QuantizationError("only a weight's levels are stored, not an activation's")
        with torch.no_grad():
            work, factor = self._times_fold(weight, fold)
            indices, table = self._levels(work)
            if factor is not None:
                table = table / factor.float().reshape(-1, 1)
        small = table.shape[-1] <= 256
        return indices.to(torch.uint8 if small else torch.uint16), table

    def taken(self, indices: Tensor) -> None:
        """Keep the state of these slices along ``config.axis``; nothing happens where there is one scale.

        Args:
            indices: int64 (K,).
        """
        if self.config.axis is None:
            return
        for state in (*self.buffers(recurse=False), *self.parameters(recurse=False)):
            if state.dim():
                kept, grad = indices.to(state.device), state.grad
                state.grad = None
                state.data = state.data.index_select(0, kept)
                state.grad = None if grad is None else grad.index_select(0, kept)
        self.channels = len(indices)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the range from calibration.

        Args:
            low: smallest value, () or (C,); a range is widened to hold 0.
            high: largest value, the same shape.

        Raises:
            QuantizationError: where ``has_range`` is false.
        """
        kind = "weight" if self.weight else "activation"
        raise QuantizationError(f"{self.config.method}: the range of a quantized {kind} is not calibrated")

    @abstractmethod
    def grid(self) -> Grid | None:
        """The uniform grid on which evaluation's values lie; None where there is none of 8-bit integers."""

    def check(self) -> None:
        """Refuse state that no quantizer writes, before a file's is used.

        Raises:
            CorruptCheckpointError: if a scale or range is not finite or is negative.
        """
        for name, state in self.state_dict().items():
            if state.is_floating_point() and not bool(torch.isfinite(state).all()):
                raise CorruptCheckpointError(f"a quantizer's {name} is not finite")

    def extra_repr(self) -> str:
        """The settings that are not defaults."""
        settings = self.config.model_dump(exclude_defaults=True)
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    @abstractmethod
    def _quantized(self, x: Tensor) -> Tensor:
        """Quantize float32 or float64 of one element or more."""

    def _initialise(self, x: Tensor) -> None:
        """Take first state from values; methods whose state does not depend on them keep theirs."""

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of any integer type, and the table of what to store, both without a fold."""
        grid = self.grid()
        assert grid is not None, "methods without a grid have their own"
        return grid.integers(x) - grid.low, grid.table()

    def _times_fold(self, x: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x`` times its fold, float64 or float32, and the factors as they broadcast over it, with 1 for 0.

        Where the fold does not matter, ``x`` itself and None.
        """
        work = x if x.dtype == torch.float64 else x.float()
        if fold is not None and not self.weight:
            raise QuantizationError("a batch norm is folded into weights, not into activations")
        if fold is None or self.config.axis is not None:
            return work, None
        factor = fold.to(work.device, work.dtype)
        factor = torch.where(factor == 0, torch.ones_like(factor), factor)
        factor = factor if factor.dim() == x.dim() else aligned(factor, x.dim(), 0)
        return work * factor, factor

    def _channel_dim(self, fold: Tensor | None) -> int | None:
        if self.config.axis is not None:
            return self.config.axis
        if fold is None or fold.dim() == 1:
            return 0
        return next((dim for dim, size in enumerate(fold.shape) if size > 1), 0)


def straight_through(x: Tensor, values: Tensor, inside: Tensor | None = None) -> Tensor:
    """``values`` with the gradient of ``x``: 1 where ``inside``, 0 elsewhere.

    Args:
        x: what was quantized.
        values: what it became, without a gradient.
        inside: bool, of the shape of ``x``; None is everywhere.
    """
    if not tracked(x):
        return values
    # In a tuple, so that autograd takes the values for made here: a network may write to them in place.
    found: Tensor = _StraightThrough.apply(x, (values, inside))
    return found


def tracked(x: Tensor) -> bool:
    """Whether a gradient of ``x`` may be asked for."""
    return torch.is_grad_enabled() and x.requires_grad


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, made: tuple[Tensor, Tensor | None]) -> Tensor:
        values, inside = made
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None
