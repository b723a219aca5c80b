"""Which tensors of a network are quantized for storage, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from cctool.base.errors import UsageError
from cctool.checkpoint.file.payload import place

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class SelectedTensor:
    """A tensor to quantize.

    Attributes:
        names: its names in the state dict; several if it is tied.
        tensor: its values.
        channels: the dimension of its output channels; None for a 1-D tensor.
    """

    names: tuple[str, ...]
    tensor: Tensor
    channels: int | None


@dataclass(frozen=True)
class Skipped:
    """A tensor that is not quantized, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def select(
    model: nn.Module, *, include_1d: bool = False, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[SelectedTensor], list[Skipped]]:
    """Select tensors of the state dict: by default, floating-point parameters of two or more dimensions.

    Args:
        model: any network.
        include_1d: also take 1-D tensors, parameters and running statistics.
        include: glob patterns; if given, only matches are taken, and exact names are taken even if they are
            1-D or buffers.
        exclude: glob patterns of what is not taken; they have priority.

    Returns:
        What to quantize and what not, in the order of the state dict.

    Raises:
        UsageError: if a pattern matches nothing.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in state):
                example = next(iter(state), "nothing")
                raise UsageError(f"{option} {pattern}: no tensor has such a name; {example} is one")
    # Tied tensors share memory and are stored once. Empty ones have no memory to compare.
    names_of: dict[object, list[str]] = {}
    for name, tensor in state.items():
        names_of.setdefault(place(tensor) if tensor.numel() else name, []).append(name)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    selected, skipped = [], []
    for names in names_of.values():
        tensor = state[names[0]]
        reason = _reason(names, tensor, include, exclude)
        if not reason and not any(name in include for name in names):
            if tensor.dim() == 1 and not include_1d:
                reason = "1-D; --include-1d takes it"
            elif tensor.dim() > 1 and names[0] not in parameters:
                reason = "a buffer, not a weight; --include with its name takes it"
        if reason:
            skipped += [Skipped(name, tuple(tensor.shape), reason) for name in names]
        else:
            selected.append(SelectedTensor(tuple(names), tensor, _channels(model, names[0], tensor)))
    return selected, skipped


def _reason(names: Sequence[str], tensor: Tensor, include: Sequence[str], exclude: Sequence[str]) -> str:
    if not tensor.is_floating_point():
        return "not floating point"
    if not tensor.dim():
        return "a single number"
    if not tensor.numel():
        return "empty"
    for pattern in exclude:
        if any(fnmatchcase(name, pattern) for name in names):
            return f"--exclude {pattern}"
    if include and not any(fnmatchcase(name, pattern) for name in names for pattern in include):
        return "no --include matches it"
    return ""


def _channels(model: nn.Module, name: str, tensor: Tensor) -> int | None:
    if tensor.dim() < 2:
        return None
    owner, _, leaf = name.rpartition(".")
    # Transposed convolutions keep weights as (in, out / groups, ...).
    return 1 if leaf == "weight" and isinstance(model.get_submodule(owner), _TRANSPOSED) else 0
