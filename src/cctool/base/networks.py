"""What every package asks of a network: its device, names, modes, copies, and what is attached to it.

Companions are modules and hooks that work in a network without being part of it, such as quantizers. They
carry a mark, so that code that must see the network alone (coupling channels, counting, fingerprints of
weights) can leave them out without knowing what they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cctool.base.errors import ArchitectureError, CctoolError

MARK = "is_companion"
"""Attribute that is true on a companion's module or hook."""


def device_of(model: nn.Module) -> torch.device:
    """Device of a network's first parameter; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def float_type_of(model: nn.Module) -> torch.dtype:
    """Type of a network's first floating-point parameter; float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def nonfinite(model: nn.Module) -> tuple[str, int] | None:
    """Name of the first tensor with NaN or infinite values, and their number; None if all are finite."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                return name, bad
    return None


def qualified(module: str, name: str) -> str:
    """Name in a network of a tensor or module within one of its modules, "" being the network itself.

    >>> qualified("layer1.0", "weight"), qualified("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return f"{module}.{name}" if module else name


def some(names: Sequence[str]) -> str:
    """Three of the names, and how many more there are.

    >>> some(["a", "b"]), some(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def several(count: int, noun: str) -> str:
    """A count and what is counted.

    >>> several(1, "layer"), several(2000, "layer")
    ('1 layer', '2,000 layers')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def put_everywhere(model: nn.Module, present: nn.Module, replacement: nn.Module) -> None:
    """Replace a module of a network under each of its names; the network itself stays."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is present:
                module._modules[key] = replacement


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode, and back to the mode it had."""
    was_training = model.training
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # By `train` first: modules that cache what they computed drop it there.
        model.train(was_training)
        for module, training in modes.items():
            module.training = training


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set a mode, without gradients; modes, buffers and the random state are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    random_state = torch.get_rng_state()
    # Some networks write to buffers or replace them in evaluation mode, too.
    buffers = [(buffer, buffer.clone(), _version(buffer)) for buffer in model.buffers()]
    tables = [
        (m._buffers, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)
    ]
    try:
        for module, _ in modes:
            module.training = training
        with torch.no_grad():
            yield
    finally:
        for table, earlier in tables:
            table.update(earlier)
        with torch.no_grad():
            for buffer, before, version in buffers:
                # Only what changed: a pending backward pass refuses a buffer that was written to, even with
                # the same values. In training all, for batch norm's kernels write without being counted.
                if training or _version(buffer) != version or version < 0:
                    buffer.copy_(before)
        for module, training in modes:
            module.training = training
        torch.set_rng_state(random_state)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to in place; -1 for tensors of inference mode, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def copied(model: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy that shares the attributes of modules which cannot be copied (locks, open files).

    Tensors that were computed from others with gradients, such as a buffer of a parameter's signs, are copied
    without what they were computed from.

    Args:
        model: any module.
        memo: by `id`, what replaces an object in the copy, as `copy.deepcopy` takes it.

    Raises:
        ArchitectureError: if a module or one of its tensors refuses to be copied.
    """
    known = dict(memo or {})
    try:
        return deepcopy(model, dict(known))
    except Exception:  # attributes of the user's modules may refuse a copy in any way
        known = _computed_tensors(model) | known
    try:
        return deepcopy(model, dict(known))
    except Exception:  # see above
        known |= _refusing(model, known)
    try:
        return deepcopy(model, known)
    except (CctoolError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # see above
        text = " ".join(str(error).split())[:200]
        raise ArchitectureError(f"the network cannot be copied: {type(error).__name__}: {text}") from error


def _computed_tensors(model: nn.Module) -> dict[int, object]:
    """Copies, by `id`, of the tensors in a network that torch refuses to copy deeply, wherever they lie."""
    found: dict[int, object] = {}
    seen: set[int] = set()
    left: list[object] = [model]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, (type, FunctionType, ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if not item.is_leaf:
                found[id(item)] = item.detach().clone()
        elif isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            left += item
        left += getattr(item, "__dict__", {}).values()
    return found


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


def _companions(model: nn.Module) -> dict[str, nn.Module]:
    children = model._modules.items()
    return {key: child for key, child in children if child is not None and getattr(child, MARK, False)}


def has_companions(model: nn.Module) -> bool:
    """Whether a network has companions that are modules."""
    return bool(_companions(model))


def drop_companions(model: nn.Module) -> None:
    """Remove a network's companions, in place."""
    for key in _companions(model):
        del model._modules[key]
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [n for n, hook in hooks.items() if getattr(hook, MARK, False)]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)


def companion_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of companions, such as the learned step sizes of quantizers."""
    return [parameter for child in _companions(model).values() for parameter in child.parameters()]


def companion_tensors(model: nn.Module) -> set[str]:
    """Names in the state dict of tensors that belong to companions."""
    return {f"{key}.{name}" for key, child in _companions(model).items() for name in child.state_dict()}
