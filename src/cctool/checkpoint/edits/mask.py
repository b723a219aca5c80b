"""Masks: weights that are zero and stay zero, and the `mask` edit that says which tensors have one.

The module of a masked parameter ``weight`` has a persistent bool buffer ``weight_mask`` of its shape, True
for weights that stay. The parameter holds exact zeros where the mask is False: nothing is multiplied in a
forward pass, and modules keep their classes. This is in a layer below training, quantization, pruning and
formats because all of them respect masks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cctool.base.errors import CorruptCheckpointError, SpecError
from cctool.base.networks import qualified
from cctool.checkpoint.spec import Edit, ModelSpec
from cctool.checkpoint.tables import EditKind

_SUFFIX = "_mask"
# Set on the module: its masked parameters. The suffix alone does not tell, as a network may have a buffer
# of such a name.
_MARK = "_masked_parameters"


class Mask(Edit):
    """Parameters of one module, by their names in it, that have a mask."""

    kind: Literal["mask"] = "mask"
    tensors: tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...] = Field(
        min_length=1, max_length=1000
    )


@dataclass(frozen=True)
class MaskedPlace:
    """One masked parameter.

    Attributes:
        name: its qualified name.
        module: that owns it.
        leaf: its name there.
    """

    name: str
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: moving a model to a device may replace the object."""
        found = self.module._parameters[self.leaf]
        assert found is not None
        return found

    @property
    def mask(self) -> Tensor:
        """The mask as it is now, of the parameter's shape, True where a weight stays."""
        found = self.module._buffers[mask_name(self.leaf)]
        assert found is not None
        return found


def mask_name(parameter: str) -> str:
    """Name of the buffer that masks a parameter, qualified as the parameter is."""
    return f"{parameter}{_SUFFIX}"


def masked_places(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[MaskedPlace]:
    """Every masked parameter, in the order of `model.named_modules()`.

    Args:
        model: any module.
        remove_duplicate: list a shared module under its first name only.
    """
    for prefix, module in model.named_modules(remove_duplicate=remove_duplicate):
        for leaf in getattr(module, _MARK, ()):
            yield MaskedPlace(qualified(prefix, leaf), module, leaf)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks by the qualified name of their parameter; True stays."""
    return {place.name: place.mask for place in masked_places(model)}


def mask_buffers(model: nn.Module) -> set[str]:
    """Names in the state dict that are masks, shared modules under each of their names."""
    return {mask_name(place.name) for place in masked_places(model, remove_duplicate=False)}


@torch.no_grad()
def add_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Mask parameters in place and zero the weights that go; a mask that is there already is ANDed.

    Args:
        model: any module.
        masks: bool tensors of the parameters' shapes by qualified name, True stays.

    Raises:
        SpecError: if a name is no parameter, or its module has an attribute of the mask's name.
    """
    present = masks_of(model)
    for name, mask in masks.items():
        if name in present:
            present[name].logical_and_(mask.to(present[name].device))
            continue
        owner, _, leaf = name.rpartition(".")
        _register(model, owner, leaf)
        place = MaskedPlace(name, model.get_submodule(owner), leaf)
        place.mask.copy_(mask)
    zero_masked(model)


@torch.no_grad()
def zero_masked(model: nn.Module) -> None:
    """Set every masked weight to exactly zero, for example after weights were loaded from elsewhere."""
    for place in masked_places(model):
        place.parameter.masked_fill_(place.mask.logical_not(), 0)


def drop_masks(model: nn.Module, names: Collection[str]) -> None:
    """Remove the masks of these parameters; the weights do not change."""
    for place in list(masked_places(model)):
        if place.name in names:
            left = tuple(leaf for leaf in getattr(place.module, _MARK) if leaf != place.leaf)
            setattr(place.module, _MARK, left)
            del place.module._buffers[mask_name(place.leaf)]


def with_masks(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """The spec with its mask edits replaced by those of ``model``."""
    others = tuple(edit for edit in spec.edits if edit.get("kind") != "mask")
    owned: dict[str, list[str]] = {}
    for place in masked_places(model):
        owned.setdefault(place.name.rpartition(".")[0], []).append(place.leaf)
    edits = tuple(Mask(module=owner, tensors=tuple(leaves)) for owner, leaves in owned.items())
    return spec.model_copy(update={"edits": others}).with_edits(edits)


def derived_masks(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that a bare state dict lacks, because exports leave them out: what is zero there stays zero.

    ``model`` was built with its mask edits; ``tensors`` is the state dict.
    """
    return {
        mask_name(place.name): tensors[place.name] != 0
        for place in masked_places(model, remove_duplicate=False)
        if mask_name(place.name) not in tensors and place.name in tensors
    }


def _register(model: nn.Module, owner: str, leaf: str) -> None:
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise SpecError(f"mask: the architecture has no module {owner!r}") from None
    parameter = module._parameters.get(leaf)
    if parameter is None or is_lazy(parameter):
        raise SpecError(f"mask: {owner or 'the model'} has no parameter {leaf!r} of a known shape")
    if isinstance(module, torch.jit.ScriptModule):
        raise SpecError(f"mask: {owner or 'the model'} is scripted, and takes no further buffers")
    name = mask_name(leaf)
    if hasattr(module, name):
        raise SpecError(f"mask: {owner or 'the model'} has a {name!r} of its own")
    # While a network is built for loading, parameters are on the meta device, but buffers on the CPU.
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    module.register_buffer(name, torch.ones(tuple(parameter.shape), dtype=torch.bool, device=device))
    setattr(module, _MARK, (*getattr(module, _MARK, ()), leaf))


def _apply_mask(model: nn.Module, edit: Mask) -> None:
    for leaf in edit.tensors:
        _register(model, edit.module, leaf)


def _check_mask(model: nn.Module, edit: Mask) -> None:
    module = model.get_submodule(edit.module)
    for leaf in edit.tensors:
        place = MaskedPlace(qualified(edit.module, leaf), module, leaf)
        if bool((place.parameter.detach() != 0).logical_and_(place.mask.logical_not()).any()):
            raise CorruptCheckpointError(f"{place.name} is not zero where its mask says so")


MASK = EditKind(record=Mask, apply=_apply_mask, order=10, check=_check_mask)
