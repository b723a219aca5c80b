"""A record of one forward pass: every call, with the shapes and settings that counting and drawing need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cctool.graph.execution import Event, execute, tensors_in

Shape = tuple[int, ...]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias")
_MAX_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    **{f"max_pool{n}d": _MAX_POOL for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _AVERAGE_POOL for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": ("input", "output_size") for kind in ("avg", "max") for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "bilinear": ("input1", "input2", "weight", "bias"),
    "embedding": ("input", "weight", "padding_idx"),
    "batch_norm": (*_NORM_STATISTICS, "training", "momentum", "eps"),
    "instance_norm": (*_NORM_STATISTICS, "use_input_stats", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "einsum": ("equation",),
    "softmax": ("input", "dim"),
    "log_softmax": ("input", "dim"),
    "cat": ("tensors", "dim"),
    "mean": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim"),
    "interpolate": ("input", "size", "scale_factor", "mode"),
    "pixel_shuffle": ("input", "upscale_factor"),
    "pixel_unshuffle": ("input", "downscale_factor"),
    "channel_shuffle": ("input", "groups"),
    "prelu": ("input", "weight"),
    "glu": ("input", "dim"),
}
"""Names of the positional arguments of functions whose settings matter: builtins have no signature."""


@dataclass(frozen=True)
class Call:
    """One torch function called in the pass.

    For `nn.Conv2d(3, 8, 3, bias=False)` named `stem` on a 1x3x32x32 input: function `conv2d`, module `stem`,
    module_type `Conv2d`, input_shapes `((1, 3, 32, 32), (8, 3, 3, 3))`, tensor_names `("", "stem.weight")`,
    output_shapes `((1, 8, 30, 30),)`, attributes `{"bias": None, "stride": (1, 1), "padding": (0, 0),
    "dilation": (1, 1), "groups": 1}`.

    Attributes:
        function: canonical name (`conv2d`, `linear`, `add`, `scaled_dot_product_attention`, ...).
        module: qualified name of the innermost module executing, "" for the root.
        module_type: class name of that module.
        input_shapes: shapes of all tensor arguments in order, weights and buffers included.
        output_shapes: shapes of all tensors returned.
        tensor_names: for each input shape the qualified name if it is a parameter or buffer, else "".
        attributes: arguments that hold no tensor, by name; positional ones only of functions in `ARGUMENTS`.
        of_complex: whether two or more arguments are complex, so that one product is four real ones.
    """

    function: str
    module: str
    module_type: str
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    tensor_names: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    of_complex: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Qualified names of the parameters and buffers among the arguments."""
        return tuple(name for name in self.tensor_names if name)


@dataclass(frozen=True)
class Trace:
    """The calls of one forward pass that returned tensors, in order, and the shapes of its outputs."""

    calls: tuple[Call, ...]
    output_shapes: tuple[Shape, ...]


def argument(event: Event, name: str, default: Any = None) -> Any:
    """An argument of a call by name, positional or keyword; `ARGUMENTS` has the names."""
    if name in event.kwargs:
        return event.kwargs[name]
    names = ARGUMENTS.get(event.name, ())
    position = names.index(name) if name in names else len(event.args)
    return event.args[position] if position < len(event.args) else default


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Qualified name of each parameter and buffer by its `id`; a shared one has its first name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in named}


def _attributes(event: Event) -> dict[str, Any]:
    names = ARGUMENTS.get(event.name, ())
    given = {**dict(zip(names, event.args, strict=False)), **event.kwargs}
    return {name: value for name, value in given.items() if next(tensors_in(value), None) is None}


def _shapes(tensors: Sequence[Tensor]) -> tuple[Shape, ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    """Record one forward pass in evaluation mode.

    Args:
        model: any module; its training flags, random state and hooks are restored, also when it raises.
        inputs: positional arguments of its forward, on the model's device.
    """
    names = tensor_names(model)
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    calls: list[Call] = []

    def record(event: Event) -> None:
        results = list(tensors_in(event.result))
        # Reading a property (`x.T`, `x.grad`) is no computation.
        if not results or getattr(event.function, "__name__", "") in ("__get__", "__set__"):
            return
        arguments = [*tensors_in(event.args), *tensors_in(event.kwargs)]
        calls.append(
            Call(
                function=event.name,
                module=event.module,
                module_type=types[event.module],
                input_shapes=_shapes(arguments),
                output_shapes=_shapes(results),
                tensor_names=tuple(names.get(id(tensor), "") for tensor in arguments),
                attributes=_attributes(event),
                of_complex=sum(tensor.is_complex() for tensor in arguments) > 1,
            )
        )

    output = execute(model, inputs, [record])
    return Trace(tuple(calls), _shapes(list(tensors_in(output))))
