"""All architectures by reference: our own, ``torchvision:NAME``, ``timm:NAME`` and the user's own code.

A reference and its JSON arguments are all that a checkpoint holds of an architecture, and both may come from
an untrusted file: arguments are checked against what each builder takes, and user code runs only if the
command line names it.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from cctool.base import user_code as user
from cctool.base.errors import ArchitectureError, CctoolError, UserCodeError
from cctool.models.architectures import ARCHITECTURES, COLLECTIONS, Architecture, Collected, Shape


@dataclass(frozen=True)
class ArchitectureRecord:
    """A line in the list of architectures; the figures are those at the default arguments."""

    name: str
    summary: str
    parameters: int | None = None
    input_shape: Shape | None = None
    arguments: tuple[str, ...] = ()


def build(
    reference: str, arguments: Mapping[str, Any], *, user_code: Collection[str] = frozenset()
) -> nn.Module:
    """Build the module that ``reference`` and ``arguments`` describe, with random weights.

    Args:
        reference: ``resnet20``, ``torchvision:resnet18``, ``timm:resnet18``, ``net.py:factory`` or
            ``package.module:factory``.
        arguments: JSON values by the builder's argument names.
        user_code: references that the command line names, the only ones whose code may run.

    Raises:
        ArchitectureError: the reference is unknown or not named, or an argument is unknown or out of range.
        UserCodeError: the user's function failed or returned something other than an ``nn.Module``.
    """
    if reference in ARCHITECTURES:
        builder = ARCHITECTURES[reference].build
        _check_own_arguments(reference, builder, arguments)
        return _build(reference, arguments, lambda: builder(**arguments))
    collection, name = _collected(reference)
    if collection is not None:
        return _build(reference, arguments, partial(collection.build, name, arguments))
    factory = _user_factory(reference, user_code)
    model = user.call(reference, factory, **arguments)
    if not isinstance(model, nn.Module):
        raise UserCodeError(f"{reference} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def defaults(
    reference: str,
    *,
    channels: int | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    user_code: Collection[str] = frozenset(),
) -> dict[str, Any]:
    """Add the channels and classes of a data set to ``arguments``, which take precedence.

    torchvision's networks always take three channels. A user's factory gets ``num_classes``, ``in_channels``
    and ``in_chans`` if it has parameters of these names.

    Raises:
        ArchitectureError: the reference is unknown, or user code that was not named.
    """
    implied: dict[str, int]
    if reference in ARCHITECTURES:
        implied = _given({"in_channels": channels, "num_classes": classes})
    else:
        collection, _ = _collected(reference)
        if collection is not None:
            implied = collection.default_arguments(channels, classes)
        else:
            accepted = _parameters(_user_factory(reference, user_code))
            offered = _given({"num_classes": classes, "in_channels": channels, "in_chans": channels})
            implied = {key: value for key, value in offered.items() if key in accepted}
    return {**implied, **(arguments or {})}


def input_shape(reference: str, arguments: Mapping[str, Any], data_shape: Shape | None = None) -> Shape:
    """The input size (C, H, W) of an architecture, given its arguments and perhaps the data's size.

    Our own networks (unless the data are too small, or the network takes only one size) and the user's take
    the data's H and W; torchvision's and timm's networks keep the size that they were made for. Channels in
    the arguments take precedence.

    Raises:
        ArchitectureError: the reference is unknown, or is user code without data to give its size.
    """
    if reference in ARCHITECTURES:
        return _own_input_shape(ARCHITECTURES[reference], arguments, data_shape)
    collection, name = _collected(reference)
    if collection is not None:
        return collection.input_shape(name, arguments)
    if not user.looks_like_user_code(reference):
        raise _unknown(reference)
    if data_shape is None:
        raise ArchitectureError(f"{reference}: its input size is not known; give --input CxHxW, or --data")
    channels = arguments.get("in_channels", arguments.get("in_chans", data_shape[0]))
    return int(channels), data_shape[1], data_shape[2]


def is_user_code(reference: str) -> bool:
    """Whether a reference names a user's function, not a network of ours or of a library."""
    return user.looks_like_user_code(reference) and reference.partition(":")[0] not in COLLECTIONS


def task_of(reference: str) -> str | None:
    """Name of the task that an architecture is for; None if it is for any."""
    return None


def listing(family: str | None = None) -> list[ArchitectureRecord]:
    """Our own networks and a line for each library, or all of the library ``family`` (torchvision or timm).

    Raises:
        ArchitectureError: there is no such family, or its library is missing.
    """
    if family is not None:
        if family not in COLLECTIONS:
            raise ArchitectureError(f"no family {family!r}; there are: {', '.join(COLLECTIONS)}")
        library = COLLECTIONS[family]
        return [ArchitectureRecord(f"{family}:{name}", library.summary) for name in library.names()]
    return [_record(architecture) for architecture in ARCHITECTURES.values()] + [
        ArchitectureRecord(f"{prefix}:NAME", _collection_summary(collection))
        for prefix, collection in COLLECTIONS.items()
    ]


def _own_input_shape(own: Architecture, arguments: Mapping[str, Any], data_shape: Shape | None) -> Shape:
    channels, height, width = own.input_shape
    if data_shape is not None:
        channels = data_shape[0]
        if not own.fixed_size and min(data_shape[1:]) >= own.minimum_size:
            height, width = data_shape[1:]
    return int(arguments.get("in_channels", channels)), height, width


def _collected(reference: str) -> tuple[Collected | None, str]:
    """The library and NAME of a reference ``PREFIX:NAME``, or (None, ""); an unknown NAME is refused."""
    prefix, colon, name = reference.partition(":")
    if not colon or prefix not in COLLECTIONS:
        return None, ""
    collection = COLLECTIONS[prefix]
    # A timm name may carry a tag, as in resnet18.a1_in1k, which timm itself checks.
    bare = name.partition(".")[0] if prefix == "timm" else name
    if bare not in collection.names():
        raise ArchitectureError(
            f"{prefix} has no network {name!r}{_near(name, collection.names())}; "
            f"`cctool models {prefix}` lists them"
        )
    return collection, name


def _user_factory(reference: str, named: Collection[str]) -> Callable[..., Any]:
    if not user.looks_like_user_code(reference):
        raise _unknown(reference)
    if not user.is_named(reference, named):
        raise ArchitectureError(
            f"{reference} is user code, which runs only when it is named: name it with --arch {reference}"
        )
    return user.load(reference)


def _unknown(reference: str) -> ArchitectureError:
    near = _near(
        reference, [*ARCHITECTURES, *(f"torchvision:{name}" for name in COLLECTIONS["torchvision"].names())]
    )
    return ArchitectureError(
        f"unknown architecture {reference!r}{near}; allowed: {', '.join(ARCHITECTURES)}, "
        "torchvision:NAME, timm:NAME, path/to/net.py:function"
    )


def _near(name: str, candidates: Sequence[str]) -> str:
    found = difflib.get_close_matches(name.lower(), candidates, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(found)}?)" if found else ""


def _build(reference: str, arguments: Mapping[str, Any], builder: Callable[[], nn.Module]) -> nn.Module:
    try:
        return builder()
    # These keep their meaning: a loader raises SpecError to stop a network too large for its file.
    except (CctoolError, MemoryError):
        raise
    # The arguments may come from any file, and each library has its own exceptions for bad ones.
    except Exception as error:
        text = " ".join(str(error).split())
        raise ArchitectureError(
            f"{reference} cannot be built with {dict(arguments)}: {type(error).__name__}: {text}"
        ) from error


def _check_own_arguments(reference: str, builder: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    parameters = _parameters(builder)
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        near = _near(unknown[0], list(parameters))
        raise ArchitectureError(
            f"{reference} does not take {', '.join(unknown)}{near}; allowed: {', '.join(parameters)}"
        )
    for name, value in arguments.items():
        _check_value(reference, name, value, parameters[name].annotation)


def _check_value(reference: str, name: str, value: Any, kind: type) -> None:
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArchitectureError(f"{reference}: {name}={value!r} must be a whole number of at least 1")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArchitectureError(f"{reference}: {name}={value!r} must be a number")
    if name == "width" and not 0 < value <= 1:
        raise ArchitectureError(f"{reference}: width={value!r} must lie in (0, 1]")
    if name == "dropout" and not 0 <= value < 1:
        raise ArchitectureError(f"{reference}: dropout={value!r} must lie in [0, 1)")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _given(arguments: Mapping[str, int | None]) -> dict[str, int]:
    return {key: value for key, value in arguments.items() if value is not None}


def _record(architecture: Architecture) -> ArchitectureRecord:
    # On the meta device: counting parameters needs no memory and no initialisation.
    with torch.device("meta"):
        module = architecture.build()
    return ArchitectureRecord(
        architecture.name,
        architecture.summary,
        sum(parameter.numel() for parameter in module.parameters()),
        architecture.input_shape,
        tuple(_parameters(architecture.build)),
    )


def _collection_summary(collection: Collected) -> str:
    try:
        return f"{collection.summary}: {len(collection.names())} names"
    except ArchitectureError:
        return f"{collection.summary}: not installed"
