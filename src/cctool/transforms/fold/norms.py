"""Batch norm with running statistics, folded into the layer before it or, where exact, those after it.

In evaluation batch norm computes y = s x + t per channel, with s = gamma / sqrt(var + eps) and
t = beta - s mean (Ioffe and Szegedy 2015, algorithm 2). Behind a layer, W <- s W and b <- s b + t. Before
one, W <- W s along its inputs and b <- b + sum(W t): not with zero padding, whose zeros t does not reach.
Instance norm that tracks statistics computes the same in evaluation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cctool.checkpoint.edits.fold import Fold
from cctool.checkpoint.edits.mask import masked_places
from cctool.graph.trace import argument
from cctool.transforms.fold.layers import (
    Candidate,
    Stays,
    TakingLayer,
    carry_out,
    layer_at,
    near,
    set_layer,
    weight_and_bias,
)
from cctool.transforms.fold.passes import INPUT, LAYERS, TRANSPOSED, UNKNOWN, TracedCall, TracedPass

_NORMS = {"batch_norm": "batch norm", "instance_norm": "instance norm"}
_STATISTICS = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class RunningNorm:
    """A module whose own code does nothing but one batch or instance norm by running statistics.

    Attributes:
        name: of the module.
        kind: of norm, in words.
        calls: numbers of its calls.
        children: that it calls afterwards, one after another, such as an activation.
        epsilon: that is added to the variance.
    """

    name: str
    kind: str
    calls: tuple[int, ...]
    children: tuple[str, ...]
    epsilon: float

    @property
    def edit(self) -> Fold:
        """What remains of it."""
        return Fold(module=self.name, becomes="rest", children=self.children)

    def factors(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, float64."""
        module = model.get_submodule(self.name)
        mean, var, weight, bias = (getattr(module, name, None) for name in _STATISTICS)
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        scale = (var.double() + self.epsilon).rsqrt()
        scale = scale if weight is None else scale * weight.detach().double()
        shift = -mean.double() * scale
        return scale, shift if bias is None else shift + bias.detach().double()


def normalises(call: TracedCall) -> bool:
    """Whether a call is batch norm, or its like, of what the network computes, not of weights.

    Instance norm by the statistics of each image is another function.
    """
    if call.function == "instance_norm" and argument(call.event, "use_input_stats", True):
        return False
    return call.function in _NORMS and call.live


def norms_of(model: nn.Module, recorded: TracedPass) -> tuple[dict[str, RunningNorm], list[Stays]]:
    """Modules that are batch norms with running statistics, by name, and batch norms that are not such."""
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for number, call in enumerate(recorded.calls):
        if normalises(call):
            numbers[call.module].append(number)
    found: dict[str, RunningNorm] = {}
    stays: list[Stays] = []
    for name, calls in numbers.items():
        reason = _statistics(model, recorded, name, calls)
        children = () if reason else _children(model, recorded, name, calls)
        if reason or isinstance(children, str):
            stays.append(Stays(name or "the network", reason or str(children)))
        else:
            first = recorded.calls[calls[0]]
            epsilon = float(argument(first.event, "eps", 1e-5))
            found[name] = RunningNorm(name, _NORMS[first.function], tuple(calls), children, epsilon)
    return found, stays


def _statistics(model: nn.Module, recorded: TracedPass, name: str, calls: Sequence[int]) -> str:
    """Why a module's batch norm is not one by running statistics of its own; "" if it is."""
    module = model.get_submodule(name)
    for number in calls:
        event = recorded.calls[number].event
        if argument(event, "training", False) or argument(event, "running_mean") is None:
            return "it normalises by the statistics of each batch"
        for leaf in _STATISTICS:
            tensor = argument(event, leaf)
            if tensor is not None and tensor is not getattr(module, leaf, None):
                return (
                    f"the code of {name or 'the network'} calls {recorded.calls[number].function} with "
                    "tensors that are not its own"
                )
            sharing = [owner for owner in recorded.owners.get(id(tensor), ()) if owner != name]
            if sharing:
                return f"it shares a tensor with {sharing[0]}"
            taken = recorded.takers.get(recorded.names.get(id(tensor), ""), ())
            if any(recorded.calls[taker].function not in _NORMS for taker in taken):
                return f"its {leaf} is used elsewhere, too"
    if next(masked_places(module), None) is not None:
        return "its parameters have masks; fold before masks are set"
    return ""


def _children(
    model: nn.Module, recorded: TracedPass, name: str, calls: Sequence[int]
) -> tuple[str, ...] | str:
    """Children that a module calls after its batch norm, or why it is not batch norm followed by children."""
    entries, found = recorded.entries.get(name, ()), set()
    own = [call for call in recorded.calls if call.module == name]
    mixed = f"the code of {name or 'the network'} does more than a norm"
    if not name or len(entries) != len(calls) or len(own) != len(calls):
        return mixed
    for entry, number in zip(entries, calls, strict=True):
        at, children = number, []
        if entry.given != recorded.calls[number].sources[0]:
            return mixed
        for child in entry.children:
            owner, _, leaf = child.module.rpartition(".")
            if owner != name or child.given != at:
                return mixed
            at = child.returned
            if type(model.get_submodule(child.module)) is not nn.Identity:
                children.append(leaf)
        if entry.returned != at:
            return mixed
        found.add(tuple(children))
    return found.pop() if len(found) == 1 else mixed


def norm_candidates(model: nn.Module, recorded: TracedPass) -> tuple[list[Candidate], list[Stays]]:
    """Batch norms that can be folded into the layers next to them, and why others cannot."""
    norms, stays = norms_of(model, recorded)
    found: list[Candidate] = []
    for norm in norms.values():
        behind = _behind(model, recorded, norm)
        if isinstance(behind, Candidate):
            found.append(behind)
            continue
        before = _before(model, recorded, norm)
        if isinstance(before, Candidate):
            found.append(before)
        else:
            stays.append(Stays(norm.name, "; ".join(filter(None, dict.fromkeys((behind, before))))))
    return found, stays


def _behind(model: nn.Module, recorded: TracedPass, norm: RunningNorm) -> Candidate | str:
    """The fold of a batch norm into the layer whose results it alone takes."""
    layers: dict[str, TakingLayer] = {}
    for number in norm.calls:
        source = recorded.source(recorded.calls[number])
        if source < 0 or recorded.calls[source].function not in LAYERS:
            return f"{_title(recorded, source)} lies directly before it"
        layer = layer_at(model, recorded, source)
        if isinstance(layer, str):
            return layer
        layers[layer.name] = layer
    if len(layers) > 1:
        return f"it follows {' and '.join(list(layers)[:2])}"
    (layer,) = layers.values()
    for number in layer.calls:
        if any(user not in norm.calls for user in recorded.users(number)):
            return f"the result of {layer.name} is used elsewhere, too"
        call = recorded.calls[number]
        if call.function == "linear" and call.event.result.dim() != 2:
            return f"its channels are not the outputs of {layer.name}"
    if not layer.takes_bias:
        return f"{layer.name} can take no shift: its bias is masked, or its code has none"

    def change(network: nn.Module) -> tuple[Sequence[Fold], dict[str, Tensor]]:
        scale, shift = norm.factors(network)
        weight, bias = weight_and_bias(network, layer.name)
        call = recorded.calls[layer.calls[0]]
        groups = int(argument(call.event, "groups", 1)) if call.function in TRANSPOSED else 1
        # Outputs are dim 0, those of a transposed convolution dim 1 of each group.
        parts = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
        if call.function in TRANSPOSED:
            parts = parts * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
        else:
            parts = parts * scale.view(1, -1, *(1,) * (weight.dim() - 1))
        bias = shift if bias is None else bias * scale + shift
        edit, values = set_layer(network, layer.name, parts.view_as(weight), bias)
        carry_out(network, (edit, norm.edit), values)
        return (edit, norm.edit), values

    return Candidate(layer.name, (f"{norm.kind} {near(norm.name, layer.name)}",), (norm.name,), change)


def _before(model: nn.Module, recorded: TracedPass, norm: RunningNorm) -> Candidate | str:
    """The fold of a batch norm into the layers that alone take its result."""
    if norm.children or len(norm.calls) != 1:
        return "" if not norm.children else f"{norm.children[0]} lies directly behind it"
    (number,) = norm.calls
    shifted = bool(norm.factors(model)[1].any())
    users = recorded.users(number)
    layers: list[TakingLayer] = []
    for user in users:
        layer = _reader(model, recorded, number, user, shifted)
        if isinstance(layer, str):
            return layer
        layers.append(layer)
    if not layers or len({layer.name for layer in layers}) != len(layers):
        return "no layer takes its result alone"

    def change(network: nn.Module) -> tuple[Sequence[Fold], dict[str, Tensor]]:
        scale, shift = norm.factors(network)
        edits = [norm.edit]
        values: dict[str, Tensor] = {}
        for layer in layers:
            weight, bias = weight_and_bias(network, layer.name)
            groups = scale.numel() // weight.shape[1]
            parts = weight.view(groups, -1, *weight.shape[1:])
            shape = (groups, 1, -1, *(1,) * (weight.dim() - 2))
            added = (parts * shift.view(shape)).flatten(2).sum(2).flatten()
            total = added if bias is None else bias + added
            edit, more = set_layer(
                network, layer.name, (parts * scale.view(shape)).view_as(weight), total if shifted else bias
            )
            edits.append(edit)
            values |= more
        carry_out(network, edits, values)
        return edits, values

    names = tuple(layer.name for layer in layers)
    text = f"{norm.kind} {near(norm.name, names[0])}"
    if names[1:]:
        text += f" (also into {', '.join(near(name, names[0]) for name in names[1:])})"
    return Candidate(names[0], (text,), (norm.name, *names[1:]), change)


def _reader(
    model: nn.Module, recorded: TracedPass, number: int, user: int, shifted: bool
) -> TakingLayer | str:
    """The layer that takes the result of a batch norm, or why it cannot take its factors."""
    if user < 0 or recorded.calls[user].function not in LAYERS:
        return f"{_title(recorded, user)} lies directly behind it"
    call = recorded.calls[user]
    layer = layer_at(model, recorded, user)
    if isinstance(layer, str):
        return layer
    if layer.calls != (user,) or recorded.source(call) != number:
        return f"{layer.name} is called several times"
    if call.function in TRANSPOSED:
        return f"{layer.name} behind it adds up fewer inputs at the border"
    if call.function == "linear" and recorded.calls[number].event.result.dim() != 2:
        return f"its channels are not the inputs of {layer.name}"
    if shifted and not layer.takes_bias:
        return f"{layer.name} can take no shift: its bias is masked, or its code has none"
    if shifted and any(_paddings(call.event)):
        return f"{layer.name} behind it pads with zeros, which its shift does not reach"
    return layer


def _paddings(event: object) -> Iterator[bool]:
    padding = argument(event, "padding", 0)  # type: ignore[arg-type]
    if padding == "same":
        yield any(size > 1 for size in argument(event, "weight").shape[2:])  # type: ignore[arg-type]
    elif padding != "valid":
        yield from (bool(size) for size in (padding if isinstance(padding, (tuple, list)) else (padding,)))


def _title(recorded: TracedPass, number: int) -> str:
    if number == INPUT:
        return "the network's input"
    if number == UNKNOWN:
        return "the network's output"
    call = recorded.calls[number]
    return f"{call.function} of {call.module}" if call.module else call.function
