"""From spec and tensors to a module: bounded building, edits, strict assignment.

Parameters are moved to the meta device at the moment a module registers them, so initialising costs
nothing and no second copy exists; buffers and scalar arithmetic stay on the CPU, because RegNets compute
with them and non-persistent buffers are in no file.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cctool.checkpoint.spec import ModelSpec
from cctool.checkpoint.tables import Tables
from cctool.errors import SpecError

__all__ = ["assemble", "build_fresh", "instantiate"]

_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}
_CUT_ALLOWANCE = 4096
_SMALLEST_LIMIT = 2**24


class _Budget:
    """How many elements building may ask for, and whether it asked for more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.exceeded = False

    def check(self, elements: int) -> None:
        if elements > self.limit:
            # The architecture's own error handling may replace this exception; the flag stays.
            self.exceeded = True
            raise SpecError(f"the spec asks for more than the {self.limit:,} elements that the file can back")

    def spend(self, elements: int) -> None:
        self.total += elements
        self.check(self.total)


class _BoundedFactories(TorchFunctionMode):
    """Refuses to allocate one tensor larger than the budget."""

    def __init__(self, budget: _Budget) -> None:
        super().__init__()
        self.budget = budget

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            sizes = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            self.budget.check(math.prod(size for size in sizes if isinstance(size, int)))
        return func(*args, **kwargs)


@contextmanager
def _registering(budget: _Budget, *, meta: bool) -> Iterator[None]:
    """Count parameters as they are registered, and put them on the meta device if ``meta``."""
    original = nn.Module.register_parameter
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is None or param.is_meta:
            original(self, name, param)
            return
        source, kept = moved.get(id(param), (None, param))
        if source is None or source() is not param:
            budget.spend(param.numel())
            kept = param
            if meta:
                kept = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
            moved[id(param)] = (weakref.ref(param), kept)
        # A parameter registered twice is a tie: both modules get the same object.
        original(self, name, kept)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_fresh(spec: ModelSpec, tables: Tables) -> nn.Module:
    """Build and initialise the module of ``spec`` for training from scratch, edits applied."""
    return _apply_edits(tables.build(spec.architecture, spec.arguments), spec, tables)


def instantiate(spec: ModelSpec, tables: Tables, stored_elements: int) -> nn.Module:
    """Build the module of ``spec`` without allocating its parameters, where the architecture allows it.

    Args:
        spec: validated spec.
        tables: registries.
        stored_elements: how many elements the file holds; bounds what may be built.

    Raises:
        SpecError: if the spec builds more than the file can back, or an edit does not fit.
    """
    # A thinned network is built at its full width before it is cut.
    limit = max(_SMALLEST_LIMIT, stored_elements * (_CUT_ALLOWANCE if spec.edits else 2))
    for meta in (True, False):
        budget = _Budget(limit)
        try:
            with (
                torch.random.fork_rng(devices=[]),
                _BoundedFactories(budget),
                _registering(budget, meta=meta),
            ):
                model = _apply_edits(tables.build(spec.architecture, spec.arguments), spec, tables)
        except Exception:
            # Architectures that compute with parameter values while they are built need real ones; what is
            # truly wrong is raised by the second round.
            if budget.exceeded or not meta:
                raise
        else:
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
    raise SpecError(f"{spec.architecture} registers buffers on the meta device, which no file can fill")


def _apply_edits(model: nn.Module, spec: ModelSpec, tables: Tables) -> nn.Module:
    for data in spec.edits:
        kind = tables.edits.get(str(data.get("kind")))
        if kind is None:
            raise SpecError(
                f"unknown edit {data.get('kind')!r}: this version knows {', '.join(sorted(tables.edits))}; "
                "a newer cctool may have written the file"
            )
        try:
            edit = kind.record.model_validate(data)
        except ValidationError as error:
            raise SpecError(f"edit {data.get('kind')!r} is malformed: {_first(error)}") from None
        kind.apply(model, edit)
    return model


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def assemble(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Assign ``tensors`` to ``model`` strictly, without a second copy, keeping ties.

    Args:
        model: a built module, parameters on any device.
        tensors: its whole state dict, decoded.

    Returns:
        The same module, in eval mode.

    Raises:
        SpecError: naming the missing, unexpected and differently shaped tensors.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and isinstance(value, Tensor) and tensors[name].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        parts = [
            f"{label} {_some(names)}"
            for label, names in (("lacks", missing), ("has unexpected", unexpected), ("has", misshapen))
            if names
        ]
        raise SpecError(f"the tensors do not fit the architecture: the file {'; '.join(parts)}")
    _refuse_untied(model, tensors)
    assigned: dict[int, nn.Parameter] = {}
    originals = list(model.parameters())  # alive until the end: ids are compared
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            value = tensors[f"{prefix}.{name}" if prefix else name]
            if id(parameter) not in assigned:
                trains = parameter.requires_grad and value.is_floating_point()
                assigned[id(parameter)] = nn.Parameter(value, requires_grad=trains)
                assigned[id(assigned[id(parameter)])] = assigned[id(parameter)]  # for modules met twice
            module._parameters[name] = assigned[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            key = f"{prefix}.{name}" if prefix else name
            if buffer is not None and key in tensors:
                module._buffers[name] = tensors[key]
    originals.clear()
    _assign_extra_state(model, tensors)
    return model.eval()


def _assign_extra_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for prefix, module in model.named_modules():
        key = f"{prefix}._extra_state" if prefix else "_extra_state"
        if key in tensors:
            module.set_extra_state(tensors[key])


def _refuse_untied(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file that gives two values to one tied parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        a, b = tensors[name], tensors[other]
        if other != name and a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
            raise SpecError(
                f"{name} and {other} are one parameter in the architecture but differ in the file"
            )


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
