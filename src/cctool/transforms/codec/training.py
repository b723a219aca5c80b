"""The codec in training: reconstruction with a gradient, and an estimate of the bits.

The symbol of a coefficient z, in units of its step, is round(z). The sparse exponential-Golomb code of
order 1 writes a signed symbol s in 1 + 2 ceil(log2(1 + |s|)) bits: 1 for 0, 3 for +-1, 5 for +-2 and +-3.
Training uses a differentiable approximation without either rounding:

    bits(z) = 1 + 2 log2(1 + |z|)

It equals the code at |z| = 0, 1, 3, 7 and so on. Near 0 it is an L1 norm, the term with which Georgiadis
(CVPR 2019, arXiv 1812.04056) makes maps sparse before they are coded; large coefficients are penalised less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cctool.transforms.codec.codec import CodecState, encoded_maps, mix_channels, reconstruct


def simulate(x: Tensor, state: CodecState) -> Tensor:
    """``reconstruct(encode(x))``, float32, with a gradient: straight through roundings, 0 where one clamps.

    The gradients of the transforms, including mean and channel transform, are exact. ``x`` is not modified,
    and the codec's tensors get no gradient.
    """
    found: Tensor = _Simulate.apply(x, state, False)[0]
    return found


def simulate_rated(x: Tensor, state: CodecState) -> tuple[Tensor, Tensor]:
    """`simulate`, and an estimate of the symbols' bits with its own gradient.

    Returns:
        The maps, and a scalar float32: the sum of `soft_bits` over all coefficients before they are rounded.
            The
        gradient ignores the rounding to integers before the transform, and is zero where that clamps.
    """
    maps, bits = _Simulate.apply(x, state, True)
    return maps, bits


class _Simulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: CodecState, rated: bool) -> tuple[Tensor, Tensor]:
        # Symbols of unlimited width are never clamped.
        narrow = state.config.symbol_bits is not None
        made = encoded_maps(x, state, look=True, look_inside=narrow)
        ctx.state, ctx.size, ctx.narrow = state, made.symbols.shape[2:], narrow and state.config.transforms
        ctx.bands = [band.shape for band in made.symbols.bands]
        slopes = []
        bits = torch.zeros((), device=x.device)
        if rated:
            # The estimate does not need float64.
            scaled = [z.float() for z in made.scaled]
            bits = torch.stack([soft_bits(z).sum() for z in scaled]).sum()
            slopes = [
                (soft_bits_slope(z) / (step * state.grid().step).float()).to(x.dtype)
                for z, step in zip(scaled, made.steps, strict=True)
            ]
        else:
            ctx.mark_non_differentiable(bits)
        inside = [item.inside for item in made.rounded if narrow]
        ctx.save_for_backward(made.integers.inside, *inside, *slopes)
        return reconstruct(made.symbols, state), bits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_bits: Tensor) -> tuple[Tensor, None, None]:
        outer, *others = ctx.saved_tensors
        count = len(ctx.bands) if ctx.narrow else 0
        inside, rates = others[:count], [slope * of_bits for slope in others[count:]]
        if ctx.state.config.transforms:
            gradient = _through_transform(gradient, ctx.state, inside, ctx.size, ctx.bands, rates)
        elif rates:
            gradient = gradient + rates[0]
        return gradient * outer, None, None


def _through_transform(
    gradient: Tensor,
    state: CodecState,
    inside: Sequence[Tensor],
    size: tuple[int, int],
    bands: Sequence[Any],
    rates: Sequence[Tensor],
) -> Tensor:
    """Carry a gradient from the decoded maps back to the maps; steps and scales cancel out.

    ``rates`` are gradients with respect to the coefficients that are added there, in units of the maps; or
    empty.
    """
    spatial, basis = state.spatial(), state.bases.get("channels")
    turned = mix_channels(gradient, basis)
    if spatial.orthonormal:
        coefficients = spatial.forward(turned)
        back = spatial.inverse(_kept(_joined(coefficients, rates), inside), size)
    else:
        coefficients = _adjoint(lambda *c: (spatial.inverse(c, size),), bands, (turned,))
        coefficients = tuple(_kept(_joined(coefficients, rates), inside))
        (back,) = _adjoint(lambda x: spatial.forward(x), [gradient.shape], coefficients)
    back = mix_channels(back, None if basis is None else basis.T)
    if state.config.mean_shift:
        # The mean bypasses the transform: its gradient is what the decoder adds less what the encoder
        # subtracts, spread over all values.
        dims, count = (1, 2, 3), gradient[0].numel()
        back = back + (gradient.sum(dims, keepdim=True) - back.sum(dims, keepdim=True)) / count
    return back


def by_coefficients(gradient: Tensor, state: CodecState) -> tuple[Tensor, ...]:
    """Convert derivatives (N, C, H, W) by a map's values to derivatives by its orthonormal coefficients.

    Returns a tensor for each band, in units of the map's values; see `Symbols`.
    """
    spatial, turned = state.spatial(), mix_channels(gradient, state.bases.get("channels"))
    bands = spatial.forward(turned)
    if spatial.orthonormal:
        return tuple(bands)
    size = (gradient.shape[2], gradient.shape[3])
    return _adjoint(lambda *c: (spatial.inverse(c, size),), [band.shape for band in bands], (turned,))


def _joined(bands: Sequence[Tensor], rates: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sums band by band."""
    return [band + rate for band, rate in zip(bands, rates, strict=True)] if rates else bands


def _kept(bands: Sequence[Tensor], inside: Sequence[Tensor]) -> list[Tensor]:
    """Bands with zeros where the quantizer clamped; unchanged if that was not recorded."""
    return [band * here for band, here in zip(bands, inside, strict=True)] if inside else list(bands)


def _adjoint(
    linear: Callable[..., tuple[Tensor, ...]], shapes: Sequence[Any], gradients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Apply the transpose of a linear map whose arguments have these shapes."""
    with torch.enable_grad():
        points = [gradients[0].new_zeros(shape, requires_grad=True) for shape in shapes]
        return torch.autograd.grad(linear(*points), points, gradients)


def soft_bits(z: Tensor) -> Tensor:
    """Estimated bits of coefficients in units of their steps; any shape, at least 1 each.

    >>> soft_bits(torch.tensor([0.0, -1.0, 3.0])).tolist()
    [1.0, 3.0, 5.0]
    """
    return 1 + 2 / math.log(2) * torch.log1p(z.abs())


def soft_bits_slope(z: Tensor) -> Tensor:
    """Derivative of `soft_bits`: 2 sign(z) / (ln 2 (1 + |z|)), 0 at 0."""
    return torch.sign(z) * (2 / math.log(2)) / (1 + z.abs())
