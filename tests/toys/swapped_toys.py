"""Swapped layers that are easy to follow: what they store is half of their weight, input columns by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.thin import Cut
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.checkpoint.tables import EditKind, Tables
from cctool.models import registry
from cctool.operations.registries import tables
from cctool.pruning.cut.surgery import cut_tensor
from cctool.transforms.layers.base import Swap, SwappedLayer, with_swaps


class HalfLinear(nn.Linear, SwappedLayer):
    """Transformed along its inputs: cutting these slices an index, and ``coefficients`` stay."""

    def __init__(self, layer: nn.Linear, rows: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.coefficients = nn.Parameter(layer.weight.detach() / 2)
        self.register_buffer("rows_1", torch.arange(layer.in_features) if rows is None else rows)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        return 2 * self.coefficients[:, self.rows_1]

    def swap(self, module: str) -> Swap:
        return Swap(module=module, layer="half-linear", arguments={"size": self.coefficients.shape[1]})

    def plain(self) -> nn.Module:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.weight.detach())
        layer.bias = self.bias
        return layer

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        left = deepcopy(self)
        for cut in cuts.get("weight", ()):
            if cut.dim == 0:
                left.coefficients = nn.Parameter(left.coefficients.detach()[cut.keep])
                left.out_features = len(cut.keep)
            else:
                left.rows_1 = left.rows_1[cut.keep]
                left.in_features = len(cut.keep)
        if "bias" in cuts:
            left.bias = nn.Parameter(cut_tensor(left.bias.detach(), cuts["bias"]))
        return left


class HalfConv2d(nn.Conv2d, SwappedLayer):
    """Transformed along no channels: cutting slices ``coefficients``, and what masks them."""

    def __init__(self, layer: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "output_padding",
        ):
            setattr(self, name, getattr(layer, name))
        self.padding_mode, self.transposed = layer.padding_mode, False
        self._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
        self.coefficients = nn.Parameter(layer.weight.detach() / 2)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        return 2 * self.coefficients

    def swap(self, module: str) -> Swap:
        return Swap(module=module, layer="half-conv")

    def plain(self) -> nn.Module:
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
        )
        layer.weight = nn.Parameter(self.weight.detach())
        layer.bias = self.bias
        return layer

    def taken(self, cuts: Mapping[str, Sequence[Cut]]) -> SwappedLayer:
        left = deepcopy(self)
        weight = cuts.get("weight", ())
        left.coefficients = nn.Parameter(cut_tensor(left.coefficients.detach(), weight))
        if "coefficients_mask" in left._buffers:
            left.coefficients_mask = cut_tensor(left.coefficients_mask, weight)
        left.out_channels, left.in_channels = left.coefficients.shape[0], left.coefficients.shape[1]
        if "bias" in cuts:
            left.bias = nn.Parameter(cut_tensor(left.bias.detach(), cuts["bias"]))
        return left


def _apply(model: nn.Module, edit: Swap) -> None:
    layer: Any = model.get_submodule(edit.module)
    made: nn.Module
    if edit.layer == "half-conv":
        made = HalfConv2d(layer)
    else:
        made = HalfLinear(layer)
        size = int(str(edit.arguments["size"]))
        made.coefficients = nn.Parameter(made.coefficients.new_empty(layer.out_features, size))
    owner, _, leaf = edit.module.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def toy_tables() -> Tables:
    """The tables of the commands, whose swap edits are these toys'."""
    return replace(tables(), edits={**tables().edits, "swap": EditKind(record=Swap, apply=_apply, order=5)})


def swapped(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    """A copy in which these layers are toys."""
    model = deepcopy(checkpoint.model)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        made = HalfLinear(layer) if isinstance(layer, nn.Linear) else HalfConv2d(layer)
        setattr(model.get_submodule(owner), leaf, made)
    return replace(checkpoint, model=model.eval(), spec=with_swaps(checkpoint.spec, model))


def network(name: str = "resnet20", seed: int = 0, **arguments: Any) -> Checkpoint:
    """A small network of the registry whose batch norms are not neutral."""
    given: dict[str, Any] = {"in_channels": 1, **({"base": 4} if name != "lenet" else {}), **arguments}
    torch.manual_seed(seed)
    model = registry.build(name, given).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                value.data.copy_(0.5 + torch.rand(value.shape, generator=generator))
            for value in (module.bias, module.running_mean):
                value.data.copy_(torch.rand(value.shape, generator=generator) - 0.5)
    spec = ModelSpec(
        architecture=name,
        arguments=given,
        input_shape=(1, 32, 32),
        classes=tuple("0123456789"),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    )
    return Checkpoint(model, spec)
