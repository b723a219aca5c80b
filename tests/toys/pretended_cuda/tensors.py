"""What a tensor says of its device, and how it moves; constructors, generators and autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import TensorBase
from torch.overrides import handle_torch_function, has_torch_function_unary

from pretended_cuda.driver import Driver
from pretended_cuda.marks import CPU, CUDA, is_device, mark, mark_storage, storage_is_marked


def replacements(driver: Driver) -> list[tuple[Any, str, Any]]:
    """Owner, name and replacement of all that concerns tensors."""
    methods = {
        "device": property(lambda self: CUDA if is_device(self) else TensorBase.device.__get__(self)),
        "is_cuda": property(lambda self: is_device(self) or TensorBase.is_cuda.__get__(self)),
        "is_cpu": property(lambda self: not is_device(self) and TensorBase.is_cpu.__get__(self)),
        "get_device": lambda self: 0 if is_device(self) else TensorBase.get_device(self),
        "grad": property(_grad, _set_grad, _del_grad),
        "to": _overridable(TensorBase.to)(functools.partial(_to, driver)),
        "cuda": _overridable(TensorBase.cuda)(lambda self, *a, **k: self.to(CUDA)),
        "cpu": _overridable(TensorBase.cpu)(lambda self, *a, **k: self.to(CPU)),
        "type_as": _overridable(TensorBase.type_as)(lambda self, other: self.to(other)),
        "new_tensor": _overridable(TensorBase.new_tensor)(_new_tensor),
        "numpy": _on_the_cpu_only(TensorBase.numpy),
        "__array__": _on_the_cpu_only(Tensor.__array__),
        "pin_memory": _pin_memory,
    }
    storage = torch.storage._StorageBase
    makers = [
        (torch, name, _constructor(getattr(torch, name))) for name in ("tensor", "as_tensor", "asarray")
    ]
    return [
        *((Tensor, name, value) for name, value in methods.items()),
        (storage, "clone", _clone_with_mark(storage.clone)),
        *makers,
        (torch, "Generator", _generators(driver)),
        *((owner, "autocast", _Autocast) for owner in (torch, torch.amp, torch.amp.autocast_mode)),
        (torch, "is_autocast_enabled", _of_the_cpu(torch.is_autocast_enabled)),
        (torch, "get_autocast_dtype", _of_the_cpu(torch.get_autocast_dtype)),
    ]


def register_with_torch_save() -> None:
    """Have files name the device of its tensors, and give what they name to the device."""
    torch.serialization.register_package(
        1,
        lambda storage: str(CUDA) if storage_is_marked(storage) else None,
        lambda storage, location: (
            _given(storage) if location == str(CUDA) and torch.cuda.is_available() else None
        ),
    )


def _given(storage: Any) -> Any:
    mark_storage(storage)
    return storage


def _overridable(original: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let subclasses and modes of torch functions see the replacement as they see the method itself."""

    def wrapped(replacement: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if has_torch_function_unary(self):
                return handle_torch_function(call, (self,), self, *args, **kwargs)
            return replacement(self, *args, **kwargs)

        return call

    return wrapped


class _Moved(torch.autograd.Function):
    """A copy on the other device; its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_device: bool, layout: torch.memory_format) -> Tensor:
        ctx.to_device = to_device
        with torch._C.DisableTorchFunction():
            copied = x.detach().clone(memory_format=layout)
            mark(copied, CUDA if to_device else None)
        return copied

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Moved.apply(gradient, not ctx.to_device, torch.preserve_format), None, None


def _to(driver: Driver, self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    elif isinstance(kwargs.get("other"), Tensor):
        other = kwargs.pop("other")
        args = (other.device, other.dtype, *args)
    if len(args) > 2 and isinstance(args[-1], bool):
        copy, args = (args[3], args[:3]) if len(args) > 3 else (copy, args)
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    if layout is not None:
        options["memory_format"] = layout
    if device is None or device.type not in ("cpu", "cuda"):
        where = {} if device is None else {"device": device}
        return TensorBase.to(self, **where, **options, copy=copy) if where or options or copy else self
    driver.check_index(device)
    if (device.type == "cuda") == self.is_cuda:
        return TensorBase.to(self, **options, copy=copy) if options or copy else self
    moved: Tensor = _Moved.apply(self, device.type == "cuda", layout or torch.preserve_format)
    return TensorBase.to(moved, dtype=dtype) if dtype is not None else moved


def _constructor(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        if device is None:
            return original(data, *args, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        made = original(data, *args, **kwargs).to(torch.device(device))
        return made.requires_grad_() if grad else made

    return make


def _new_tensor(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
    kwargs = {"dtype": self.dtype, "device": self.device, **kwargs}
    return torch.tensor(data, **kwargs)


def _on_the_cpu_only(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_device(self):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                "host memory first."
            )
        return original(self, *args, **kwargs)

    return _overridable(original)(call)


def _pin_memory(self: Tensor, *args: Any) -> Tensor:
    if is_device(self):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return self


def _grad(self: Tensor) -> Tensor | None:
    return TensorBase.grad.__get__(self)


def _set_grad(self: Tensor, value: Tensor | None) -> None:
    if isinstance(value, Tensor) and value.device != self.device:
        raise RuntimeError("attempting to assign a gradient with device type that differs from the tensor's")
    TensorBase.grad.__set__(self, value)


def _del_grad(self: Tensor) -> None:
    TensorBase.grad.__delete__(self)


def _clone_with_mark(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def clone(self: Any) -> Any:
        made = original(self)
        if storage_is_marked(self):
            mark_storage(made)
        return made

    return clone


def _generators(driver: Driver) -> type:
    """The class of generators, which makes the device's, too."""

    class Generator(torch._C.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            if torch.device(device).type != "cuda":
                return torch._C.Generator(device)
            made = super().__new__(cls)
            driver.generators[made._cdata] = made
            return made

        def __init__(self, device: Any = "cpu") -> None:
            pass

        @property
        def device(self) -> torch.device:
            return CUDA

    return Generator


class _Autocast(torch.autocast):
    """The CPU's autocast for the device, whose tensors are the CPU's to torch."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _of_the_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*device: str) -> Any:
        return original(*("cpu" if name == "cuda" else name for name in device))

    return call
