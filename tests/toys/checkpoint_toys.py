"""Small networks, and tables that know only them, for the tests of checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cctool.base.errors import ArchitectureError
from cctool.checkpoint.build import build_fresh
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.mask import add_masks, mask_name, with_masks
from cctool.checkpoint.edits.thin import thin_edits
from cctool.checkpoint.spec import ModelSpec, Step
from cctool.checkpoint.tables import Tables
from cctool.operations.keep.events import edit_kinds
from cctool.quantization.encodings.masked import Inner, encode_masked
from cctool.quantization.encodings.table import ENCODINGS


class Toy(nn.Module):
    """Convolution, batch norm, grouped convolution, linear."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


class Branches(nn.Module):
    """Parallel branches whose common kernel is larger than each, batch norm, and a computed weight."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        sizes = ((3, 1), (1, 3), (3, 1), (1, 3))
        self.branches = nn.ModuleList(
            nn.Conv2d(1, 4, size, padding=(size[0] // 2, size[1] // 2), bias=False) for size in sizes
        )
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(sum(branch(x) for branch in self.branches)).relu()
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    """One weight under two names, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 8)
        self.decode.weight = self.encode.weight
        self.norm = nn.LayerNorm(8)
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.decode(self.norm(self.encode(x.flatten(1)[:, :8]))))


class Hidden(nn.Module):
    """Buffers that no file holds, and a counter that one does."""

    def __init__(self, scale: float = 3.0) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), scale), persistent=False)
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)[:, :4]) * self.scale * self.mask


class FromValues(nn.Module):
    """Computes with its parameters' values while it is built: the meta device cannot serve it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.start = float(self.fc.weight.detach().sum()) * 0 + 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)[:, :4]) * self.start


class PlainAttribute(nn.Module):
    """Keeps a tensor made of a parameter as a plain attribute, which would stay on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.unit = torch.ones_like(self.fc.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] @ (self.fc.weight * self.unit)


class MetaBuffer(nn.Module):
    """Registers a buffer made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("unit", torch.ones_like(self.fc.weight.detach()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] @ (self.fc.weight * self.unit)


class Sizes(nn.Module):
    """Sizes in every way that torch takes them."""

    def __init__(self) -> None:
        super().__init__()
        number = np.int64(4)
        self.fc = nn.Linear(number, number)
        made = torch.zeros(number) + torch.ones(size=(4,)) + torch.full((4,), 2.0) + torch.eye(4)[0]
        made = made + torch.zeros([number]) + torch.zeros(torch.tensor(4)) + torch.eye(4, 4).sum(0)
        self.register_buffer("made", made + torch.ones(()) + torch.empty(torch.Size([4])).zero_())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)[:, :4]) + self.made


class Many(nn.Module):
    """A great number of tiny parameters."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        for index in range(layers):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(1)))


class Norms(nn.Module):
    """Buffers without parameters."""

    def __init__(self, width: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False) for _ in range(layers))


class Stack(nn.Sequential):
    """A single large weight."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Linear(width, width, bias=False))


ARCHITECTURES: dict[str, Any] = {
    "toy": Toy,
    "branches": Branches,
    "tied": Tied,
    "hidden": Hidden,
    "from-values": FromValues,
    "plain-attribute": PlainAttribute,
    "meta-buffer": MetaBuffer,
    "sizes": Sizes,
    "many": Many,
    "norms": Norms,
    "stack": Stack,
}


def _build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if name not in ARCHITECTURES:
        raise ArchitectureError(f"unknown architecture {name!r}")
    module: nn.Module = ARCHITECTURES[name](**arguments)
    return module


TABLES = Tables(build=_build, edits=edit_kinds(), encodings=ENCODINGS)
INPUT = torch.linspace(-1, 1, 2 * 36).reshape(2, 1, 6, 6)
STEP = Step(verb="train", options={"lr": 0.1, "data": None}, seed=3, notes=("änderung",))


def make(name: str = "toy", seed: int = 0, **arguments: Any) -> Checkpoint:
    """A checkpoint with random weights and batch-norm statistics, and one line of history."""
    torch.manual_seed(seed)
    spec = ModelSpec(architecture=name, arguments=arguments, input_shape=(1, 6, 6), classes=("a", "b", "c"))
    model = build_fresh(spec, TABLES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return Checkpoint(model.eval(), spec, history=(STEP,))


def quantized(checkpoint: Checkpoint, encoding: str, **parameters: Any) -> Checkpoint:
    """The checkpoint with every floating-point tensor of two or more dimensions stored by ``encoding``."""
    method = ENCODINGS[encoding]
    stored, by_place = {}, {}
    for name, value in checkpoint.model.state_dict().items():
        if value.is_floating_point() and value.dim() > 1 and value.numel():
            if value.data_ptr() not in by_place:
                by_place[value.data_ptr()] = method.encode(value, parameters)
                value.copy_(method.decode(by_place[value.data_ptr()]))
            stored[name] = by_place[value.data_ptr()]
    return replace(checkpoint, stored=stored)


def masked(checkpoint: Checkpoint, masks: Mapping[str, Tensor], inner: Inner | None = None) -> Checkpoint:
    """The checkpoint with these masks, all of them stored as bits and their weights without the zeros."""
    add_masks(checkpoint.model, masks)
    stored, state = {}, checkpoint.model.state_dict()
    for name, mask in masks.items():
        stored[mask_name(name)] = ENCODINGS["bits"].encode(mask, {})
        bits = stored[mask_name(name)].parts["bits"]
        stored[name] = encode_masked(state[name], mask, inner, bits)
        state[name].copy_(ENCODINGS["masked"].decode(stored[name]))
    return replace(checkpoint, spec=with_masks(checkpoint.spec, checkpoint.model), stored=stored)


def cut(checkpoint: Checkpoint, keep: Tensor) -> Checkpoint:
    """A `Toy` of which only the inner channels ``keep`` are left, cut by hand."""
    model, spec = checkpoint.model, checkpoint.spec
    for module, names in (
        ("conv", ["weight"]),
        ("bn", ["weight", "bias"]),
        ("depthwise", ["weight", "bias"]),
    ):
        owner = model.get_submodule(module)
        for name in names:
            setattr(owner, name, nn.Parameter(getattr(owner, name)[keep].detach()))
    for name in ("running_mean", "running_var"):
        setattr(model.bn, name, getattr(model.bn, name)[keep])
    model.fc.weight = nn.Parameter(model.fc.weight[:, keep].detach())
    model.depthwise.groups = model.depthwise.in_channels = model.bn.num_features = len(keep)
    tensors = [name for name in model.state_dict() if name not in ("fc.bias", "bn.num_batches_tracked")]
    attributes = [("depthwise", "groups"), ("depthwise", "in_channels"), ("bn", "num_features")]
    return replace(checkpoint, spec=spec.with_edits(thin_edits(model, tensors, attributes)))


def logits(checkpoint: Checkpoint) -> Tensor:
    """What the checkpoint's model computes of a fixed input."""
    with torch.no_grad():
        result: Tensor = checkpoint.model.eval()(INPUT)
    return result


def assert_same_tensors(first: nn.Module, second: nn.Module) -> None:
    """Equal names, order, types, shapes and bits."""
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name
