"""Inserting basis layers, and finding by a trial run which other modules meet complex numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cctool.base.errors import TransformError
from cctool.base.networks import copied, device_of, in_mode, removing
from cctool.graph.execution import canonical_name, tensors_in
from cctool.transforms.basis.build import COMPLEX, basis_layer, counterpart
from cctool.transforms.basis.complex import ComplexBatchNorm, ComplexLayer, ComplexModule
from cctool.transforms.basis.linear import BasisArguments, BasisLayer
from cctool.transforms.layers.base import Swap
from cctool.transforms.layers.which import SelectedLayer
from cctool.transforms.swap import put_in_place

BASIS_KERNELS = ("dct", "dst", "dft")
"""Kernels of basis layers."""


def put_basis(
    model: nn.Module,
    selected: Sequence[SelectedLayer],
    kernel: str,
    input_shape: tuple[int, int, int],
    *,
    normalize_gradients: bool = False,
) -> tuple[Swap, ...]:
    """Replace layers by new basis functions, and modules that get complex inputs by their counterparts.

    Args:
        model: changed in place.
        selected: the layers to replace.
        kernel: family of the functions.
        input_shape: (C, H, W) of one input, for the trial run.
        normalize_gradients: see `BasisArguments`.

    Returns:
        The edits of the counterparts; `with_swaps` makes those of the layers.

    Raises:
        TransformError: naming the part of the network that cannot compute with complex numbers.
    """
    layers: dict[str, BasisLayer] = {}
    for item in selected:
        outputs, inputs = item.plain.weight.shape[:2]
        groups = item.plain.groups if isinstance(item.plain, nn.Conv2d) else 1
        found = {"kernel": kernel, "outputs": outputs // groups, "inputs": inputs}
        arguments = BasisArguments.model_validate(found | {"normalize_gradients": normalize_gradients})
        layers[item.names[0]] = basis_layer(item.plain, arguments)
    swaps: dict[str, Swap] = {}
    if kernel == "dft":
        trial = _CounterpartRun(model, layers, input_shape)
        swaps = trial.swaps()
        for name in trial.ending & layers.keys():
            layers[name].arguments = layers[name].arguments.model_copy(update={"ends": True})
    for name, layer in layers.items():
        layer.train(model.get_submodule(name).training)
        put_in_place(model, name, layer)
    for name, swap in swaps.items():
        module = model.get_submodule(name)
        made = counterpart(module, ends=bool(swap.arguments.get("ends")))
        assert made is not None
        put_in_place(model, name, made.train(module.training))
    return tuple(swaps.values())


class _CounterpartRun:
    """A trial run of a copy in which every module that has a complex counterpart is replaced by it.

    Counterparts accept real values too, so one run shows which of them are needed.

    Args:
        model: the network with its original layers.
        layers: basis layers, by the names of the layers that they replace.
        input_shape: (C, H, W) of one input.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, BasisLayer], input_shape: tuple[int, int, int]
    ) -> None:
        if any(isinstance(module, (ComplexModule, ComplexLayer)) for module in model.modules()):
            raise TransformError(
                "the network computes with complex numbers already: begin with its architecture (--arch)"
            )
        self.network = copied(model)
        for name, layer in layers.items():
            put_in_place(self.network, name, copied(layer))
        self.counterparts: dict[str, nn.Module] = {}
        for name, module in list(self.network.named_modules()):
            made = counterpart(module) if name else None
            if made is not None:
                put_in_place(self.network, name, made)
                self.counterparts[name] = made
        self._names = {module: name for name, module in self.network.named_modules()}
        # Two samples: in training, batch norm needs more than one value per channel.
        self._inputs = torch.zeros(2, *input_shape, device=device_of(model))
        self.met: dict[str, set[bool]] = {}
        self.ending: set[str] = set()

    def swaps(self) -> dict[str, Swap]:
        """Run the trial. Returns the edits needed, and sets `ending`: the module that outputs |z|."""
        outputs = self._run(training=False)
        needed = [name for name in self.counterparts if True in self.met.get(name, ())]
        self._refuse_mixed(needed)
        if _is_complex(outputs):
            self.ending = {self._last}
            last = self.network.get_submodule(self._last)
            if isinstance(last, BasisLayer):
                last.arguments = last.arguments.model_copy(update={"ends": True})
            else:
                last.ends = True  # type: ignore[assignment]
        # In both modes, because modules may take other paths in training.
        for training in (False, True):
            if _is_complex(self._run(training=training)):
                raise TransformError(
                    "outputs of the network stay complex, because more than one layer makes them: "
                    "leave such layers out with patterns of --layers"
                )
        return {
            name: Swap(module=name, layer=COMPLEX, arguments={"ends": True} if name in self.ending else {})
            for name in needed
        }

    def _refuse_mixed(self, needed: Sequence[str]) -> None:
        for name in needed:
            module = self.counterparts[name]
            if False in self.met[name] and isinstance(module, ComplexBatchNorm):
                raise TransformError(
                    f"{name} meets complex and real values, and its statistics cannot serve both"
                )

    def _run(self, *, training: bool) -> Any:
        stack: list[str] = []
        calls = _LastCall()
        with _watched(self.network, self._names, stack, self._note):
            try:
                with in_mode(self.network, training=training), torch.no_grad(), calls:
                    return self.network(self._inputs)
            except TransformError:
                raise
            # The network's code may raise anything on numbers that it does not expect.
            except Exception as error:
                where = stack[-1] if stack else ""
                kind = type(self.network.get_submodule(where)).__name__
                raise TransformError(
                    f"{where or 'the network'} ({kind}) calls {calls.last}, which fails on complex numbers: "
                    f"{_first_line(error)}; leave dft layers before it out with patterns of --layers, "
                    "or take --kernel dct"
                ) from error

    def _note(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if name in self.counterparts:
            self.met.setdefault(name, set()).add(_is_complex(inputs))
        if (name in self.counterparts or isinstance(module, ComplexLayer)) and _is_complex(outputs):
            self._last = name


class _LastCall(TorchFunctionMode):
    """Remembers the last function that was called with complex numbers."""

    last = "a function"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_complex((args, kwargs or {})):
            self.last = canonical_name(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(
    network: nn.Module,
    names: Mapping[nn.Module, str],
    stack: list[str],
    note: Callable[[str, nn.Module, Any, Any], None],
) -> Iterator[None]:
    """Keep a stack of the names of the executing modules, and report each call when it returns."""

    def before(module: nn.Module, inputs: Any) -> None:
        stack.append(names[module])

    def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
        note(stack.pop(), module, inputs, outputs)

    handles = []
    for module in names:
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with removing(handles):
        yield


def _is_complex(value: Any) -> bool:
    return any(tensor.is_complex() for tensor in tensors_in(value))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
