"""The `swap` edit: modules of an architecture that are replaced by our layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cctool.base.errors import SpecError
from cctool.base.networks import put_everywhere
from cctool.checkpoint.tables import EditKind
from cctool.transforms.basis.build import BASIS_SWAPS
from cctool.transforms.layers.base import Swap, SwapKind
from cctool.transforms.layers.build import build_coefficients, check_coefficients
from cctool.transforms.layers.coefficients import COEFFICIENT

SWAPS: Mapping[str, SwapKind] = {COEFFICIENT: SwapKind(build_coefficients, check_coefficients), **BASIS_SWAPS}
"""Kinds of swapped layer by name."""


def put_in_place(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a module everywhere in a network; a shared one under each of its names.

    Raises:
        SpecError: if there is no such module, or it is the network itself.
    """
    present = _module(model, name)
    if present is model:
        raise SpecError("swap: a network that is a single layer cannot be replaced by another one")
    put_everywhere(model, present, layer)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SpecError(f"swap: the architecture has no module {name!r}") from None


def _apply_swap(model: nn.Module, edit: Swap) -> None:
    kind = SWAPS.get(edit.layer)
    if kind is None:
        raise SpecError(
            f"swap: unknown layer {edit.layer!r}: this version knows {', '.join(sorted(SWAPS))}; "
            "a newer cctool may have written the file"
        )
    present = _module(model, edit.module)
    layer = kind.build(present, edit.arguments)
    layer.train(present.training)
    put_in_place(model, edit.module, layer)


def _check_swap(model: nn.Module, edit: Swap) -> None:
    check = SWAPS[edit.layer].check
    if check is not None:
        check(model.get_submodule(edit.module))


# After cuts, because layers are built for the thinned widths; before masks, which their parameters may have.
SWAP = EditKind(record=Swap, apply=_apply_swap, order=5, check=_check_swap)
