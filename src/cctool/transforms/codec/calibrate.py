"""Calibrating codecs on un-augmented training images: ranges, bases, and orders of the code.

Ranges and bases are those of the network without codecs, as in the published procedure. So they do not depend
on the steps, and a search over qualities need not calibrate again. The order of the exponential-Golomb code
is chosen from the symbols of the whole network with codecs, whose maps have passed the taps before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError
from cctool.base.networks import in_eval_mode, removing
from cctool.transforms.codec.allocate import allocated_steps, measure_sensitivity
from cctool.transforms.codec.codec import CodecConfig, Symbols
from cctool.transforms.codec.figures import SymbolCounts
from cctool.transforms.codec.quantizers import prequantizer_levels
from cctool.transforms.codec.sites import Site
from cctool.transforms.codec.steps import NEVER, USUAL_SPREAD, default_table
from cctool.transforms.codec.taps import CalibratedTap, bypassed, recording, taps_of
from cctool.transforms.kernels.spatial import block_sizes

Batches = Iterable[Tensor]
"""Normalised images (N, C, H, W) on the network's device; each iteration yields the same."""


@dataclass
class _Range:
    """Running minimum, maximum and spread of a tap's maps, on their device."""

    low: Tensor | None = None
    high: Tensor | None = None
    count: int = 0
    sums: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x = x.detach()
        self.count += x.numel()
        values = x.double()
        sums = torch.stack((values.sum(), values.square().sum()))
        self.sums = sums if self.sums is None else self.sums + sums
        low, high = torch.aminmax(x)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def spread(self) -> float:
        """Standard deviation of all values."""
        assert self.sums is not None
        mean, square = (self.sums / self.count).tolist()
        # Rounding may make the variance of a constant map negative.
        return math.sqrt(max(0.0, square - mean * mean))

    def bounds(self) -> Tensor:
        assert self.low is not None
        assert self.high is not None
        return torch.stack((self.low, self.high)).float()


@dataclass
class _Moments:
    """Running sums over vectors (n, d), float64, on their device: number, sum, outer products."""

    count: int = 0
    total: Tensor | None = None
    products: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        self.count += vectors.shape[0]
        total, products = vectors.sum(0), vectors.T @ vectors
        self.total = total if self.total is None else self.total + total
        self.products = products if self.products is None else self.products + products

    def basis(self, *, centred: bool) -> Tensor:
        """Eigenvectors as rows, in order of decreasing eigenvalues; float32, with fixed signs."""
        assert self.total is not None
        assert self.products is not None
        second = self.products / self.count
        if centred:
            mean = self.total / self.count
            second = second - torch.outer(mean, mean)
        # On the CPU, so that the basis is the same for every device.
        vectors = torch.linalg.eigh(second.cpu()).eigenvectors.flip(1).T
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        # The sign of an eigenvector is arbitrary.
        basis: Tensor = vectors * torch.sign(largest)
        return basis.float().contiguous().to(second.device)


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    configs: Mapping[str, CodecConfig],
    images: Batches,
    fingerprint: str,
) -> dict[str, CalibratedTap]:
    """Find the ranges and bases of taps.

    Args:
        model: on its device; its present taps are bypassed. Not changed.
        sites: where.
        configs: by the site's name. A prequantizer that is to be calibrated becomes ``unsigned`` for maps
            without negative values, ``offset`` for others.
        images: iterated once for ranges, once for a channel KLT, once for a spatial one, and once with
            gradients for allocated steps.
        fingerprint: of the weights.

    Raises:
        TransformError: if a map holds values that are not finite, or steps cannot be allocated.
    """
    ranges = {site.name: _Range() for site in sites}
    _pass(model, {name: found.add for name, found in ranges.items()}, images)
    taps = {}
    for site in sites:
        bounds = ranges[site.name].bounds()
        low, high = bounds.tolist()
        if not torch.isfinite(bounds).all():
            raise TransformError(
                f"{site.name}: its maps reach from {low} to {high}; a codec needs finite ones"
            )
        config = configs[site.name]
        if "prequantizer" in config.calibrated:
            config = config.model_copy(update={"prequantizer": "offset" if low < 0 else "unsigned"})
        if "table" in config.calibrated:
            config = config.model_copy(update={"table": _scaled(config, bounds, ranges[site.name].spread())})
        taps[site.name] = CalibratedTap(config, site.shape, fingerprint, bounds)
    if any(tap.codec.channel_klt for tap in taps.values()):
        taps = _with_channels(model, taps, images)
    if any(tap.codec.kernel == "klt" for tap in taps.values()):
        taps = _with_blocks(model, taps, images)
    return _allocated(model, taps, {name: found.spread() for name, found in ranges.items()}, images)


def _allocated(
    model: nn.Module, taps: dict[str, CalibratedTap], spreads: Mapping[str, float], images: Batches
) -> dict[str, CalibratedTap]:
    """Steps from the outputs' sensitivity where asked for; a tap whose maps never vary keeps its table."""
    chosen = {
        name: tap
        for name, tap in taps.items()
        if tap.codec.allocated and "table" in tap.codec.calibrated and spreads[name]
    }
    if not chosen:
        return taps
    with in_eval_mode(model):
        found = allocated_steps(measure_sensitivity(model, chosen, images), spreads)
    for name, steps in found.items():
        tap = chosen[name]
        unit = prequantizer_levels(tap.bounds, tap.codec.prequantizer, tap.codec.bits).step.cpu()
        table = tuple((steps / unit).clamp(max=NEVER).tolist())
        taps[name] = replace(tap, codec=tap.codec.model_copy(update={"table": table}))
    return taps


def _scaled(config: CodecConfig, bounds: Tensor, spread: float) -> tuple[float, ...]:
    """The default table for maps of this standard deviation; not scaled where they never vary."""
    step = float(prequantizer_levels(bounds, config.prequantizer, config.bits).step)
    factor = spread / step / (USUAL_SPREAD * (2**config.bits - 1)) or 1.0
    table = default_table(config.kernel, config.block, config.levels, config.bits)
    return tuple(item * factor for item in table.steps)


def _with_channels(
    model: nn.Module, taps: Mapping[str, CalibratedTap], images: Batches
) -> dict[str, CalibratedTap]:
    """Principal axes of the channels, one vector per place (Chmiel et al. 2019, arXiv 1905.10830)."""
    moments = {name: _Moments() for name in taps}

    def look(name: str, x: Tensor) -> None:
        moments[name].add(_integers(x, taps[name]).movedim(1, -1).flatten(0, -2))

    _pass(model, {name: partial(look, name) for name in taps}, images)
    return {
        name: replace(tap, bases={**tap.bases, "channels": moments[name].basis(centred=True)})
        for name, tap in taps.items()
    }


def _with_blocks(
    model: nn.Module, taps: Mapping[str, CalibratedTap], images: Batches
) -> dict[str, CalibratedTap]:
    """Eigenvectors of the second moments of blocks' rows and columns, for every block side that occurs.

    Second moments rather than covariances, because the mean is coded with the rest.
    """
    moments: dict[str, dict[str, _Moments]] = {name: {} for name in taps}

    def look(name: str, x: Tensor) -> None:
        tap = taps[name]
        v = _integers(x, tap)
        if tap.codec.mean_shift:
            v = v - v.mean((1, 2, 3), keepdim=True)
        if "channels" in tap.bases:
            v = (tap.bases["channels"].double() @ v.flatten(2)).view_as(v)
        for axis, along in (("rows", v), ("columns", v.mT)):
            start = 0
            for side in block_sizes(along.shape[-1], tap.codec.block):
                basis = axis if side == tap.codec.block else f"{axis}_rest"
                piece = along[..., start : start + side].flatten(0, -2)
                moments[name].setdefault(basis, _Moments()).add(piece)
                start += side

    _pass(model, {name: partial(look, name) for name in taps}, images)
    return {
        name: replace(
            tap, bases={**tap.bases, **{key: m.basis(centred=False) for key, m in moments[name].items()}}
        )
        for name, tap in taps.items()
    }


def _integers(x: Tensor, tap: CalibratedTap) -> Tensor:
    return prequantizer_levels(tap.bounds, tap.codec.prequantizer, tap.codec.bits).to_integers(x).values


def choose_orders(model: nn.Module, images: Batches) -> None:
    """Set the order of the code, where calibration chooses it, to the one of fewest bits, in place.

    The images are iterated once.
    """
    hooks = taps_of(model)
    counts = {
        name: SymbolCounts(hook.codec.signed) for name, hook in hooks.items() if "k" in hook.codec.calibrated
    }

    def sink(name: str, symbols: Symbols, x: Tensor, y: Tensor) -> None:
        if name in counts:
            for band in symbols.bands:
                counts[name].add(band)

    if not counts:
        return
    with recording(model, sink):
        _run(model, images)
    for name, found in counts.items():
        hooks[name].codec = hooks[name].codec.model_copy(update={"k": found.best_order()})


def _pass(model: nn.Module, looks: Mapping[str, Any], images: Batches) -> None:
    """Run the network without codecs and show each module's output to its function."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output, look=look: look(output))
        for name, look in looks.items()
    ]
    with removing(handles), bypassed(model):
        _run(model, images)


@torch.no_grad()
def _run(model: nn.Module, images: Batches) -> None:
    with in_eval_mode(model):
        for batch in images:
            model(batch)
