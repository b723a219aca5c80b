"""Layers whose rows are basis functions of trainable frequency: what they share, and the linear one.

A row of the weight is one DCT or DST basis function over the inputs. What is trained and stored is its
frequency: two numbers a unit with the bias, in place of a weight for each input (the "DCT layers" of M. Pias'
thesis, github.com/mir-pias/cnn_compression). Frequencies begin as 0, 1, 2, ...; the parameter holds how far
training moved them from there (`frequency_offsets`), so that weight decay draws them to where they began, and
few bits store them well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, StrictBool
from torch import Tensor, nn

from cctool.checkpoint.spec import Dimension, Record
from cctool.transforms.frequencies import WeightCache, real_rows, unit_gradient
from cctool.transforms.swapped import Cut, Swap, SwappedLayer

__all__ = ["BASIS", "BasisArguments", "BasisLayer", "BasisLinear", "kept_indices"]

BASIS = "basis"
"""Name of these layers in the table of swaps."""

_ROWS = ("rows_0", "rows_1")
_UNIT = 10.0


class BasisArguments(Record):
    """Arguments of a basis layer in its `swap` edit.

    Attributes:
        kernel: family of the basis functions.
        outputs: rows of the layer before anything was cut, of one group of a convolution.
        inputs: samples of a row before anything was cut.
        cut: dims of the weight of which something is gone; buffers ``rows_0`` and ``rows_1`` say what is left.
        normalize_gradients: whether gradients of frequencies, and of a convolution's coefficients, come back
            with norm 1, and both are trained in the units of the thesis.
        magnitude: whether a complex layer puts out |z|; real layers do not have it.
    """

    kernel: Literal["dct", "dst", "dft"]
    outputs: Dimension
    inputs: Dimension
    cut: Annotated[tuple[Literal[0, 1], ...], Field(max_length=2)] = ()
    normalize_gradients: StrictBool = False
    magnitude: StrictBool = False

    @property
    def period(self) -> int:
        """The D of `frequencies`: rows or samples, whichever are more."""
        return max(self.outputs, self.inputs)

    def with_cuts(self, dims: Mapping[int, object]) -> BasisArguments:
        """The arguments of a layer that was cut in these dims, too."""
        return self.model_copy(update={"cut": tuple(sorted({*self.cut, *dims}))})


class BasisLayer(SwappedLayer):
    """What linear and convolutional, real and complex layers share: the axis of the channels.

    Its rows are the output channels, its samples the input channels (of one group).

    Attributes:
        arguments: as in the edit.
        frequency_offsets: (rows,) trained: how far frequencies moved, see `offsets`.
        rows_0: (rows,) int64, the rows' numbers; a buffer of layers whose rows were cut.
        rows_1: (samples,) int64, which samples are left; a buffer of layers whose inputs were cut.
    """

    arguments: BasisArguments
    frequency_offsets: nn.Parameter

    def _begin(self, arguments: BasisArguments, rows: int, samples: int, like: Tensor) -> None:
        """Register what all basis layers have, on the device and of the type of ``like``."""
        self.arguments = arguments
        self._cache = WeightCache()
        self._samples = samples
        self.frequency_offsets = nn.Parameter(torch.zeros(rows, dtype=like.dtype, device=like.device))
        for dim, size in enumerate((rows, samples)):
            if dim in arguments.cut:
                # Parameters may lie on the meta device, while a file is loaded; buffers never do.
                device = torch.device("cpu") if like.is_meta else like.device
                self.register_buffer(_ROWS[dim], torch.arange(size, device=device))

    @property
    def indices(self) -> Tensor:
        """(rows,) the frequencies that training began with; in a convolution each group begins with 0."""
        if 0 in self.arguments.cut:
            return self.get_buffer(_ROWS[0])
        offsets = self.frequency_offsets
        return torch.arange(len(offsets), device=offsets.device) % self.arguments.outputs

    @property
    def positions(self) -> Tensor:
        """(samples,) which samples of the basis functions the inputs meet."""
        if 1 in self.arguments.cut:
            return self.get_buffer(_ROWS[1])
        return torch.arange(self._samples, device=self.frequency_offsets.device)

    @property
    def frequencies(self) -> Tensor:
        """(rows,) the present frequencies."""
        return self.indices + self.offsets("frequency_offsets")

    @property
    def weight(self) -> Tensor:
        """The weight that an ordinary layer would hold, of the parameters' type; differentiable."""
        return self._cache.get(self, self._computed_weight)

    def _computed_weight(self) -> Tensor:
        # Half precision cannot tell one frequency from the next.
        with torch.autocast(self.frequency_offsets.device.type, enabled=False):
            return self.compute_weight()

    @abstractmethod
    def compute_weight(self) -> Tensor:
        """Compute the weight from the parameters, in float32 or float64."""

    def trained(self, name: str) -> Tensor:
        """A parameter in float32 or float64, its gradient normalised where that was asked for."""
        tensor: Tensor = self.get_parameter(name)
        if self.arguments.normalize_gradients:
            tensor = unit_gradient(tensor)
        return tensor if tensor.dtype is torch.float64 else tensor.float()

    def offsets(self, name: str) -> Tensor:
        """What training added to frequencies.

        Parameters are in units of 10 frequencies: rates that suit weights would move a frequency by less than
        1 in a whole training else, and leave the basis what it was.
        """
        return self.trained(name) * (1.0 if self.arguments.normalize_gradients else _UNIT)

    def channel_rows(self) -> Tensor:
        """(rows, samples) of the real kernels, each of norm 1 before samples were cut."""
        return real_rows(
            self.arguments.kernel,
            self.indices,
            self.offsets("frequency_offsets"),
            self.positions,
            size=self.arguments.inputs,
            period=self.arguments.period,
        )

    def train(self, mode: bool = True) -> BasisLayer:
        """Set the mode; the cached weight is dropped, for values may be changed behind autograd's back."""
        self._cache.clear()
        super().train(mode)
        return self

    def swap(self, module: str) -> Swap:
        """See `SwappedLayer`."""
        return Swap(module=module, layer=BASIS, arguments=self.arguments.model_dump(mode="json"))

    @torch.no_grad()
    def _take_rows(self, source: BasisLayer, kept: Mapping[int, Tensor]) -> None:
        """Take over what the channel axis of ``source`` keeps; ``kept`` names indices by dim."""
        left = [source.indices, source.positions]
        for dim in self.arguments.cut:
            keep = kept.get(dim)
            rows = left[dim] if keep is None else left[dim].index_select(0, keep.to(left[dim].device))
            self.get_buffer(_ROWS[dim]).copy_(rows)
        self.take_parameter(source, "frequency_offsets", kept.get(0))
        if source.bias is not None:
            self.take_parameter(source, "bias", kept.get(0))

    def take_parameter(self, source: nn.Module, name: str, keep: Tensor | None) -> None:
        """Copy a parameter of ``source``, of its first dim only the indices of ``keep``."""
        values = source.get_parameter(name)
        present = self.get_parameter(name)
        present.copy_(values if keep is None else values.index_select(0, keep.to(values.device)))
        present.requires_grad_(values.requires_grad)


def kept_indices(cuts: Mapping[str, Sequence[Cut]]) -> dict[int, Tensor]:
    """Indices of the weight that stay, by dim."""
    return {cut.dim: cut.keep for cut in cuts.get("weight", ())}


class BasisLinear(BasisLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer of DCT or DST rows: 2 x out_features parameters.

    Args:
        in_features: of the layer as it is now.
        out_features: likewise.
        bias: whether it has one.
        arguments: kernel ``dct`` or ``dst``.
        like: gives device and type.

    The bias begins as N(0, 0.5), as in the thesis.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, arguments: BasisArguments, like: Tensor
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._begin(arguments, out_features, in_features, like)
        self.bias = nn.Parameter(torch.zeros_like(self.frequency_offsets)) if bias else None
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.5)

    def compute_weight(self) -> Tensor:
        """(out_features, in_features), see `frequencies.real_rows`."""
        return self.channel_rows().to(self.frequency_offsets.dtype)

    def plain(self) -> nn.Module:
        """See `SwappedLayer`."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return with_values(layer, self)

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """See `SwappedLayer`."""
        kept = kept_indices(cuts)
        layer = BasisLinear(
            len(kept[1]) if 1 in kept else self.in_features,
            len(kept[0]) if 0 in kept else self.out_features,
            self.bias is not None,
            self.arguments.with_cuts(kept),
            self.frequency_offsets,
        )
        layer._take_rows(self, kept)
        return layer.train(self.training)


@torch.no_grad()
def with_values(layer: nn.Module, source: BasisLayer) -> nn.Module:
    """Give an ordinary layer, built without values, the weight and the bias of a basis layer."""
    trains = source.frequency_offsets.requires_grad
    layer.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=trains)
    bias = source.bias
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer.train(source.training)
