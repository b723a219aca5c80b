"""The base of all fake quantizers: values of a grid forward, a straight-through gradient backward."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cctool.base.errors import CorruptCheckpointError, QuantizationError
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid, aligned


class Quantizer(nn.Module):
    """Replaces a weight or an activation by the nearest of the few values that its bits can represent.

    In training mode, ranges that follow the data are computed anew and written to buffers. In evaluation mode
    only buffers and parameters matter, so neither a cut nor a reload changes the quantized values.

    Attributes:
        config: the settings.
        weight: whether it quantizes a weight; else an activation, whose first dimension is the batch.
        channels: size along ``config.axis``; None with one scale.
        has_range: whether calibration sets its range; else that is fixed, or the weight's own.
    """

    has_range: ClassVar[bool] = False

    def __init__(self, config: QuantizerConfig, *, weight: bool, channels: int | None) -> None:
        super().__init__()
        self.config, self.weight, self.channels = config, weight, channels

    def forward(self, x: Tensor, fold: Tensor | None = None) -> Tensor:
        """Quantize.

        Args:
            x: floating point. float64 is computed in float64, all other types in float32.
            fold: for a weight, the factors (gamma / sigma) of the batch norm behind it: (C,) along dimension
                0, or with as many dimensions as ``x``. With one scale the result is Q(x * fold) / fold, so
                that the folded weight lies on one grid; a channel with factor 0 is quantized without it. With
                a scale per slice (``config.axis``) they are ignored.

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
        """Set the initial range or step from a weight or a batch of activations, as in the method's paper.

        Values are finite; if there are none, the state stays as it is. ``fold`` as in `forward`.
        """
        if not x.numel():
            return
        with torch.no_grad():
            self._initialise(self.folded(x, fold))

    def folded(self, x: Tensor, fold: Tensor | None = None) -> Tensor:
        """The values that are rounded when ``x`` is quantized: ``x``, times its fold if that matters.

        Returns float64 or float32 in the shape of ``x``; ``fold`` as in `forward`.
        """
        return self._times_fold(x, fold)[0]

    def settled(self, weight: Tensor, fold: Tensor | None = None) -> Tensor:
        """The weight that its bits can store and that, in evaluation mode, is quantized to the same values.

        Args:
            weight: float32 or float64. Types of fewer bits round the values of the table.
            fold: as in `forward`.

        Returns:
            ``table[indices]`` of `levels`, of the type of ``weight``.
        """
        indices, table = self.levels(weight, fold)
        # uint8 would be taken for a mask, and uint16 cannot index.
        index = indices.long()
        if table.dim() == 1:
            return table[index].to(weight.dtype)
        dim = self._channel_dim(fold)
        rows = torch.arange(table.shape[0], device=index.device)
        return table[aligned(rows, weight.dim(), dim), index].to(weight.dtype)

    def levels(self, weight: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The indices of a weight's levels, and the values to store for them.

        Args:
            weight: floating point, finite.
            fold: as in `forward`.

        Returns:
            Indices in the shape of ``weight``, uint8 for up to 256 levels, else uint16; and a table, float32
            (L,) with at most 2^bits entries, or (C, L) with a row per slice along ``config.axis`` or along
            the fold's dimension.

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
        """Keep the state of these slices (int64 (K,)) along ``config.axis``; no effect with one scale."""
        if self.config.axis is None:
            return
        for state in (*self.buffers(recurse=False), *self.parameters(recurse=False)):
            # State without dimensions is shared by all slices.
            if state.dim():
                kept, grad = indices.to(state.device), state.grad
                state.grad = None
                # A gradient must have the shape of its tensor, so it is taken off, cut and put back.
                state.data = state.data.index_select(0, kept)
                state.grad = None if grad is None else grad.index_select(0, kept)
        self.channels = len(indices)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the range found by calibration.

        Args:
            low: smallest value, () or (C,); a range is widened to contain 0.
            high: largest value, of the same shape.

        Raises:
            QuantizationError: if ``has_range`` is false.
        """
        kind = "weight" if self.weight else "activation"
        raise QuantizationError(f"{self.config.method}: the range of a quantized {kind} is not calibrated")

    @abstractmethod
    def grid(self) -> Grid | None:
        """The uniform grid of the values in evaluation mode; None for DoReFa's weights of 8 bits or more."""

    def check(self) -> None:
        """Check state that comes from a file.

        Raises:
            CorruptCheckpointError: if a scale or range is negative or not finite.
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
        """Quantize a float32 or float64 tensor that is not empty."""

    def _initialise(self, x: Tensor) -> None:
        """Set the initial state from values; methods whose state does not depend on them ignore this."""

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of any integer type, and the table of values to store, both without a fold."""
        grid = self.grid()
        assert grid is not None, "methods without a grid have their own"
        return grid.integers(x) - grid.low, grid.table()

    def _times_fold(self, x: Tensor, fold: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x`` times its fold, float64 or float32, and the factors broadcast over it, with 1 for 0.

        If the fold does not matter: ``x`` itself and None.
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
    """``values``, made from ``x``, with the gradient of ``x``: 1 where ``inside``, 0 elsewhere.

    ``values`` have no gradient; ``inside`` is bool in the shape of ``x``, and None is everywhere.
    """
    if not tracked(x):
        return values
    # Hidden in a tuple, so that autograd treats the values as new and a network may modify them in place.
    found: Tensor = _StraightThrough.apply(x, (values, inside))
    return found


def tracked(x: Tensor) -> bool:
    """Whether a gradient of ``x`` may be needed."""
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
