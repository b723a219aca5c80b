"""The report of `cctool transform --target weights`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from cctool.base.networks import some
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import mask_name
from cctool.checkpoint.spec import Metrics
from cctool.operations.context import ShownTables
from cctool.transforms.codec.taps import tap_buffers
from cctool.transforms.layers.axes import TransformedAxis
from cctool.transforms.layers.coefficients import CoefficientLayer
from cctool.transforms.layers.which import SkippedLayer

# Names of the dims of linear layers' and convolutions' weights.
_AXES = {2: ("out", "in"), 4: ("out", "in", "height", "width")}


@dataclass(frozen=True)
class CodedLayerReport:
    """What became of one layer.

    Attributes:
        name: of the layer; the first, if it is used under several.
        shape: of its weight.
        axes: what is transformed, in words.
        kept: number of coefficients that are kept.
        places: number of all coefficients, which is that of the weights.
        bytes_before: of the weight as it was stored.
        bytes_after: of all that the weight is computed from now, as stored, masks and bases included.
        relative_error: ||w - w'|| / ||w||; None if the weight was zero.
        sqnr_db: 10 log10(sum w^2 / sum (w - w')^2); None if nothing changed, or the weight was zero.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    kept: int
    places: int
    bytes_before: int
    bytes_after: int
    relative_error: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class TransformWeightsReport:
    """What one transform did.

    Attributes:
        kernel: name of the transform.
        layers: that were transformed.
        skipped: selected layers that were not transformed, and why.
        bytes_before: of all tensors of the input as stored.
        bytes_after: of all tensors of the product as stored.
        metrics_before: of the input network.
        metrics_after: of the network with the kept coefficients.
        notes: for the history.
    """

    kernel: str
    layers: tuple[CodedLayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    bytes_before: int
    bytes_after: int
    metrics_before: tuple[Metrics, ...]
    metrics_after: tuple[Metrics, ...]
    notes: tuple[str, ...]

    def tables(self) -> ShownTables:
        """A row for each layer and one for the network."""
        columns = [
            "layer",
            "shape",
            "transformed",
            "kept",
            "of",
            "bytes before",
            "bytes after",
            "error",
            "SQNR dB",
        ]
        rows: list[tuple[object, ...]] = [
            (layer.name, "x".join(map(str, layer.shape)), *astuple(layer)[2:]) for layer in self.layers
        ]
        kept, places = (sum(getattr(layer, name) for layer in self.layers) for name in ("kept", "places"))
        rows.append(
            ("network", "", self.kernel, kept, places, self.bytes_before, self.bytes_after, None, None)
        )
        return [("", columns, rows)]


def coded_layer_report(
    name: str, before: nn.Linear | nn.Conv2d, layer: CoefficientLayer, bytes_before: int, product: Checkpoint
) -> CodedLayerReport:
    """Compare a layer with the ordinary one that it replaced."""
    mask = layer._buffers.get(mask_name("coefficients"))
    kept = layer.coefficients.numel() if mask is None else int(mask.sum())
    error, sqnr = _errors(before.weight, layer.weight)
    return CodedLayerReport(
        name=name,
        shape=tuple(before.weight.shape),
        axes=", ".join(_described(axis, before.weight.dim()) for axis in layer.arguments.axes),
        kept=kept,
        places=before.weight.numel(),
        bytes_before=bytes_before,
        bytes_after=layer_bytes(product, name),
        relative_error=error,
        sqnr_db=sqnr,
    )


def _described(axis: TransformedAxis, dims: int) -> str:
    block = "" if axis.block is None else f" by {axis.block}"
    levels = "" if axis.levels is None else f" L{axis.levels}"
    corner = "" if axis.kept == axis.length else f" first {axis.kept}"
    return f"{_AXES[dims][axis.dim]}{block}{levels}{corner}"


@torch.no_grad()
def _errors(before: Tensor, after: Tensor) -> tuple[float | None, float | None]:
    signal = before.detach().cpu().double()
    energy = float(signal.square().sum())
    noise = float((signal - after.detach().cpu().double()).square().sum())
    if not energy:
        return None, None
    return math.sqrt(noise / energy), 10 * math.log10(energy / noise) if noise else None


def layer_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of all tensors that a layer's weight is computed from, as stored, each counted once."""
    parts = {id(part): part for part in _parts(checkpoint, name)}
    return sum(part.numel() * part.element_size() for part in parts.values())


def _parts(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    of_taps = tap_buffers(checkpoint.model)
    for leaf, tensor in checkpoint.model.get_submodule(name).state_dict().items():
        # A bias is not computed, and a tap's buffers belong to its codec, not to the layer.
        if leaf in ("bias", mask_name("bias")) or f"{name}.{leaf}" in of_taps:
            continue
        form = checkpoint.stored.get(f"{name}.{leaf}")
        yield from [tensor] if form is None else form.parts.values()


def counted(skipped: Sequence[SkippedLayer]) -> list[str]:
    """Notes about layers that were not transformed, one for each reason."""
    reasons: dict[str, list[str]] = {}
    for item in skipped:
        reasons.setdefault(item.reason, []).append(item.name)
    return [f"left alone: {some(names)} ({reason})" for reason, names in reasons.items()]
