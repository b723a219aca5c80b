"""From spec and tensors to a module: bounded building, edits, strict assignment.

Parameters are built on the meta device. Buffers and scalar arithmetic stay on the CPU, because RegNets
compute with them and no file holds non-persistent buffers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cctool.base.errors import SpecError
from cctool.base.networks import qualified, some
from cctool.checkpoint.budget import TOO_LARGE, BoundedFactories, Budget, registering
from cctool.checkpoint.encoding import EncodedTensor
from cctool.checkpoint.file.payload import as_bytes, place
from cctool.checkpoint.spec import Edit, ModelSpec
from cctool.checkpoint.tables import EditKind, Tables


def build_fresh(spec: ModelSpec, tables: Tables) -> nn.Module:
    """Build and initialise the module of ``spec`` for training from scratch, edits applied.

    Raises:
        SpecError: if it has lazy layers, against whose sizes no file could be checked.
    """
    model = _apply_edits(tables.build(spec.architecture, spec.arguments), spec, tables)
    lazy = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)]
    if lazy:
        raise SpecError(
            f"{spec.architecture} has lazy layers ({some(lazy)}), and a checkpoint needs sizes that are "
            "written down: give the layers theirs"
        )
    return model


def instantiate(spec: ModelSpec, tables: Tables, tensors: Mapping[str, Tensor | EncodedTensor]) -> nn.Module:
    """Build the module of ``spec``, if the architecture allows it without allocating its parameters.

    What the file's ``tensors`` could fill bounds what may be built.

    Raises:
        SpecError: if the spec builds more than the file can fill, or an edit does not fit.
    """
    budget = Budget(spec, tensors)
    for meta in (True, False):
        budget.restart()
        try:
            with torch.random.fork_rng(devices=[]), BoundedFactories(budget), registering(budget, meta=meta):
                model = _apply_edits(tables.build(spec.architecture, spec.arguments), spec, tables)
        except Exception:
            if budget.exceeded:
                raise SpecError(TOO_LARGE) from None
            # Architectures that compute with parameter values in their constructors need real ones; any other
            # error is raised again by the second round.
            if not meta:
                raise
        else:
            if not _kept_meta(model):
                return model
    raise SpecError(f"{spec.architecture} holds buffers on the meta device, which no file can fill")


def _kept_meta(model: nn.Module) -> bool:
    """Whether a buffer or a plain attribute, which no file fills, was computed from meta parameters."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    plain = (value for value in attributes if isinstance(value, Tensor))
    return any(tensor.is_meta for tensor in (*model.buffers(), *plain))


def _apply_edits(model: nn.Module, spec: ModelSpec, tables: Tables) -> nn.Module:
    for kind, edit in _edits(spec, tables):
        kind.apply(model, edit)
    return model


def check_edits(model: nn.Module, spec: ModelSpec, tables: Tables) -> None:
    """Check the values that `assemble` gave a module against its edits.

    Raises:
        CorruptCheckpointError: if they contradict each other.
    """
    for kind, edit in _edits(spec, tables):
        if kind.check is not None:
            kind.check(model, edit)


def _edits(spec: ModelSpec, tables: Tables) -> list[tuple[EditKind, Edit]]:
    """Validated edits in the order in which they are applied."""
    found = []
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
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise SpecError(f"edit {data.get('kind')!r} is malformed: {where}: {problem['msg']}") from None
        found.append((kind, edit))
    return sorted(found, key=lambda pair: pair[0].order)


def assemble(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Assign a whole decoded state dict to ``model``, without a second copy; tied parameters stay tied.

    Returns:
        The same module, in eval mode.

    Raises:
        SpecError: naming the missing, unexpected and differently shaped tensors.
    """
    refuse_misfit(model, {name: tuple(value.shape) for name, value in tensors.items()})
    tensors = _typed(model, tensors)
    _refuse_untied(model, tensors)
    assigned: dict[int, nn.Parameter] = {}
    originals = list(model.parameters())  # alive until the end: ids are compared
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            value = tensors[qualified(prefix, name)]
            if id(parameter) not in assigned:
                trains = parameter.requires_grad and value.is_floating_point()
                assigned[id(parameter)] = nn.Parameter(value, requires_grad=trains)
                assigned[id(assigned[id(parameter)])] = assigned[id(parameter)]  # for modules met twice
            # By setattr, because recurrent layers keep a list of their weights besides `_parameters`.
            setattr(module, name, assigned[id(parameter)])
        for name, buffer in list(module._buffers.items()):
            key = qualified(prefix, name)
            if buffer is not None and key in tensors:
                module._buffers[name] = tensors[key]
    originals.clear()
    for prefix, module in model.named_modules():
        if (key := qualified(prefix, "_extra_state")) in tensors:
            module.set_extra_state(tensors[key])
    return model.eval()


def refuse_misfit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SpecError unless ``shapes`` are the names and shapes of the model's state dict."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in shapes and isinstance(value, Tensor) and tuple(shapes[name]) != tuple(value.shape)
    ]
    if missing or unexpected or misshapen:
        parts = [
            f"{label} {some(names)}"
            for label, names in (("lacks", missing), ("has unexpected", unexpected), ("has", misshapen))
            if names
        ]
        raise SpecError(f"the tensors do not fit the architecture: the file {'; '.join(parts)}")


def _typed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of another kind of number than the model's, such as counters saved as floats."""
    expected = model.state_dict()
    typed = {}
    for name, value in tensors.items():
        wanted = expected[name]
        same_kind = value.is_floating_point() and wanted.is_floating_point()
        if not isinstance(wanted, Tensor) or value.dtype == wanted.dtype or same_kind:
            typed[name] = value
            continue
        typed[name] = value.to(wanted.dtype)
        if not torch.equal(typed[name].to(value.dtype), value):
            raise SpecError(f"{name} is {value.dtype} in the file, {wanted.dtype} in the architecture")
    return typed


def _refuse_untied(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file that gives two values to one tied parameter."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        a, b = tensors[name], tensors[other]
        # By bytes, for a NaN is not equal to itself.
        if other != name and place(a) != place(b) and as_bytes(a) != as_bytes(b):
            raise SpecError(
                f"{name} and {other} are one parameter in the architecture but differ in the file"
            )
