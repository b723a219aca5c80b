"""Copies of networks, also of those with attributes that refuse to be copied."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from torch import nn

__all__ = ["copied"]


def copied(model: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy that shares the attributes of modules which cannot be copied (locks, open files).

    Args:
        model: any module.
        memo: what takes the place of objects in the copy, by `id`.
    """
    known = dict(memo or {})
    try:
        return deepcopy(model, dict(known))
    except Exception:  # attributes of the user's modules may refuse a copy in any way
        return deepcopy(model, known | _refusing(model, known))


def _refusing(model: nn.Module, memo: Mapping[int, object]) -> dict[int, object]:
    shared: dict[int, object] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                try:
                    deepcopy(value, dict(memo))
                except Exception:  # see above
                    shared[id(value)] = value
    return shared
