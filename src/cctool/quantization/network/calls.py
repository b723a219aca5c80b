"""The data flow of one forward pass: calls of torch functions, and the tensors between them.

A call is recognised in later passes by its *place*: the module whose code was executing, the function, and
how often that module had called it before. So functional and shared activations have separate places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cctool.base.networks import copied, in_mode, qualified
from cctool.graph.execution import Event, execute, tensors_in
from cctool.graph.trace import ARGUMENTS, argument, tensor_names
from cctool.quantization.network.kernels import Kernel, fed_by, same, whole_parameter

COMPUTING = frozenset(
    [*(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "linear"]
)
"""Functions with a weight that is quantized."""

_BY_SAMPLES = "how often it is called depends on the number of samples, as in a loop over them"
_BY_INPUT = "how often it is called depends on the network's input"

_MANY = 1024
"""Samples of a pass that only counts calls: loops over chunks of a batch show there."""

INPUT = -1
"""The network's input, where calls are given by their number."""


class CallSite(NamedTuple):
    """The place of a call: ``number`` counts that module's calls of the function in one pass, from 0."""

    module: str
    function: str
    number: int

    @property
    def key(self) -> str:
        """Name of the call within its module, as ``conv2d#0``."""
        return f"{self.function}#{self.number}"

    @property
    def title(self) -> str:
        """For reports: the module's name, such as ``layer1.0.conv1``; the function's in the root's code."""
        return self.module or self.function


def channel_dim(place: CallSite, dims: int) -> int:
    """The channel dimension of a layer's result with ``dims`` dimensions."""
    return dims - 1 if place.function == "linear" else dims - 1 - int(place.function[-2])


@dataclass
class FlowCall:
    """One call.

    Attributes:
        place: of the call.
        module_type: class name of the module.
        sources: numbers of the calls that made its tensor arguments, in order; `INPUT` for the network's
            input.
        weight: of computing calls, the qualified name of the parameter that is the weight, perhaps in
            another shape; of a weight that is none, the name of its `Kernel`.
        weight_shape: of that weight.
        kernel: of computing calls whose weight is no parameter.
        bias: of computing calls whose bias is neither a parameter nor a buffer.
        kernel_sources: numbers of the calls that made its weight and its bias, of computing calls.
        tensors: qualified names of all parameters and buffers, by argument name.
        shape: of its result, including the batch; () unless that is one floating-point tensor.
        settings: arguments that are not tensors, by name if it is known.
        users: numbers of the calls that take its result.
        lost: whether it changed its argument in place and the network continues with that argument, so that
            what it returned is not what others use.
        constant: whether no argument depends on the network's input.
        varies: of computing calls, why the values of the weight cannot be known in advance; "" if they can.
        looped: on what it depends how often its module calls its function, as a reason why no call has a
            range of its own; "" if it is called equally often in every pass.
    """

    place: CallSite
    module_type: str
    sources: tuple[int, ...]
    weight: str | None = None
    weight_shape: tuple[int, ...] = ()
    kernel: Kernel | None = None
    bias: Kernel | None = None
    kernel_sources: tuple[int, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    users: list[int] = field(default_factory=list)
    lost: bool = False
    constant: bool = False
    varies: str = ""
    looped: str = ""


@dataclass(frozen=True)
class Flow:
    """The calls of one pass.

    Attributes:
        calls: in order.
        outputs: numbers of those whose results the network returns.
        input_users: numbers of those that take the network's input.
        elsewhere: places of layers that this pass left out and that another input reached.
    """

    calls: tuple[FlowCall, ...]
    outputs: tuple[int, ...]
    input_users: tuple[int, ...]
    elsewhere: tuple[CallSite, ...] = ()

    def at(self, place: CallSite) -> FlowCall:
        """The call at a place."""
        return {call.place: call for call in self.calls}[place]

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Weights that are no parameters, by name."""
        return {call.kernel.name: call.kernel for call in self.calls if call.kernel is not None}


class _Recorder:
    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.names = tensor_names(model)
        self.parameters = dict(model.named_parameters())
        self.types = {name: type(module).__name__ for name, module in model.named_modules()}
        self.calls: list[FlowCall] = []
        self.made: dict[int, int] = {id(tensor): INPUT for tensor in inputs}
        self.stale: dict[int, int] = {}
        self.input_users: list[int] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.alive: list[Any] = list(inputs)
        # For each call, whether the values of its result may depend on the network's input.
        self.fed: list[bool] = []
        self.kernels: dict[int, Kernel] = {}

    def substitute(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        result = function(*args, **kwargs)
        # A call in place returns its argument. Returning a view instead shows whether later calls use the
        # result or the argument.
        if isinstance(result, Tensor) and any(result is tensor for tensor in tensors_in(args)):
            self.stale[id(result)] = len(self.calls)
            self.alive.append(result)
            result = result.view_as(result)
        return result

    def record(self, event: Event) -> None:
        # Assigning an attribute such as `x.data` computes nothing.
        if getattr(event.function, "__name__", "") == "__set__":
            return
        place = CallSite(event.module, event.name, self.counts[event.module, event.name])
        self.counts[event.module, event.name] += 1
        results = list(tensors_in(event.result))
        if not results:
            return
        arguments = [*tensors_in(event.args), *tensors_in(event.kwargs)]
        # Kept alive, because the ids of freed tensors are used again.
        self.alive.extend((*results, *arguments))
        number = len(self.calls)
        sources = []
        for tensor in arguments:
            stale = self.stale.get(id(tensor))
            if stale is not None and stale != number:
                self.calls[stale].lost = True
                sources.append(stale)
            elif id(tensor) in self.made:
                sources.append(self.made[id(tensor)])
        call = FlowCall(
            place=place,
            module_type=self.types.get(event.module, ""),
            sources=tuple(sources),
            tensors=self._tensors(event),
            shape=_shape(event.result),
            settings=_settings(event),
            constant=all(source != INPUT and self.calls[source].constant for source in sources),
        )
        self.fed.append(any(number == INPUT or self.fed[number] for number in self._numbers(fed_by(event))))
        if event.name in COMPUTING:
            self._take(call, argument(event, "weight"), argument(event, "bias"))
        self.calls.append(call)
        # Once each, even if a call takes the same tensor twice.
        for source in dict.fromkeys(sources):
            (self.input_users if source == INPUT else self.calls[source].users).append(number)
        for tensor in results:
            if id(tensor) not in self.names:
                self.made[id(tensor)] = number

    def _numbers(self, tensors: Sequence[Tensor]) -> list[int]:
        """Numbers of the calls that made these tensors."""
        found = []
        for tensor in tensors:
            number = self.stale.get(id(tensor), len(self.calls))
            # What is being written to in place was made before.
            found.append(number if number < len(self.calls) else self.made.get(id(tensor)))
        return [number for number in found if number is not None]

    def _take(self, call: FlowCall, weight: Any, bias: Any) -> None:
        """Record the weight and the bias of a computing call."""
        made = [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]
        call.kernel_sources = tuple(self._numbers(made))
        if isinstance(bias, Tensor) and id(bias) not in self.names:
            call.bias = self._kernel(call.place, "bias", bias)
        if not isinstance(weight, Tensor):
            return
        call.weight_shape = tuple(weight.shape)
        name = self.names.get(id(weight))
        if name not in self.parameters:
            # In a transposed convolution channels lie along the second dimension, which a view may move.
            name = None if "transpose" in call.place.function else whole_parameter(weight, self.parameters)
        if name is None:
            call.kernel = self._kernel(call.place, "weight", weight)
        call.weight = name if call.kernel is None else call.kernel.name

    def _kernel(self, place: CallSite, slot: str, tensor: Tensor) -> Kernel:
        """What is known of a weight or bias that is no parameter; the same for all calls that take it."""
        if id(tensor) not in self.kernels:
            known = self.names.get(id(tensor))
            numbers = self._numbers([tensor])
            made_of = (known,) if known is not None else self._made_of(numbers)
            own = qualified(place.module, slot)
            parameter = self.parameters.get(own)
            plain = parameter is not None and parameter.shape == tensor.shape and own in made_of
            self.kernels[id(tensor)] = Kernel(
                name=known or qualified(place.module, f"{place.key}:{slot}"),
                value=tensor.detach().clone(),
                made_of=made_of,
                own=own if plain else None,
                fed=any(number == INPUT or self.fed[number] for number in numbers),
            )
        return self.kernels[id(tensor)]

    def _made_of(self, numbers: Sequence[int]) -> tuple[str, ...]:
        """Names of the tensors that calls computed their results from, up to layers that take images."""
        found: dict[str, None] = {}
        seen, left = set(numbers), [number for number in numbers if number != INPUT]
        while left:
            number = left.pop()
            call = self.calls[number]
            if call.weight is None or not self.fed[number]:
                found |= dict.fromkeys(call.tensors.values())
                more = [number for number in call.sources if number != INPUT and number not in seen]
                seen.update(more)
                left += more
        return tuple(found)

    def _tensors(self, event: Event) -> dict[str, str]:
        found = {}
        for name, value in _named(event).items():
            for number, tensor in enumerate(tensors_in(value)):
                if id(tensor) in self.names:
                    found[name if tensor is value else f"{name}.{number}"] = self.names[id(tensor)]
        return found


def flow_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Flow:
    """Record one pass of a network without quantizers and codecs, in evaluation mode; it is not changed.

    A second pass, with other inputs, shows which layers take the same weight whatever comes in, and a third,
    with a sample more, which do so whatever the batch. That one, and one of many samples on the meta device,
    show which calls lie in a loop over the batch.
    """
    flow = _recorded(model, inputs)
    generator = torch.Generator().manual_seed(1)
    others = tuple(
        torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor
        for tensor in inputs
    )
    with in_mode(model, training=False):
        if flow.kernels:
            # Random numbers and buffers go on from here: they may change weights, too.
            model(*others)
        other = _recorded(model, others).calls
        more = _calls_of_more(model, inputs)
    second, third = _layers(other), _layers(more)
    counts = _counted(flow.calls)
    for reason, found in (
        (_BY_INPUT, _counted(other)),
        (_BY_SAMPLES, _counted(more)),
        (_BY_SAMPLES, _counts_of_many(model, inputs)),
    ):
        for call in flow.calls:
            key = call.place.module, call.place.function
            # Where a pass has none, another branch was taken: its calls are no others of this function.
            if found[key] and found[key] != counts[key]:
                call.looped = reason
    for call in flow.calls:
        if call.weight is not None:
            larger = third.get(call.place, call)
            call.varies = _varies(call, second.pop(call.place, call)) or _varies_with_batch(call, larger)
    return replace(flow, elsewhere=tuple(second))


def _layers(calls: Sequence[FlowCall]) -> dict[CallSite, FlowCall]:
    return {call.place: call for call in calls if call.weight is not None}


def _counted(calls: Sequence[FlowCall]) -> Counter[tuple[str, str]]:
    """How often each module calls each function."""
    return Counter((call.place.module, call.place.function) for call in calls)


def _calls_of_more(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[FlowCall, ...]:
    """The calls of a pass with one sample more; none if the network takes no other batch."""
    more = tuple(torch.cat((tensor, tensor[:1])) if tensor.dim() else tensor for tensor in inputs)
    try:
        return _recorded(model, more).calls
    except Exception:
        # A network of a fixed batch, whose own code may raise anything: its weights have one shape.
        return ()


def _counts_of_many(model: nn.Module, inputs: tuple[Tensor, ...]) -> Counter[tuple[str, str]]:
    """`_counted` of a pass with many samples, of which only shapes are computed; empty where that fails."""
    counts: Counter[tuple[str, str]] = Counter()

    def count(event: Event) -> None:
        if next(tensors_in(event.result), None) is not None:
            counts[event.module, event.name] += 1

    try:
        # Also for what the network's code makes on the way: nothing takes memory.
        with torch.device("meta"):
            shapes = [(_MANY, *tensor.shape[1:]) if tensor.dim() else () for tensor in inputs]
            many = [
                torch.empty(shape, dtype=tensor.dtype) for shape, tensor in zip(shapes, inputs, strict=True)
            ]
            execute(_without_values(model), many, [count])
    except Exception:
        # The network's own code asks for values, or takes no other batch: it may raise anything.
        return Counter()
    return counts


def _without_values(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes alone."""
    shapes: dict[int, object] = {}
    for parameter in model.parameters():
        shapes[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        shapes[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copied(model, shapes)


def _varies(call: FlowCall, second: FlowCall) -> str:
    """Why the weight of a layer is not fixed, given the same call in another pass; "" if it is."""
    kernels = call.kernel, second.kernel
    if any(kernel is not None and kernel.fed for kernel in kernels):
        return "its weight is computed from the network's input"
    if call.weight != second.weight:
        return "which weight it takes depends on the network's input"
    if call.kernel is None or second.kernel is None:
        return ""
    value = call.kernel.value
    if not same(value, second.kernel.value):
        return "its weight differs from pass to pass"
    if not value.is_floating_point():
        return f"its weight is computed as {str(value.dtype).removeprefix('torch.')}"
    return "" if bool(torch.isfinite(value).all()) else "its computed weight is not finite"


def _varies_with_batch(call: FlowCall, other: FlowCall) -> str:
    """Why the weight of a layer is not fixed, given the same call for another number of samples."""
    if call.weight_shape != other.weight_shape:
        return "the shape of its weight depends on the batch"
    if call.weight != other.weight:
        return "which weight it takes depends on the batch"
    if call.kernel is None or other.kernel is None or same(call.kernel.value, other.kernel.value):
        return ""
    return "its weight depends on the batch"


def training_shapes(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[CallSite, tuple[int, ...]]:
    """Shapes of the weights that calls take in training mode, by place; the network is not changed."""
    calls = _recorded(model, inputs, training=True).calls
    return {call.place: call.weight_shape for call in calls if call.weight is not None}


def _recorded(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool = False) -> Flow:
    recorder = _Recorder(model, inputs)
    output = execute(model, inputs, [recorder.record], training, recorder.substitute)
    outputs = []
    for tensor in tensors_in(output):
        stale = recorder.stale.get(id(tensor))
        if stale is not None:
            recorder.calls[stale].lost = True
        number = recorder.made.get(id(tensor), stale)
        if number is not None and number != INPUT:
            outputs.append(number)
    return Flow(tuple(recorder.calls), tuple(outputs), tuple(recorder.input_users))


def _shape(result: Any) -> tuple[int, ...]:
    if isinstance(result, Tensor) and result.is_floating_point():
        return tuple(result.shape)
    return ()


def _settings(event: Event) -> dict[str, Any]:
    return {name: value for name, value in _named(event).items() if next(tensors_in(value), None) is None}


def _named(event: Event) -> dict[str, Any]:
    """Arguments by name; ``argument2`` is the third if its name is not known."""
    names = ARGUMENTS.get(event.name, ())
    positional = {names[i] if i < len(names) else f"argument{i}": value for i, value in enumerate(event.args)}
    return {**positional, **event.kwargs}
