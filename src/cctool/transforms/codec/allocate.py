"""Quantization steps from the sensitivity of a network's outputs to the coefficients of its maps.

Rounding a coefficient c with step D adds noise of variance D^2 / 12. To first order it changes the outputs z
by a mean square of E[|dz/dc|^2] D^2 / 12, and one bit less for c doubles D. Among all steps with the same
number of bits, those with equal products D^2 E[|dz/dc|^2] change the outputs least (bit allocation by equal
slopes, as in Huang and Schultheiss 1963, "Block quantization of correlated Gaussian random variables"). That
holds for small steps. With few bits per coefficient, the noise stops growing once all symbols are zero, and
steps proportional to the spread s of the maps do better. A compromise is

    D = m s (s^2 E[|dz/dc|^2])^(-p / 2),    p = 0.7,

with p = 1 for equal slopes and p = 0 for the spread alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.base.networks import removing
from cctool.base.outputs import named_tensors
from cctool.transforms.codec.codec import CodecState
from cctool.transforms.codec.steps import allowed_lengths
from cctool.transforms.codec.taps import CalibratedTap, bypassed
from cctool.transforms.codec.training import by_coefficients
from cctool.transforms.kernels.blocks import block_positions
from cctool.transforms.kernels.by_name import is_wavelet

POWER = 0.7
"""p above; for a ResNet-20 at a ratio of 4.5, all values from 0.4 to 0.8 did equally well."""

MEDIAN = 0.9
"""Sets m: half of a network's coefficients have steps below 0.9 standard deviations of their maps."""


class Sensitivity:
    """Mean squared derivatives with respect to the coefficients of one tap, per entry of its step table.

    Args:
        tap: the codec, its bases calibrated.
    """

    def __init__(self, tap: CalibratedTap) -> None:
        self._state = CodecState(tap.codec, tap.bounds, tap.bases)
        self._entries = max(allowed_lengths(tap.codec.kernel, tap.codec.block, tap.codec.levels)[:2])
        self._sums: Tensor | None = None
        self._counts = torch.zeros(self._entries, dtype=torch.float64)
        self._samples = 0

    def add(self, gradient: Tensor) -> None:
        """Add derivatives (N, C, H, W) of one scalar per sample with respect to the map's values."""
        sums = gradient.new_zeros(self._entries, dtype=torch.float64)
        for entries, band in self._placed(by_coefficients(gradient.double(), self._state)):
            squares = band.square().sum((0, 1))
            sums.index_add_(0, entries.to(sums.device).flatten(), squares.flatten())
            each = torch.full((entries.numel(),), band.numel() / entries.numel(), dtype=torch.float64)
            self._counts.index_add_(0, entries.flatten(), each)
        self._sums = sums if self._sums is None else self._sums + sums
        self._samples += gradient.shape[0]

    def means(self) -> Tensor:
        """(entries,) float64 on the CPU; entries that no coefficient uses repeat the one before them."""
        if self._sums is None:
            return torch.zeros(self._entries, dtype=torch.float64)
        found = self._sums.cpu() / self._counts.clamp(min=1)
        for index in range(1, self._entries):
            if not self._counts[index]:
                found[index] = found[index - 1]
        return found

    def shares(self) -> Tensor:
        """(entries,) float64 on the CPU: number of coefficients of one map that each entry is used for."""
        return self._counts / max(1, self._samples)

    def _placed(self, bands: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Bands (N, C, ...) with the table entry of each of their places (...)."""
        config = self._state.config
        if is_wavelet(config.kernel):
            for index, band in enumerate(bands):
                level = index if index < len(bands) - 1 else self._entries - 1
                yield torch.full(band.shape[2:], level), band
        elif self._entries == 1:
            yield torch.zeros(bands[0].shape[2:], dtype=torch.int64), bands[0]
        else:
            place = block_positions(bands[0].shape[2], bands[0].shape[3], config.block)
            yield place.row + place.column, bands[0]


def measure_sensitivity(
    model: nn.Module, taps: Mapping[str, CalibratedTap], images: Iterable[Tensor]
) -> dict[str, Sensitivity]:
    """Differentiate the outputs of the network without codecs with respect to its maps' coefficients.

    E[|dz/dc|^2] is estimated as the mean square of the derivative of r . z for random signs r (Hutchinson
    1990), new ones for each sample, so one backward pass per batch serves any number of outputs.

    Args:
        model: on its device, in evaluation mode; not changed.
        taps: with their bases, by the name of the module.
        images: batches (N, ...).

    Raises:
        TransformError: if the network returns no floating-point tensor that depends on the maps.
    """
    found = {name: Sensitivity(tap) for name, tap in taps.items()}
    # A fixed seed on the CPU: the same network gets the same steps on every device.
    signs = torch.Generator().manual_seed(0)
    for batch in images:
        seen: list[tuple[str, Tensor]] = []
        handles = [
            model.get_submodule(name).register_forward_hook(partial(_watched, name, seen)) for name in taps
        ]
        with removing(handles), torch.enable_grad(), bypassed(model):
            outputs = [value for value in named_tensors(model(batch)).values() if value.requires_grad]
        if not outputs:
            raise TransformError("--allocate: the network's outputs do not tell what its maps do to them")
        r = [torch.randint(0, 2, z.shape, generator=signs).mul_(2).sub_(1).to(z) for z in outputs]
        maps = [x for _, x in seen]
        gradients = torch.autograd.grad(outputs, maps, r, allow_unused=True)
        for (name, _), gradient in zip(seen, gradients, strict=True):
            if gradient is not None:
                found[name].add(gradient.detach())
    return found


def _watched(
    name: str, seen: list[tuple[str, Tensor]], module: nn.Module, args: Any, output: Tensor
) -> Tensor:
    # Where no parameter requires a gradient, the map itself becomes the leaf to differentiate by.
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    seen.append((name, output))
    # A copy, because the next module may work in place.
    return output.clone()


def allocated_steps(found: Mapping[str, Sensitivity], spreads: Mapping[str, float]) -> dict[str, Tensor]:
    """The steps of each tap in units of its maps' values, float64 (entries,); see the module docstring.

    ``spreads`` are the standard deviations of the taps' maps. Coefficients that change nothing get infinite
    steps, and so do all of a tap whose maps never vary.
    """
    relative = {name: (spreads[name] ** 2 * one.means()).pow(-POWER / 2) for name, one in found.items()}
    shares = torch.cat([one.shares() for one in found.values()])
    values, order = torch.cat(list(relative.values())).sort()
    half = shares[order].cumsum(0) >= shares.sum() / 2
    middle = float(values[half][0])
    factor = MEDIAN / middle if math.isfinite(middle) else 1.0
    return {name: factor * spreads[name] * steps for name, steps in relative.items()}
