"""The `thin` edit: final widths of a module after channels were cut.

Edits of other kinds belong to the packages that make them; this one only needs a module, and every
pruned checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_serializer
from torch import Tensor, nn

from cctool.base.errors import SpecError
from cctool.base.networks import qualified
from cctool.checkpoint.edits.mask import mask_buffers
from cctool.checkpoint.spec import MAX_DIMENSION, Dimension, Edit, ModelSpec
from cctool.checkpoint.tables import EditKind

_Index = Annotated[int, Field(ge=0, le=MAX_DIMENSION, strict=True)]
_Kept = tuple[tuple[_Index, tuple[_Index, ...]], ...]


class Thin(Edit):
    """Final shapes of a module's own tensors, and its integer attributes that are widths, by name.

    Attributes:
        kept: for non-persistent buffers, which the architecture makes and no file holds: pairs of a dim and
            the indices of it that remain, ascending.
    """

    kind: Literal["thin"] = "thin"
    shapes: dict[str, tuple[Dimension, ...]] = Field(default={})
    attributes: dict[str, Dimension | tuple[Dimension, ...]] = Field(default={})
    kept: dict[str, _Kept] = Field(default={})

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: Callable[[Thin], dict[str, Any]]) -> dict[str, Any]:
        """Leave an empty `kept` out, so that such an edit is written as before there was a `kept`."""
        document = handler(self)
        return document if document["kept"] else {k: v for k, v in document.items() if k != "kept"}


@dataclass(frozen=True)
class Cut:
    """Indices of one dim that remain, ascending, out of `size`."""

    dim: int
    keep: Tensor
    size: int


Kept = dict[str, dict[int, list[int]]]
"""For each non-persistent buffer, by dim, the remaining indices of the one that the architecture makes."""


def thinned(
    spec: ModelSpec,
    model: nn.Module,
    shapes: Iterable[str] | Mapping[str, Sequence[Cut]],
    attributes: Iterable[tuple[str, str]],
) -> ModelSpec:
    """Record a cut: the spec whose thin edits describe the present widths of ``model``.

    An edit is the final state of its module, so what earlier cuts changed stays recorded, even if this one
    did not change it.

    Args:
        spec: of the model before this cut.
        model: the model after it.
        shapes: qualified names of the parameters and buffers that were cut; masks among them are left out.
            Non-persistent buffers need their cuts as well, or loading cannot repeat them.
        attributes: (module name, attribute) pairs that were changed.
    """
    earlier = [Thin.model_validate(edit) for edit in spec.edits if edit.get("kind") == "thin"]
    names = [qualified(edit.module, leaf) for edit in earlier for leaf in edit.shapes]
    pairs = [(edit.module, attribute) for edit in earlier for attribute in edit.attributes]
    # A mask follows its parameter, and is not there yet when thin edits are applied.
    masks = mask_buffers(model)
    cut = [name for name in shapes if name not in masks]
    cuts = shapes if isinstance(shapes, Mapping) else {}
    kept = _kept(earlier, model, {name: cuts[name] for name in cut if name in cuts})
    return spec.with_edits(thin_edits(model, [*names, *cut], [*pairs, *attributes], kept))


def _kept(earlier: Sequence[Thin], model: nn.Module, cuts: Mapping[str, Sequence[Cut]]) -> Kept:
    """What remains of non-persistent buffers after earlier cuts and this one."""
    kept: Kept = {
        qualified(edit.module, leaf): {dim: list(indices) for dim, indices in pairs}
        for edit in earlier
        for leaf, pairs in edit.kept.items()
    }
    for name in cuts:
        owner, _, leaf = name.rpartition(".")
        if leaf in model.get_submodule(owner)._non_persistent_buffers_set:
            places = kept.setdefault(name, {})
            for cut in cuts[name]:
                left = cut.keep.tolist()
                places[cut.dim] = [places[cut.dim][i] for i in left] if cut.dim in places else left
    return kept


def thin_edits(
    model: nn.Module, shapes: Iterable[str], attributes: Iterable[tuple[str, str]], kept: Kept | None = None
) -> tuple[Thin, ...]:
    """Describe the present widths of a thinned model.

    Args:
        model: the model after cutting.
        shapes: qualified names of the parameters and buffers that were cut.
        attributes: (module name, attribute) pairs that were changed.
        kept: by qualified name, what remains of non-persistent buffers.

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
    left: dict[str, dict[str, _Kept]] = {}
    for name, dims in (kept or {}).items():
        owner, _, leaf = name.rpartition(".")
        left.setdefault(owner, {})[leaf] = tuple(
            (dim, tuple(indices)) for dim, indices in sorted(dims.items())
        )
    return tuple(
        Thin(module=name, shapes=found[name][0], attributes=found[name][1], kept=left.get(name, {}))
        for name in modules
        if name in found
    )


def _apply_thin(model: nn.Module, edit: Thin) -> None:
    try:
        module = model.get_submodule(edit.module)
    except AttributeError:
        raise SpecError(f"thin: the architecture has no module {edit.module!r}") from None
    for name, shape in edit.shapes.items():
        _resize(model, module, edit, name, shape)
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


def _resize(model: nn.Module, module: nn.Module, edit: Thin, name: str, shape: tuple[int, ...]) -> None:
    parameter, buffer = module._parameters.get(name), module._buffers.get(name)
    present = parameter if parameter is not None else buffer
    if present is None:
        raise SpecError(f"thin: {edit.module or 'the model'} has no tensor {name!r}")
    if present.dim() != len(shape) or any(new > old for new, old in zip(shape, present.shape, strict=True)):
        raise SpecError(
            f"thin: {edit.module}.{name} of shape {list(present.shape)} cannot be cut to {list(shape)}: "
            "the same number of dimensions, none larger, is allowed"
        )
    if parameter is None:
        # Stored values replace this buffer later; a non-persistent one must already have the right values.
        if present.shape != shape:
            left = _cut_buffer(present, edit, name)
            module._buffers[name] = left[tuple(slice(0, size) for size in shape)].clone()
        return
    resized = nn.Parameter(
        torch.empty(shape, dtype=parameter.dtype, device=parameter.device),
        requires_grad=parameter.requires_grad,
    )
    for other in model.modules():
        for key, value in other._parameters.items():
            if value is parameter:
                # By setattr, because recurrent layers keep a list of their weights besides `_parameters`.
                setattr(other, key, resized)


def _cut_buffer(buffer: Tensor, edit: Thin, name: str) -> Tensor:
    for dim, indices in edit.kept.get(name, ()):
        shape = edit.shapes[name]
        fits = dim < buffer.dim() and 0 < len(indices) == shape[dim] and indices[-1] < buffer.shape[dim]
        if not fits or any(a >= b for a, b in pairwise(indices)):
            raise SpecError(f"thin: {edit.module}.{name} has no such indices left in dim {dim}")
        buffer = buffer.index_select(dim, torch.tensor(indices, device=buffer.device))
    return buffer


THIN = EditKind(record=Thin, apply=_apply_thin)
