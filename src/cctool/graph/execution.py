"""Run a model once and show every torch function that it calls to observers.

The pass runs without gradients, in evaluation mode by default. Training flags, the random state and hooks
are restored even when `forward` raises. Observers see the functions that Python code calls, by their names in
torch (`conv2d`, `add`, `view`, ...), with the qualified name of the module that called them.

Scripted modules and other compiled code are opaque: they appear as one `Event` named `script_module`, or,
where even the call is invisible, as a tensor that no event has produced.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from cctool.base.errors import ArchitectureError, CctoolError
from cctool.base.networks import in_mode, removing
from cctool.checkpoint.edits.fold import Nothing
from cctool.graph.widths import as_float

SCRIPT_MODULE = "script_module"

# `x += y` calls `__iadd__`, `1 - x` calls `__rsub__`, ...: one name for each operation.
_DUNDER_ALIASES = {
    "truediv": "div",
    "idiv": "div",
    "itruediv": "div",
    "rdiv": "div",
    "rtruediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    **{f"{prefix}{name}": name for prefix in "ir" for name in ("add", "sub", "mul", "pow", "matmul")},
}


@dataclass(frozen=True)
class Event:
    """One call of a torch function.

    Attributes:
        name: canonical name: no underscores of in-place or dunder forms, one name for synonyms.
        function: the function itself, to be replayed on other tensors.
        args: positional arguments.
        kwargs: keyword arguments.
        result: return value.
        module: qualified name of the innermost module executing, "" for the root.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    module: str


Observer = Callable[[Event], None]
Substitute = Callable[[str, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Called with name, function and arguments instead of each function; returns the result."""
Sizes = Callable[[Tensor, Any], Any]
"""Called with a tensor and the value of its `shape` or `size()`; returns what the model sees instead."""


def canonical_name(function: Callable[..., Any]) -> str:
    """Name of a torch function, the same for its in-place, dunder, reflected and property forms.

    >>> canonical_name(torch.Tensor.__iadd__), canonical_name(torch.relu_), canonical_name(F.conv2d)
    ('add', 'relu', 'conv2d')
    """
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__"):
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    stripped = name.strip("_")
    return _DUNDER_ALIASES.get(stripped, stripped) or name


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value))


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dicts with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_tensors(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(with_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return type(value)((key, with_tensors(item, change)) for key, item in value.items())
    return value


def _transparent(function: Any) -> Callable[..., Any]:
    """The same Python function, without the check that would hand its whole call to the mode again."""
    # `float(E)` would forget that E is a width.
    names = {**function.__globals__, "has_torch_function": lambda *_: False, "float": as_float}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# Python functions whose call torch reports as one: they are run with the mode on, to see their operations.
_COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _transparent(F.multi_head_attention_forward)
}


class _Hidden(threading.local):
    depth = 0


_HIDDEN = _Hidden()


@contextmanager
def hidden() -> Iterator[None]:
    """Hide what is computed within from every `Watch`: codecs, for one, are no part of the network."""
    _HIDDEN.depth += 1
    try:
        yield
    finally:
        _HIDDEN.depth -= 1


class Watch(TorchFunctionMode):
    """Shows the observers each torch function call, after it has run.

    Attributes:
        modules: qualified names of the modules executing, the innermost last.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        names: Mapping[nn.Module, str],
        substitute: Substitute | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__()
        self.observers = observers
        self.names = names
        self.substitute = substitute
        self.sizes = sizes
        self.modules: list[str] = [""]
        self._canonical: dict[Callable[..., Any], str] = {}
        self._in_script = 0
        self._showing = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A sum with nothing is no computation.
        if self._showing or _HIDDEN.depth or any(isinstance(value, Nothing) for value in args):
            return func(*args, **kwargs)
        composite = _COMPOSITES.get(func)
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        if self._in_script:  # `leave` shows the whole script module as one call
            return func(*args, **kwargs)
        name = self.name(func)
        substitute = self.substitute
        result = func(*args, **kwargs) if substitute is None else substitute(name, func, args, kwargs)
        if self.observers:
            self.show(name, func, args, kwargs, result)
        if self.sizes is not None and name in ("shape", "size") and args:
            return self.sizes(args[0], result)
        return result

    def name(self, function: Any) -> str:
        """Canonical name of a function."""
        name = self._canonical.get(function)
        if name is None:
            # Property getters are new objects at each access: caching them would only leak.
            name = canonical_name(function)
            if getattr(function, "__name__", "") != "__get__":
                self._canonical[function] = name
        return name

    def show(self, name: str, function: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """Show a call to the observers."""
        event = Event(name, function, args, kwargs, result, self.modules[-1])
        # A hook shows events with the mode on: what observers compute is not the model's.
        self._showing = True
        try:
            for observer in self.observers:
                observer(event)
        finally:
            self._showing = False

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: a module begins."""
        name = self.names.get(module)
        if name is not None:
            self.modules.append(name)
            self._in_script += isinstance(module, torch.jit.ScriptModule)

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Forward hook: a module ends."""
        if self.names.get(module) is None:
            return
        if isinstance(module, torch.jit.ScriptModule):
            self._in_script -= 1
            if not self._in_script:
                self.show(SCRIPT_MODULE, module, args, {}, result)
        self.modules.pop()


def refuse_several_inputs(model: nn.Module) -> None:
    """Refuse a network whose forward needs more than one image tensor.

    Raises:
        ArchitectureError: naming the parameters.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    needed = [
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ArchitectureError(
            f"the network's forward needs {' and '.join(needed)} besides {parameters[0].name}: networks of "
            "several inputs are not supported, only those of one image tensor"
        )


@contextmanager
def blaming_the_size(input_shape: Sequence[int]) -> Iterator[None]:
    """Turn any error of a network's own code into one that names the input size, (C, H, W), and `--input`.

    Raises:
        ArchitectureError: in place of anything but our own errors and a lack of memory.
    """
    try:
        yield
    except (CctoolError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        size, text = "x".join(map(str, input_shape)), " ".join(str(error).split())[:200]
        raise ArchitectureError(
            f"the network does not run on inputs of {size} ({text}); --input CxHxW names another size"
        ) from error


def run_at_once(model: nn.Module, images: Tensor) -> Any:
    """What a network returns for a batch (N, C, H, W).

    Raises:
        ArchitectureError: if it does not run on inputs of this size, or not on several at once.
    """
    with blaming_the_size(tuple(images.shape[1:])):
        try:
            return model(images)
        except (CctoolError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if len(images) > 1:
                model(images[:1])
                size, text = "x".join(map(str, images.shape[1:])), " ".join(str(error).split())[:200]
                raise ArchitectureError(
                    f"the network runs on one input of {size}, but not on {len(images)} at once ({text})"
                ) from error
            raise


def execute(
    model: nn.Module,
    inputs: Sequence[Tensor],
    observers: Sequence[Observer],
    training: bool = False,
    substitute: Substitute | None = None,
    sizes: Sizes | None = None,
) -> Any:
    """Run the model once, show every torch function call to the observers, return the output.

    Args:
        model: any module; its training flags are restored and no hook stays on it.
        inputs: positional arguments of its forward.
        observers: called with each `Event` in order of execution.
        training: run in training mode; buffers that change are restored.
        substitute: computes each function instead of torch.
        sizes: replaces the sizes that the model reads off tensors.
    """
    names = {module: name for name, module in model.named_modules()}
    watch = Watch(observers, names, substitute, sizes)
    with in_mode(model, training), following(watch), watch:
        return model(*inputs)


@contextmanager
def following(watch: Watch) -> Iterator[None]:
    """Keep a watch informed of which modules are executing, by global forward hooks."""
    handles = [
        register_module_forward_pre_hook(watch.enter),
        register_module_forward_hook(watch.leave, always_call=True),  # also after errors
    ]
    with removing(handles):
        yield
