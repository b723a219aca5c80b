"""One traced pass as folding sees it: which call made each tensor, who takes it, what modules returned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from cctool.base.networks import removing
from cctool.graph.execution import Event, execute, tensors_in
from cctool.graph.trace import argument

INPUT = -1
"""The network's input, where calls are given by their number."""
UNKNOWN = -2
"""What no call has made: parameters, buffers, constants."""

CONVOLUTIONS = frozenset(f"conv{n}d" for n in (1, 2, 3))
TRANSPOSED = frozenset(f"conv_transpose{n}d" for n in (1, 2, 3))
_ASKING = frozenset(
    ("allclose", "array", "bool", "equal", "float", "index", "int", "is_nonzero", "item", "numpy", "tolist")
)
"""Functions whose results leave torch, so that Python may decide by them."""
LAYERS = CONVOLUTIONS | TRANSPOSED | {"linear"}
"""Functions that batch norm can be folded into."""


@dataclass
class TracedCall:
    """One call of a torch function.

    Attributes:
        event: function, arguments and result.
        sources: numbers of the calls that made its tensors that are neither parameters nor buffers.
        live: whether it depends on the network's input.
        users: numbers of the calls that take its result.
    """

    event: Event
    sources: tuple[int, ...]
    live: bool = True
    users: list[int] = field(default_factory=list)

    @property
    def function(self) -> str:
        """Canonical name."""
        return self.event.name

    @property
    def module(self) -> str:
        """Name of the module whose code called it."""
        return self.event.module


@dataclass
class Execution:
    """One execution of a module, by the calls that made what it was given and what it returned.

    Attributes:
        module: its qualified name.
        given: number of the call that made its only tensor argument; `UNKNOWN` if there are several.
        returned: likewise of what it returned.
        children: executions of other modules from its own code, in order.
    """

    module: str
    given: int
    returned: int = UNKNOWN
    children: list[Execution] = field(default_factory=list)


@dataclass(frozen=True)
class TracedPass:
    """A pass of a network in evaluation mode.

    Attributes:
        calls: in order.
        entries: executions of each module, by its name.
        outputs: numbers of the calls whose results the network returned.
        names: of parameters and buffers by `id`, the first name of shared ones.
        owners: modules that own each parameter or buffer, by its `id`.
        takers: numbers of the calls that take each parameter or buffer, by its name.
        output: what the network returned.
        decides: modules whose code asks for the values of tensors that depend on the input.
    """

    calls: tuple[TracedCall, ...]
    entries: Mapping[str, tuple[Execution, ...]]
    outputs: frozenset[int]
    names: Mapping[int, str]
    owners: Mapping[int, tuple[str, ...]]
    takers: Mapping[str, tuple[int, ...]]
    output: Any
    decides: tuple[str, ...] = ()

    def name_of(self, call: TracedCall, argument_name: str) -> str | None:
        """Qualified name of the parameter or buffer that is an argument of a call; None for anything else."""
        value = argument(call.event, argument_name)
        return self.names.get(id(value)) if isinstance(value, Tensor) else None

    def source(self, call: TracedCall) -> int:
        """The call that made a call's first tensor, seen through calls that change nothing."""
        return self.through(call.sources[0] if call.sources else UNKNOWN)

    def through(self, number: int) -> int:
        """The call itself, or the one before it whose values it hands on unchanged."""
        while number >= 0 and hands_on(self.calls[number]):
            number = self.calls[number].sources[0]
        return number

    def users(self, number: int) -> list[int]:
        """Calls that take a result, seen through those that hand it on; `UNKNOWN` is the network's output."""
        found: list[int] = [UNKNOWN] if number in self.outputs else []
        for user in self.calls[number].users:
            found += self.users(user) if hands_on(self.calls[user]) else [user]
        return found


def hands_on(call: TracedCall) -> bool:
    """Whether a call returns its only tensor unchanged: dropout that drops nothing, + 0, contiguous."""
    if len(call.sources) != 1:
        return False
    if "dropout" in call.function:
        share = call.event.kwargs.get("p", call.event.args[1] if len(call.event.args) > 1 else 0.5)
        return not share
    if call.function == "add":
        others = [value for value in call.event.args if not isinstance(value, Tensor)]
        return len(call.event.args) == 2 and not any(others) and not call.event.kwargs
    return call.function == "contiguous"


class _Recorder:
    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.modules = {module: name for name, module in model.named_modules()}
        self.names: dict[int, str] = {}
        owners: defaultdict[int, list[str]] = defaultdict(list)
        for name, module in model.named_modules():
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.names.setdefault(id(tensor), f"{name}.{leaf}" if name else leaf)
                    owners[id(tensor)].append(name)
        self.owners = {key: tuple(found) for key, found in owners.items()}
        self.calls: list[TracedCall] = []
        self.made: dict[int, int] = {id(tensor): INPUT for tensor in inputs}
        self.takers: defaultdict[str, list[int]] = defaultdict(list)
        self.entries: defaultdict[str, list[Execution]] = defaultdict(list)
        self.stack: list[Execution] = []
        self.alive: list[Any] = list(inputs)
        self.decides: dict[str, None] = {}

    def record(self, event: Event) -> None:
        results = list(tensors_in(event.result))
        if not results and event.name in _ASKING:
            self.ask(event)
        if not results or getattr(event.function, "__name__", "") == "__set__":
            return
        arguments = [*tensors_in(event.args), *tensors_in(event.kwargs)]
        # Kept alive, because the ids of freed tensors are used again.
        self.alive.extend((*results, *arguments))
        number = len(self.calls)
        sources = [self.made.get(id(t), UNKNOWN) for t in arguments if id(t) not in self.names]
        live = any(source == INPUT or (source >= 0 and self.calls[source].live) for source in sources)
        self.calls.append(TracedCall(event, tuple(sources), live))
        for tensor in arguments:
            if id(tensor) in self.names:
                self.takers[self.names[id(tensor)]].append(number)
        for source in dict.fromkeys(sources):
            if source >= 0:
                self.calls[source].users.append(number)
        # What was changed in place is from now on what this call made.
        for tensor in results:
            if id(tensor) not in self.names:
                self.made[id(tensor)] = number

    def ask(self, event: Event) -> None:
        made = [self.made.get(id(tensor), UNKNOWN) for tensor in tensors_in(event.args)]
        if any(number == INPUT or (number >= 0 and self.calls[number].live) for number in made):
            self.decides[event.module] = None

    def enter(self, module: nn.Module, inputs: Any) -> None:
        if module in self.modules:
            entry = Execution(self.modules[module], self._maker(inputs))
            if self.stack:
                self.stack[-1].children.append(entry)
            self.stack.append(entry)

    def leave(self, module: nn.Module, inputs: Any, result: Any) -> None:
        if module in self.modules:
            entry = self.stack.pop()
            entry.returned = self._maker(result)
            self.entries[entry.module].append(entry)

    def _maker(self, value: Any) -> int:
        tensors = list(tensors_in(value))
        return self.made.get(id(tensors[0]), UNKNOWN) if len(tensors) == 1 else UNKNOWN


def pass_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> TracedPass:
    """Record one pass of a network in evaluation mode; it is not changed."""
    recorder = _Recorder(model, inputs)
    handles = [
        register_module_forward_pre_hook(recorder.enter),
        register_module_forward_hook(recorder.leave, always_call=True),
    ]
    with removing(handles):
        output = execute(model, inputs, [recorder.record])
    outputs = frozenset(recorder.made.get(id(tensor), UNKNOWN) for tensor in tensors_in(output))
    return TracedPass(
        calls=tuple(recorder.calls),
        entries={name: tuple(found) for name, found in recorder.entries.items()},
        outputs=outputs - {INPUT, UNKNOWN},
        names=recorder.names,
        owners=recorder.owners,
        takers={name: tuple(found) for name, found in recorder.takers.items()},
        output=output,
        decides=tuple(recorder.decides),
    )
