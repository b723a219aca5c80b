"""The baseline that pruning has to beat: the thinned network trained from scratch.

Liu et al. 2019, "Rethinking the Value of Network Pruning", arXiv 1810.05270, section 3.

Its weights must be drawn as the architecture would draw them at these widths. The architecture's code knows
only its dense widths, and often initialises weights in a loop after the modules' `reset_parameters`; so
neither cutting freshly drawn dense weights nor `reset_parameters` gives the right variances. Therefore that
code runs twice: once to learn the order in which tensors are registered, and once with each tensor cut to its
thinned shape when it is registered. An initialisation that follows sees the thinned fan-in and fan-out;
values that were drawn before are kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cctool.base.errors import PruningError
from cctool.base.networks import qualified
from cctool.checkpoint.budget import Register, registering_by
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.checkpoint.edits.thin import Thin
from cctool.checkpoint.spec import ModelSpec
from cctool.operations.context import Context
from cctool.operations.prune.rewind import with_values
from cctool.transforms.layers.base import Swap
from cctool.transforms.layers.coefficients import CoefficientLayer, rows_name
from cctool.transforms.plain import plain_model
from cctool.transforms.swap import put_in_place

OnRegister = Callable[[nn.Module, str, Tensor], Tensor]
"""(module, name, tensor to register) -> tensor that is registered."""


def reinitialised(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """Draw a thinned network's parameters anew in place, as its architecture would at these widths.

    Batch-norm statistics are reset and masked weights stay zero; other buffers do not change. Stored forms of
    tensors that change are dropped.

    Raises:
        PruningError: the architecture's code cannot build the network at these widths.
    """
    spec, model = checkpoint.spec, checkpoint.model
    widths = plain_model(model).state_dict(keep_vars=True)
    thinned = [Thin.model_validate(edit) for edit in spec.edits if edit.get("kind") == "thin"]
    try:
        # Building must not change the random numbers of what follows.
        with torch.random.fork_rng(devices=[]):
            fresh = _built_thin(
                lambda: context.tables.build(spec.architecture, spec.arguments),
                {name: tuple(tensor.shape) for name, tensor in widths.items()},
                {edit.module: edit.attributes for edit in thinned},
                context.runtime.seed,
            )
            _swap_again(fresh, checkpoint, context)
    # At an unexpected width, the user's code or a library's may raise anything.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise PruningError(
            f"--from-scratch: {spec.architecture} does not build at the thinned widths ({text})"
        ) from error
    return with_values(checkpoint, _drawn(model, fresh, spec))


def _swap_again(fresh: nn.Module, checkpoint: Checkpoint, context: Context) -> None:
    """Put swapped layers into a freshly drawn network; coefficients are fitted to its weights."""
    for edit in checkpoint.spec.edits:
        if edit.get("kind") != "swap":
            continue
        swap = Swap.model_validate(edit)
        present = checkpoint.model.get_submodule(swap.module)
        if isinstance(present, CoefficientLayer):
            put_in_place(fresh, swap.module, _drawn_anew(present, fresh.get_submodule(swap.module)))
        else:
            context.tables.edits["swap"].apply(fresh, swap)


def _drawn_anew(present: CoefficientLayer, drawn: nn.Module) -> CoefficientLayer:
    """A layer with the bases and axes of the present one, whose coefficients give the drawn weight."""
    layer, weight = deepcopy(present).to("cpu"), drawn.get_parameter("weight").detach()
    for axis in present.arguments.axes:
        rows = layer._buffers.get(rows_name(axis))
        if rows is not None:
            # The axis was cut after its transform: rows that are gone count as zeros.
            shape = [axis.size if dim == axis.dim else size for dim, size in enumerate(weight.shape)]
            weight = weight.new_zeros(shape).index_copy_(axis.dim, rows.long(), weight)
    layer.set_weight(weight)
    layer._parameters["bias"] = drawn._parameters["bias"]
    return layer


def _drawn(model: nn.Module, fresh: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Fresh values by name: of parameters, and of batch-norm statistics."""
    state = fresh.state_dict()
    wanted: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    norms = ((path, norm) for path, norm in model.named_modules() if isinstance(norm, _NormBase))
    wanted |= {
        qualified(path, name): value
        for path, norm in norms
        for name, value in norm.named_buffers(recurse=False)
        # Other buffers of a norm, such as masks, are kept.
        if name in ("running_mean", "running_var", "num_batches_tracked")
    }
    for name, value in wanted.items():
        if name not in state or state[name].shape != value.shape:
            there = "has no such tensor" if name not in state else f"gives it {list(state[name].shape)}"
            raise PruningError(
                f"--from-scratch: {name} has shape {list(value.shape)} after the cut, and "
                f"{spec.architecture} {there}: it sets its weights in a way that does not follow widths"
            )
    return {name: state[name] for name in wanted}


def _built_thin(
    build: Callable[[], nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> nn.Module:
    """Build at the thinned widths: with these shapes of tensors and these attributes of modules."""
    met: list[tuple[nn.Module, str]] = []

    def learn(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        met.append((module, name))
        return tensor

    with registering_by(_watched(learn)):
        dense = build()
    paths = {id(module): path for path, module in dense.named_modules(remove_duplicate=False)}
    # Modules that were built but are not part of the network have no path.
    order = [(paths.get(id(module)), name) for module, name in met]
    place = iter(order)

    def cut(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        path, expected = next(place, (None, ""))
        if expected != name:
            raise PruningError(f"it is built in another order each time: {name} in place of {expected}")
        if path is None:
            return tensor
        for attribute, value in attributes.get(path, {}).items():
            if attribute in vars(module):
                setattr(module, attribute, value)
        return _cut(tensor, shapes.get(qualified(path, name)))

    # Not the generators of devices, which the caller does not put back.
    torch.default_generator.manual_seed(seed)
    with registering_by(_watched(cut)):
        return build()


def _cut(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is None or tuple(tensor.shape) == shape or tensor.dim() != len(shape):
        return tensor
    smaller = tensor.detach()[tuple(slice(0, size) for size in shape)].clone()
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def _watched(watch: OnRegister) -> Callable[[Register, Register], tuple[Register, Register]]:
    """Register what `watch` returns for each tensor that this thread registers; it is asked once if tied."""

    def make(register_parameter: Register, register_buffer: Register) -> tuple[Register, Register]:
        builder = threading.get_ident()
        tied: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

        def given(module: nn.Module, name: str, tensor: Any) -> Any:
            # Other threads may build networks at the same time.
            if threading.get_ident() != builder or not isinstance(tensor, Tensor):
                return tensor
            made = watch(module, name, tensor)
            # An id may belong to a new tensor once the old one is freed; the weak reference tells.
            first, kept = tied.get(id(tensor), (None, made))
            if first is None or first() is not tensor:
                kept = made
                tied[id(tensor)] = weakref.ref(tensor), made
            return kept

        def parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register_parameter(self, name, given(self, name, param))

        def buffer(self: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
            register_buffer(self, name, given(self, name, tensor), persistent)

        return parameter, buffer

    return make
