"""The `thin` edit: final widths of a module after channels were cut.

Edits of other kinds belong to the packages that make them; this one only needs a module, and every
pruned checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from cctool.checkpoint.masks import mask_buffers
from cctool.checkpoint.spec import MAX_DIMENSION, Dimension, Edit, ModelSpec
from cctool.checkpoint.tables import EditKind
from cctool.errors import SpecError

__all__ = ["THIN", "Thin", "thin_edits", "thinned"]

_Width = Annotated[int, Field(ge=1, le=MAX_DIMENSION, strict=True)]


class Thin(Edit):
    """Final shapes of a module's own tensors and its integer attributes that hold a width."""

    kind: Literal["thin"] = "thin"
    shapes: dict[str, tuple[Dimension, ...]] = Field(default={})
    attributes: dict[str, _Width | tuple[_Width, ...]] = Field(default={})


def thinned(
    spec: ModelSpec, model: nn.Module, shapes: Iterable[str], attributes: Iterable[tuple[str, str]]
) -> ModelSpec:
    """Record a cut: the spec whose thin edits describe the present widths of ``model``.

    What an earlier cut changed stays recorded, also where this one left it alone: an edit is the final state
    of its module.

    Args:
        spec: of the model before this cut.
        model: the model after it.
        shapes: qualified names of the parameters and buffers that were cut; masks among them are left out.
        attributes: (module name, attribute) pairs that were changed.
    """
    earlier = [Thin.model_validate(edit) for edit in spec.edits if edit.get("kind") == "thin"]
    names = [f"{edit.module}.{leaf}" if edit.module else leaf for edit in earlier for leaf in edit.shapes]
    pairs = [(edit.module, attribute) for edit in earlier for attribute in edit.attributes]
    # A mask follows its parameter, and is not there yet when thin edits are applied.
    masks = mask_buffers(model)
    cut = [name for name in shapes if name not in masks]
    return spec.with_edits(thin_edits(model, [*names, *cut], [*pairs, *attributes]))


def thin_edits(
    model: nn.Module, shapes: Iterable[str], attributes: Iterable[tuple[str, str]]
) -> tuple[Thin, ...]:
    """Describe the present widths of a thinned model.

    Args:
        model: the model after cutting.
        shapes: qualified names of the parameters and buffers that were cut.
        attributes: (module name, attribute) pairs that were changed.

    Returns:
        One edit per touched module, in the order of `model.named_modules()`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, int | tuple[int, ...]]]] = {}
    for name in shapes:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(modules[owner], leaf)
        found.setdefault(owner, ({}, {}))[0][leaf] = tuple(tensor.shape)
    for owner, attribute in attributes:
        value = getattr(modules[owner], attribute)
        found.setdefault(owner, ({}, {}))[1][attribute] = value if isinstance(value, int) else tuple(value)
    return tuple(
        Thin(module=name, shapes=found[name][0], attributes=found[name][1])
        for name in modules
        if name in found
    )


def _apply_thin(model: nn.Module, edit: Thin) -> None:
    try:
        module = model.get_submodule(edit.module)
    except AttributeError:
        raise SpecError(f"thin: the architecture has no module {edit.module!r}") from None
    for name, shape in edit.shapes.items():
        _resize(model, module, edit.module, name, shape)
    for name, value in edit.attributes.items():
        present = vars(module).get(name) if not name.startswith("_") else None
        if not _is_width(present, value):
            raise SpecError(f"thin: {edit.module}.{name} is not an integer attribute of the architecture")
        if any(new > old for new, old in zip(_several(value), _several(present), strict=True)):
            raise SpecError(f"thin: {edit.module}.{name} is {present} and cannot grow to {value}")
        setattr(module, name, value if isinstance(value, int) or isinstance(present, tuple) else list(value))


def _is_width(present: Any, value: int | tuple[int, ...]) -> bool:
    if isinstance(value, int):
        return type(present) is int
    return (
        isinstance(present, (tuple, list))
        and len(present) == len(value)
        and all(type(item) is int for item in present)
    )


def _several(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _resize(model: nn.Module, module: nn.Module, owner: str, name: str, shape: tuple[int, ...]) -> None:
    parameter, buffer = module._parameters.get(name), module._buffers.get(name)
    present = parameter if parameter is not None else buffer
    if present is None:
        raise SpecError(f"thin: {owner or 'the model'} has no tensor {name!r}")
    if present.dim() != len(shape) or any(new > old for new, old in zip(shape, present.shape, strict=True)):
        raise SpecError(
            f"thin: {owner}.{name} of shape {list(present.shape)} cannot be cut to {list(shape)}: "
            "the same number of dimensions, none larger, is allowed"
        )
    if parameter is None:
        # A cut view of the built buffer keeps what non-persistent ones hold; stored values replace it.
        module._buffers[name] = present[tuple(slice(0, size) for size in shape)].clone()
        return
    resized = nn.Parameter(
        torch.empty(shape, dtype=parameter.dtype, device=parameter.device),
        requires_grad=parameter.requires_grad,
    )
    for other in model.modules():
        for key, value in other._parameters.items():
            if value is parameter:
                other._parameters[key] = resized


THIN = EditKind(record=Thin, apply=_apply_thin)
