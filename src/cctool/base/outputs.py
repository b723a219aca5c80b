"""What a network returned: its tensors in one order, by names that reports and exported files share.

A network may return a tensor, tuples, lists, dicts, named tuples or dataclasses, nested in any way. The names
are paths: ``out`` and ``aux`` of a dict, ``boxes.0`` of a list in a dict, ``0.boxes`` of a list of dicts. A
tensor alone, and tensors in nothing but plain tuples and lists, are ``output``, ``output1``, ``output2``, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OUTPUT = "output"
"""Name of a tensor that is alone or first in a tuple."""


def named_tensors(outputs: Any) -> dict[str, Tensor]:
    """The tensors in what a network returned, in order, by unique names.

    Names consist of letters, digits, ``_`` and dots. None and what is no tensor are left out; `other_values`
    says what that is.

    >>> list(named_tensors({"out": torch.zeros(1), "boxes": [torch.zeros(1), torch.zeros(2)]}))
    ['out', 'boxes.0', 'boxes.1']
    >>> list(named_tensors((torch.zeros(1), None, torch.zeros(2))))
    ['output', 'output1']
    """
    found = [(path, value) for path, value in _leaves(outputs, ()) if isinstance(value, Tensor)]
    if _is_plain(outputs):
        return {OUTPUT + (str(number) if number else ""): value for number, (_, value) in enumerate(found)}
    named: dict[str, Tensor] = {}
    for path, value in found:
        named[_unused(".".join(map(_identifier, path)), named)] = value
    return named


def other_values(outputs: Any) -> dict[str, str]:
    """What a network returned besides tensors and None: the type of each value, by its path.

    >>> other_values({"out": torch.zeros(1), "size": (32, "small")})
    {'size.0': 'int', 'size.1': 'str'}
    """
    return {
        ".".join(path) or OUTPUT: type(value).__name__
        for path, value in _leaves(outputs, ())
        if value is not None and not isinstance(value, Tensor)
    }


def is_measured(value: Tensor) -> bool:
    """Whether differences of a tensor's values mean something: not of indices, classes and truth values."""
    return value.is_floating_point() or value.is_complex()


def differences(left: Tensor, right: Tensor) -> Tensor:
    """Absolute differences of two tensors of one shape, float64.

    0 where both are NaN or the same infinity; infinite where only one of them is finite, or they are not the
    same.
    """
    a, b = as_numbers(left), as_numbers(right)
    apart = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return apart.masked_fill(same, 0).nan_to_num(nan=torch.inf, posinf=torch.inf)


def varying_shapes(runs: Sequence[Mapping[str, Tensor]]) -> set[str]:
    """Names of outputs that are missing, or have other shapes, in some runs on inputs of one shape."""
    names = {name for run in runs for name in run}
    return {name for name in names if len({run[name].shape if name in run else None for run in runs}) > 1}


def other_inputs(values: Tensor) -> list[Tensor]:
    """Inputs of one shape on which outputs whose shapes depend on the data hardly have equal ones."""
    return [values, -values, values * 0, values * 4]


def as_numbers(value: Tensor) -> Tensor:
    """A tensor as float64; complex numbers with a last dimension of real and imaginary part."""
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    parts = _parts(value)
    if parts is None:
        yield path, value
        return
    for key, part in parts:
        yield from _leaves(part, (*path, key))


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """Keys and values of a container; None for anything else."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, (tuple, list)):
        keys = getattr(value, "_fields", None) or range(len(value))
        return [(str(key), part) for key, part in zip(keys, value, strict=True)]
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is None or isinstance(value, type):
        return None
    return [(key, getattr(value, key)) for key in fields]


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor, or plain tuples and lists of tensors at any depth."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return all(_is_plain(part) for part in value)
    return _parts(value) is None


def _identifier(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", key) or "_"


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
