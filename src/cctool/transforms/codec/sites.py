"""Which modules are tapped: residual blocks, or those that match patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cctool.base.errors import TransformError, UsageError
from cctool.base.networks import qualified, removing
from cctool.graph.execution import Event, execute
from cctool.options.transform.options import BLOCKS

_CONVOLUTIONS_OF_A_BLOCK = 2


@dataclass(frozen=True)
class Site:
    """A module to tap: its ``name``, and the ``shape`` (C, H, W) of its output for one image."""

    name: str
    shape: tuple[int, int, int]


def find_sites(model: nn.Module, inputs: Sequence[Tensor], taps: Sequence[str]) -> list[Site]:
    """Find the modules to tap.

    Args:
        model: any network; it is run once.
        inputs: of its forward.
        taps: `BLOCKS`, names or glob patterns of modules.

    Returns:
        In the order of their first pass.

    Raises:
        UsageError: if one matches nothing, or the network has no blocks.
        TransformError: if a module does not return (N, C, H, W) maps, or is never called.
    """
    outputs: dict[str, list[Any]] = {}
    additions: set[str] = set()

    def watch(event: Event) -> None:
        if event.name == "add" and len(event.args) > 1 and _is_residual(*event.args[:2]):
            additions.add(event.module)

    names = {id(module): name for name, module in model.named_modules()}
    handles = [
        module.register_forward_hook(
            lambda module, args, output: outputs.setdefault(names[id(module)], []).append(output)
        )
        for module in model.modules()
        # Scripted modules take no hooks.
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    with removing(handles):
        execute(model, inputs, [watch])
    wanted = _wanted(model, taps, additions)
    for name in sorted(wanted):
        _refuse_unmapped(name, outputs.get(name))
    # Hooks run when a module returns; so do codecs, which gives their order.
    return [Site(name, tuple(found[0].shape[1:])) for name, found in outputs.items() if name in wanted]


def residual_blocks(model: nn.Module, additions: set[str]) -> list[str]:
    """Names of a network's blocks.

    A residual block is a module in whose own code two maps of the same shape are added (``additions``). All
    modules of its class are blocks, including those that change the width. In a network without additions,
    blocks are the parts of an `nn.Sequential` that hold two convolutions or more.
    """
    modules = dict(model.named_modules())
    classes = {type(modules[name]) for name in additions if name in modules and name}
    # torch's containers have no code that could add maps, so their classes are not among these.
    found = [name for name, module in modules.items() if name and type(module) in classes]
    if found:
        return found
    return [
        name
        for parent, module in modules.items()
        if isinstance(module, nn.Sequential)
        for name, part in ((qualified(parent, key), part) for key, part in module.named_children())
        if sum(isinstance(layer, nn.Conv2d) for layer in part.modules()) >= _CONVOLUTIONS_OF_A_BLOCK
        and not any(other is not part and _is_stage(other) for other in part.modules())
    ]


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is itself a sequence of blocks."""
    if not isinstance(module, nn.Sequential):
        return False
    parts = [sum(isinstance(layer, nn.Conv2d) for layer in part.modules()) for part in module.children()]
    return sum(count >= _CONVOLUTIONS_OF_A_BLOCK for count in parts) > 1


def _is_residual(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == 4 and a.shape == b.shape


def _wanted(model: nn.Module, taps: Sequence[str], additions: set[str]) -> set[str]:
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names, wanted = list(modules), set[str]()
    for pattern in taps:
        if pattern == BLOCKS and BLOCKS not in names:
            found = residual_blocks(model, additions)
            if not found:
                raise UsageError(
                    f"--taps {BLOCKS}: the network has no residual blocks; name modules, as in "
                    f"--taps {next(iter(names), 'layer1')}"
                )
        else:
            # Lists of modules are never called; a pattern means what is in them.
            lists = (nn.ModuleList, nn.ModuleDict)
            matches = [name for name in names if fnmatchcase(name, pattern)]
            found = [n for n in matches if n == pattern or not isinstance(modules[n], lists)]
            if not found:
                example = next(iter(names), "nothing")
                raise UsageError(f"--taps {pattern}: no module has such a name; {example} is one")
        wanted.update(found)
    # A shared module has one codec, under its first name.
    first = {id(module): name for name, module in model.named_modules()}
    return {first[id(modules[name])] for name in wanted}


def _refuse_unmapped(name: str, outputs: list[Any] | None) -> None:
    if outputs is None:
        raise TransformError(f"--taps: {name} is not passed when the network runs")
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() != 4 or not output.is_floating_point():
            what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TransformError(f"--taps: {name} returns {what}; maps (N, C, H, W) can be coded")
