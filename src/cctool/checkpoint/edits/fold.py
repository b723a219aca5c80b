"""The `fold` edit: fixed transformations that were baked into the weights of plain layers.

It says how a module looks now, never how that came about: which of its computed tensors are parameters, which
bias and kernel a layer has, and which modules are gone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, model_serializer, model_validator
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from cctool.base.errors import SpecError
from cctool.base.networks import put_everywhere, qualified
from cctool.checkpoint.edits.computed import make_plain
from cctool.checkpoint.edits.thin import Thin, thin_edits
from cctool.checkpoint.spec import Edit, ModelSpec, Shape
from cctool.checkpoint.tables import EditKind

T = TypeVar("T")

MAX_KERNEL = 1024
"""Largest kernel and padding along one axis that an edit may name."""

_Name = Annotated[str, Field(min_length=1, max_length=4096)]
_Extents = tuple[Annotated[int, Field(ge=1, le=MAX_KERNEL, strict=True)], ...]
_Paddings = tuple[Annotated[int, Field(ge=0, le=MAX_KERNEL, strict=True)], ...]


class Fold(Edit):
    """What one module is after folding.

    Attributes:
        becomes: ``layer`` is the module itself; ``rest`` only some of its children, called one after another;
            ``nothing`` a branch that adds nothing to a sum.
        plain: shapes of tensors that were computed from others at each call, and are parameters now.
        bias: whether a layer without a bias was given one, of as many values as it has outputs.
        kernel_size: of a convolution whose kernel grew; None if it did not.
        padding: of that convolution; None keeps the architecture's.
        children: that are the rest, in the order of their calls; without any the module changes nothing.
    """

    kind: Literal["fold"] = "fold"
    becomes: Literal["layer", "rest", "nothing"] = "layer"
    plain: dict[_Name, Shape] = Field(default={}, max_length=1000)
    bias: bool = False
    kernel_size: _Extents | None = None
    padding: _Paddings | None = None
    children: tuple[_Name, ...] = Field(default=(), max_length=1000)

    @model_validator(mode="after")
    def _consistent(self) -> Fold:
        of_layer = bool(self.plain or self.bias or self.kernel_size or self.padding)
        if of_layer and self.becomes != "layer":
            raise ValueError(f"what becomes {self.becomes} has no tensors")
        if self.children and self.becomes != "rest":
            raise ValueError("only a rest has children")
        if self.padding is not None and len(self.padding) != len(self.kernel_size or ()):
            raise ValueError("padding needs a kernel_size of as many axes")
        return self

    @model_serializer(mode="wrap")
    def _briefly(self, handler: Any) -> dict[str, Any]:
        """Leave out what is as it is by default: a network may have hundreds of these."""
        document: dict[str, Any] = handler(self)
        fixed = ("kind", "module", "becomes")
        return {key: value for key, value in document.items() if key in fixed or value}

    def after(self, earlier: Fold | None) -> Fold:
        """The state of a module that ``earlier`` describes when this fold was added to it."""
        if earlier is None or self.becomes != "layer" or earlier.becomes != "layer":
            return self
        return Fold(
            module=self.module,
            plain={**earlier.plain, **self.plain},
            bias=self.bias or earlier.bias,
            kernel_size=self.kernel_size or earlier.kernel_size,
            padding=self.padding if self.padding is not None else earlier.padding,
        )


_ADDING = frozenset(["add", "add_", "__add__", "__radd__", "__iadd__"])


class Nothing:
    """What an absent branch gives to a sum: added to anything, it leaves that as it is."""

    def __add__(self, other: T) -> T:
        return other

    __radd__ = __add__
    __iadd__ = __add__

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Of torch's functions only a plain addition takes nothing."""
        if func.__name__ not in _ADDING or len(args) != 2 or kwargs:
            return NotImplemented
        one, other = args
        return other if isinstance(one, cls) else one


class AbsentBranch(nn.Module):
    """In the place of a branch whose work another layer does now."""

    def forward(self, *inputs: Any, **more: Any) -> Nothing:
        """Give `Nothing`, whatever the inputs are."""
        return Nothing()


def with_folds(spec: ModelSpec, model: nn.Module, folds: Sequence[Fold]) -> ModelSpec:
    """The spec with ``folds`` added to what it says of their modules; ``model`` is folded already.

    Fold edits are applied before cuts, so that the edits of earlier cuts are written anew: they lose tensors
    that are gone, and get those that came.
    """
    earlier = {
        str(edit["module"]): Fold.model_validate(edit) for edit in spec.edits if edit["kind"] == "fold"
    }
    spec = spec.with_edits(tuple(fold.after(earlier.get(fold.module)) for fold in folds))
    thins = [Thin.model_validate(edit) for edit in spec.edits if edit["kind"] == "thin"]
    if not thins:
        return spec
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [qualified(edit.module, leaf) for edit in thins for leaf in edit.shapes]
    names += [
        qualified(fold.module, leaf)
        for fold in folds
        if fold.becomes == "layer"
        for leaf in ("weight", "bias", *fold.plain)
    ]
    present = [name for name in dict.fromkeys(names) if _tensor(modules, name) is not None]
    attributes = [
        (edit.module, name)
        for edit in thins
        for name, value in edit.attributes.items()
        if edit.module in modules
        and isinstance(vars(modules[edit.module]).get(name), int if isinstance(value, int) else (tuple, list))
    ]
    kept = {
        qualified(edit.module, leaf): {dim: list(indices) for dim, indices in pairs}
        for edit in thins
        for leaf, pairs in edit.kept.items()
        if _tensor(modules, qualified(edit.module, leaf)) is not None
    }
    others = tuple(edit for edit in spec.edits if edit["kind"] != "thin")
    spec = spec.model_copy(update={"edits": others})
    return spec.with_edits(thin_edits(model, present, attributes, kept))


def _tensor(modules: dict[str, nn.Module], name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    if owner not in modules:
        return None
    module = modules[owner]
    parameter = module._parameters.get(leaf)
    return parameter if parameter is not None else module._buffers.get(leaf)


def apply_fold(model: nn.Module, edit: Fold) -> None:
    """Give a module the structure that an edit describes; new tensors have no values yet.

    Raises:
        SpecError: if the module does not fit the edit.
    """
    try:
        module = model.get_submodule(edit.module)
    except AttributeError:
        raise SpecError(f"fold: the architecture has no module {edit.module!r}") from None
    if edit.becomes != "layer":
        if module is model:
            raise SpecError("fold: the network itself cannot be left out")
        left = AbsentBranch() if edit.becomes == "nothing" else _rest(module, edit)
        put_everywhere(model, module, left.train(module.training))
        return
    if edit.plain:
        like = next(module.parameters(), torch.empty(0))
        make_plain(module, {name: _empty(like, shape) for name, shape in edit.plain.items()})
    if edit.kernel_size is not None:
        _grow(module, edit)
    if edit.bias and module._parameters.get("bias") is None:
        _add_bias(module, edit)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    # By torch's own function, which is bounded while a file is loaded; a tensor's method is not.
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def _rest(module: nn.Module, edit: Fold) -> nn.Module:
    missing = [name for name in edit.children if module._modules.get(name) is None]
    if missing:
        raise SpecError(f"fold: {edit.module} has no module {missing[0]!r}")
    children = OrderedDict((name, module.get_submodule(name)) for name in edit.children)
    return nn.Sequential(children) if children else nn.Identity()


def _grow(module: nn.Module, edit: Fold) -> None:
    """Give a convolution a larger kernel, and the padding that goes with it."""
    size, padding = edit.kernel_size or (), edit.padding
    if (
        not isinstance(module, _ConvNd)
        or isinstance(module, _ConvTransposeNd)
        or module.padding_mode != "zeros"
    ):
        raise SpecError(f"fold: {edit.module} is no convolution whose kernel can grow")
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != len(size) + 2:
        raise SpecError(f"fold: {edit.module} has no kernel of {len(size)} axes")
    if any(new < old for new, old in zip(size, weight.shape[2:], strict=True)):
        raise SpecError(f"fold: the kernel of {edit.module} cannot shrink to {list(size)}")
    grown = _empty(weight, (*weight.shape[:2], *size))
    module.register_parameter("weight", nn.Parameter(grown, requires_grad=weight.requires_grad))
    module.kernel_size = size
    if padding is not None:
        module.padding = padding
        module._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]


def _add_bias(module: nn.Module, edit: Fold) -> None:
    weight = module._parameters.get("weight")
    if not isinstance(module, (nn.Linear, _ConvNd)) or weight is None:
        raise SpecError(f"fold: {edit.module} is no layer that takes a bias")
    outputs = weight.shape[0]
    if isinstance(module, _ConvTransposeNd):
        outputs = weight.shape[1] * module.groups
    module.register_parameter(
        "bias", nn.Parameter(_empty(weight, (outputs,)), requires_grad=weight.requires_grad)
    )


# After fresh last layers, before cuts: what is folded has the architecture's widths, and is cut as they are.
FOLD = EditKind(record=Fold, apply=apply_fold, order=-3)
