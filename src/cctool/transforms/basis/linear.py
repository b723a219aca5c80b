"""Layers whose rows are basis functions of trainable frequency: the shared base, and the linear layer.

A row of the weight is one DCT or DST basis function over the inputs. Only its frequency is trained and
stored: with the bias, two numbers per unit instead of a weight per input (the layers of M. Pias' thesis,
github.com/mir-pias/cnn_compression). Initial frequencies are 0, 1, 2, ...; the parameter holds how far
training moved them (`frequency_offsets`), so that weight decay pulls them back to their start, and few bits
store them well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, StrictBool, model_validator
from torch import Tensor, nn

from cctool.checkpoint.edits.mask import drop_masks, masks_of
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.spec import Dimension, Record
from cctool.transforms.basis.frequencies import real_rows, unit_gradient
from cctool.transforms.layers.base import ComputedLayer, SwappedLayer, WeightCache, remade

BASIS = "basis"
"""Name of these layers in the table of swaps."""

_ROWS = ("rows_0", "rows_1")
_UNIT = 10.0
BIAS_STD = 0.5
"""Initial standard deviation of the biases of linear layers."""


class BasisArguments(Record):
    """Arguments of a basis layer in its `swap` edit.

    Attributes:
        kernel: family of the basis functions.
        outputs: rows of the layer before any cut, of one group of a convolution.
        inputs: samples of a row before any cut.
        cut: dims of the weight that were cut; buffers ``rows_0`` and ``rows_1`` list what remains.
        normalize_gradients: whether gradients of frequencies, and of a convolution's coefficients, are
            normalised to norm 1, and both are trained in the units of the thesis.
        ends: whether a dft layer is the network's last complex one, which outputs |z|.
    """

    kernel: Literal["dct", "dst", "dft"]
    outputs: Dimension
    inputs: Dimension
    cut: Annotated[tuple[Literal[0, 1], ...], Field(max_length=2)] = ()
    normalize_gradients: StrictBool = False
    ends: StrictBool = False

    @model_validator(mode="after")
    def _consistent(self) -> BasisArguments:
        if self.kernel == "dft" and self.cut:
            raise ValueError("layers that compute with complex numbers are not cut")
        if self.kernel != "dft" and self.ends:
            raise ValueError(f"a layer of the {self.kernel} is real, and nothing complex ends there")
        return self

    @property
    def period(self) -> int:
        """The D of `frequencies`: the larger of rows and samples."""
        return max(self.outputs, self.inputs)


class BasisLayer(ComputedLayer):
    """The channel axis of linear and convolutional, real and complex layers.

    Rows are the output channels, samples the input channels (of one group).

    Attributes:
        own: names of its parameters except the bias.
        per_row: those of them whose first dim are the output channels.
        arguments: of the edit.
        frequency_offsets: (rows,) trained: how far frequencies moved, see `offsets`.

    Buffers ``rows_0``, int32 (rows,), and ``rows_1``, (samples,), list the frequencies and samples that
    remain after channels were cut.
    """

    kind = BASIS
    own: tuple[str, ...] = ("frequency_offsets",)
    per_row: tuple[str, ...] = ("frequency_offsets",)
    arguments: BasisArguments
    frequency_offsets: nn.Parameter
    bias: nn.Parameter | None

    def begin(self, arguments: BasisArguments) -> None:
        """Turn the copy of an ordinary layer into this one, with new values; ``arguments`` must fit it."""
        # Only its shape, type and device are used.
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.arguments, self.cache = arguments, WeightCache()
        # The new bias replaces the old one, whose mask does not apply to it.
        if "bias" in masks_of(self):
            drop_masks(self, ["bias"])
        self._register(weight)
        if self._parameters.get("bias") is not None:
            self.bias = nn.Parameter(weight.new_zeros(weight.shape[0]))
        # While a file is loaded parameters are on the meta device, but buffers never are.
        device = torch.device("cpu") if weight.is_meta else weight.device
        for dim in arguments.cut:
            places = torch.arange(weight.shape[dim], dtype=torch.int32, device=device)
            self.register_buffer(_ROWS[dim], places)

    def _register(self, weight: Tensor) -> None:
        self.frequency_offsets = nn.Parameter(weight.new_zeros(weight.shape[0]))

    @property
    def samples(self) -> int:
        """Length of a row: the inputs of an output channel."""
        raise NotImplementedError

    @property
    def indices(self) -> Tensor:
        """(rows,) the initial frequencies; in a convolution each group begins with 0."""
        if 0 in self.arguments.cut:
            return self.get_buffer(_ROWS[0])
        offsets = self.frequency_offsets
        return torch.arange(len(offsets), device=offsets.device) % self.arguments.outputs

    @property
    def positions(self) -> Tensor:
        """(samples,) which samples of the basis functions belong to the inputs."""
        if 1 in self.arguments.cut:
            return self.get_buffer(_ROWS[1])
        return torch.arange(self.samples, device=self.frequency_offsets.device)

    @property
    def frequencies(self) -> Tensor:
        """(rows,) the present frequencies."""
        return self.indices + self.offsets("frequency_offsets")

    def offsets(self, name: str) -> Tensor:
        """What training added to frequencies.

        Parameters are in units of 10 frequencies. Otherwise learning rates that suit weights would move a
        frequency by less than 1 in a whole training, and hardly change the basis.
        """
        return self.trained(name) * (1.0 if self.arguments.normalize_gradients else _UNIT)

    def trained(self, name: str) -> Tensor:
        """A parameter in float32 or float64, its gradient normalised if the arguments say so."""
        tensor: Tensor = getattr(self, name)
        # Half precision cannot distinguish neighbouring high frequencies.
        tensor = tensor if tensor.dtype is torch.float64 else tensor.float()
        return unit_gradient(tensor) if self.arguments.normalize_gradients else tensor

    def channel_rows(self) -> Tensor:
        """(rows, samples), each row of norm 1 before samples were cut."""
        kernel, offsets = self.arguments.kernel, self.offsets("frequency_offsets")
        size, period = self.arguments.inputs, self.arguments.period
        return real_rows(kernel, self.indices, offsets, self.positions, size=size, period=period)

    def compute_weight(self) -> Tensor:
        """Compute the weight in float32 or float64, or the complex types of these."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight of the equivalent ordinary layer, of the parameters' type unless it is complex."""
        return self.cache.get(self._weight, [*self.parameters(recurse=False), *self.buffers(recurse=False)])

    def _weight(self) -> Tensor:
        with torch.autocast(self.frequency_offsets.device.type, enabled=False):
            weight = self.compute_weight()
        return weight if weight.is_complex() else weight.to(self.frequency_offsets.dtype)

    def plain(self) -> nn.Module | None:
        """See `SwappedLayer`; the bias is shared."""
        return self.made_ordinary(self.own, _ROWS)

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        """See `SwappedLayer`. Parameters lose rows; buffers list the remaining rows and samples."""
        layer = remade(self, type(self))
        layer.cache = WeightCache()
        for cut in cuts.get("weight", ()):
            left = (self.indices, self.positions)[cut.dim]
            layer.register_buffer(_ROWS[cut.dim], left[cut.keep.to(left.device)].to(torch.int32))
            if cut.dim == 0:
                for name in self.per_row:
                    layer.keep_rows(name, cut.keep)
        for cut in cuts.get("bias", ()):
            layer.keep_rows("bias", cut.keep)
        dims = sorted({*self.arguments.cut, *(cut.dim for cut in cuts.get("weight", ()))})
        layer.arguments = self.arguments.model_copy(update={"cut": tuple(dims)})
        layer.fit_attributes(cuts.get("weight", ()))
        return layer

    def extra_repr(self) -> str:
        """The ordinary layer's, and the kernel."""
        return f"{super().extra_repr()}, basis={self.arguments.kernel}"


def init_normal(parameter: nn.Parameter, std: float) -> None:
    """Initialise with N(0, std), unless there is nothing to initialise.

    Numbers are drawn on the CPU: a GPU's generator would give another network for the same seed.
    """
    # On the meta device this would import torch's compiler, which takes a second.
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std))


class LinearBasis(BasisLayer):
    """What real and complex linear layers share."""

    in_features: int
    out_features: int

    @property
    def samples(self) -> int:
        """Length of a row: the inputs of the layer."""
        return self.in_features


class BasisLinear(LinearBasis, nn.Linear):  # type: ignore[misc,override]
    """A linear layer of DCT or DST rows: 2 x out_features parameters.

    The bias is initialised with N(0, 0.5), as in the thesis.
    """

    ordinary = nn.Linear

    def begin(self, arguments: BasisArguments) -> None:
        """See `BasisLayer`."""
        super().begin(arguments)
        if self.bias is not None:
            init_normal(self.bias, BIAS_STD)

    def compute_weight(self) -> Tensor:
        """(out_features, in_features), see `frequencies.real_rows`."""
        return self.channel_rows()
