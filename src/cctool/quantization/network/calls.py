"""The data flow of one forward pass: calls of torch functions, and the tensors between them.

A call is recognised in later passes by its *place*: the module whose code was executing, the function, and
how often that module had called it before. So functional and shared activations have separate places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from cctool.graph.execution import Event, execute, tensors_in
from cctool.graph.trace import ARGUMENTS, argument, tensor_names

COMPUTING = frozenset(
    [*(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "linear"]
)
"""Functions with a weight that is quantized."""

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


@dataclass
class FlowCall:
    """One call.

    Attributes:
        place: of the call.
        module_type: class name of the module.
        sources: numbers of the calls that made its tensor arguments, in order; `INPUT` for the network's
            input.
        weight: of computing calls, the qualified name of the weight; if that is computed, the name that it
            has in the module.
        weight_shape: of that weight.
        tensors: qualified names of all parameters and buffers, by argument name.
        shape: of its result, including the batch; () unless that is one floating-point tensor.
        settings: arguments that are not tensors, by name if it is known.
        users: numbers of the calls that take its result.
        lost: whether it changed its argument in place and the network continues with that argument, so that
            what it returned is not what others use.
        constant: whether no argument depends on the network's input.
    """

    place: CallSite
    module_type: str
    sources: tuple[int, ...]
    weight: str | None = None
    weight_shape: tuple[int, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    users: list[int] = field(default_factory=list)
    lost: bool = False
    constant: bool = False


@dataclass(frozen=True)
class Flow:
    """The calls of one pass in order, and the numbers of those whose results the network returns."""

    calls: tuple[FlowCall, ...]
    outputs: tuple[int, ...]
    input_users: tuple[int, ...]

    def at(self, place: CallSite) -> FlowCall:
        """The call at a place."""
        return {call.place: call for call in self.calls}[place]


class _Recorder:
    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.names = tensor_names(model)
        self.types = {name: type(module).__name__ for name, module in model.named_modules()}
        self.calls: list[FlowCall] = []
        self.made: dict[int, int] = {id(tensor): INPUT for tensor in inputs}
        self.stale: dict[int, int] = {}
        self.input_users: list[int] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.alive: list[Any] = list(inputs)

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
        if event.name in COMPUTING:
            weight = argument(event, "weight")
            if isinstance(weight, Tensor):
                own = f"{event.module}.weight" if event.module else "weight"
                call.weight = self.names.get(id(weight), own)
                call.weight_shape = tuple(weight.shape)
        self.calls.append(call)
        # Once each, even if a call takes the same tensor twice.
        for source in dict.fromkeys(sources):
            (self.input_users if source == INPUT else self.calls[source].users).append(number)
        for tensor in results:
            if id(tensor) not in self.names:
                self.made[id(tensor)] = number

    def _tensors(self, event: Event) -> dict[str, str]:
        found = {}
        for name, value in _named(event).items():
            for number, tensor in enumerate(tensors_in(value)):
                if id(tensor) in self.names:
                    found[name if tensor is value else f"{name}.{number}"] = self.names[id(tensor)]
        return found


def flow_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Flow:
    """Record one pass of a network without quantizers and codecs, in evaluation mode; it is not changed."""
    recorder = _Recorder(model, inputs)
    output = execute(model, inputs, [recorder.record], substitute=recorder.substitute)
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
