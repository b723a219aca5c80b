"""Ranges of weights: the whole weight with many bits, the least squared error with few."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cctool.quantization.quantizers.base import Quantizer
from cctool.quantization.quantizers.config import QuantizerConfig
from cctool.quantization.quantizers.grid import Grid, extremes, fitted

_ENOUGH_BITS = 8
_FACTORS = tuple(math.exp(math.log(0.01) * step / 99) for step in range(100))
"""Factors of ranges: from 1 to 0.01 in equal ratios."""
_FINER = tuple(math.exp(0.004 * step) for step in range(-12, 13) if step)
"""Factors of the best of these: up to its neighbours on both sides, in a twelfth of their distance."""
_WIDER = 32
"""Ranges that `balanced_range` tries, besides that of the values."""
_MOST_VALUES = 2**22
_CHUNK = 2**16


@torch.no_grad()
def fit_weight(quantizer: Quantizer, weight: Tensor, fold: Tensor | None = None) -> None:
    """Set the range of a weight's quantizer, in place; the weight is finite.

    With 8 bits or more the range covers the whole weight. With fewer it has the least squared error, see
    `least_squares_range`; with one scale for the tensor that of the folded weight (`Quantizer.forward`).
    Quantizers with learned steps or fixed levels are initialised as in their method's paper.
    """
    if quantizer.config.method != "uniform" or quantizer.config.bits >= _ENOUGH_BITS:
        quantizer.initialise(weight, fold)
        return
    quantizer.set_range(*least_squares_range(quantizer.folded(weight, fold), quantizer.config))


def fit_computed(quantizer: Quantizer, weight: Tensor, fold: Tensor | None = None) -> None:
    """As `fit_weight`, for a weight that is computed.

    With 8 bits or more and a scale per channel, the range is the one of `balanced_range`.
    """
    config = quantizer.config
    if config.method != "uniform" or config.bits < _ENOUGH_BITS or config.axis is None or not weight.numel():
        fit_weight(quantizer, weight, fold)
        return
    quantizer.set_range(*balanced_range(quantizer.folded(weight), config))


@torch.no_grad()
def balanced_range(x: Tensor, config: QuantizerConfig) -> tuple[Tensor, Tensor]:
    """The range, at most a third wider than the values, whose rounding errors have little energy and sum.

    Standardised filters have sums of 0, which silences what all inputs have in common; the sum of their
    rounding errors lets it through. For inputs of mean m and deviation m, independent of each other, the
    expected squared error of a channel's output is m^2 times the sum of e^2 plus the square of the sum of e.
    That is minimised for each slice along ``config.axis``, over 33 ranges.

    Args:
        x: float32 or float64, finite, not empty.
        config: of a uniform quantizer with an axis.

    Returns:
        Lowest and highest value, both (C,).
    """
    assert config.axis is not None
    low, high = extremes(x, config.axis)
    rows = x.movedim(config.axis, 0).reshape(len(low), -1)
    bottom, top = config.limits

    def error(factor: Tensor) -> Tensor:
        scale, zero = fitted(low * factor, high * factor, config.limits, symmetric=config.symmetric)
        grid = Grid(scale, zero, bottom, top, 0)
        found = grid.nearest(rows).sub_(rows)
        return found.square().sum(1) + found.sum(1).square()

    best = torch.ones_like(low)
    least = error(best)
    for step in range(1, _WIDER + 1):
        factor = torch.full_like(low, 1 + step / (3 * _WIDER))
        tried = error(factor)
        best, least = torch.where(tried < least, factor, best), torch.minimum(tried, least)
    return low * best, high * best


@torch.no_grad()
def least_squares_range(x: Tensor, config: QuantizerConfig) -> tuple[Tensor, Tensor]:
    """The range whose grid has the least sum of squared rounding and clipping errors.

    For the tensor, or for each slice along ``config.axis``, 124 ranges are tried: smallest and largest value
    times the same factor. With a zero point, the two ends are then moved one after the other with as many
    factors each, because the values may be skewed. Of tensors with more than four million values, an evenly
    spaced subset is used.

    Args:
        x: float32 or float64, finite.
        config: of a uniform quantizer.

    Returns:
        Lowest and highest value, both () or (C,).
    """
    low, high = extremes(x, config.axis)
    if not x.numel():
        return low, high
    rows = x.reshape(1, -1) if config.axis is None else x.movedim(config.axis, 0).reshape(len(low), -1)
    if rows.numel() > _MOST_VALUES:
        rows = rows[:, :: -(-rows.numel() // _MOST_VALUES)]
    step = max(1, _CHUNK // rows.shape[1])
    ends = low.reshape(-1), high.reshape(-1)
    parts = []
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        parts.append(_least_squares(rows[part].contiguous(), ends[0][part], ends[1][part], config))
    least, most = (torch.cat(ends) for ends in zip(*parts, strict=True))
    return least.reshape(low.shape), most.reshape(high.shape)


def _least_squares(
    rows: Tensor, least: Tensor, most: Tensor, config: QuantizerConfig
) -> tuple[Tensor, Tensor]:
    """The range of each row of (C, K), given its extremes (C,)."""
    bottom, top = config.limits
    # Reused for all candidates.
    room = torch.empty_like(rows)

    def error(least: Tensor, most: Tensor) -> Tensor:
        scale, zero = fitted(least, most, config.limits, symmetric=config.symmetric)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny).to(rows.dtype)[:, None]
        lowest, highest = ((end - zero.to(rows.dtype))[:, None] for end in (bottom, top))
        torch.div(rows, scale, out=room).round_().clamp_(lowest, highest).mul_(scale).sub_(rows)
        return room.square_().sum(1)

    both = _best(lambda factor: error(least * factor, most * factor), rows)
    least, most = least * both, most * both
    if not config.symmetric:
        least = least * _best(lambda factor: error(least * factor, most), rows)
        most = most * _best(lambda factor: error(least, most * factor), rows)
    return least, most


def _best(error: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """The factor with the least error for each row, the first of several; (C,)."""
    best = rows.new_ones(len(rows))
    least = torch.full_like(best, math.inf)
    for tried in (_FACTORS, _FINER):
        begun = torch.ones_like(best) if tried is _FACTORS else best
        for factor in tried:
            found = error(begun * factor)
            better = found < least
            least = torch.where(better, found, least)
            best = torch.where(better, begun * factor, best)
    return best
