"""What a network computes for its inputs: multiply-accumulates and element operations, call by call.

Counted on the traced pass, so functional calls, raw parameters and attention count as modules do, and a
module that is called twice counts twice. One multiply-accumulate (MAC) is one multiplication and the
addition of its product; biases are not counted. The main figure is products with weights (convolution,
linear). Products of activations (attention), norms, activations, pooling and elementwise arithmetic have
separate columns, because counters differ most in how they treat these. Moving data is free. A function
without a counting rule is listed in `ModelCost.uncounted`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from cctool.graph.cost_rules import FREE, RULES, Cost
from cctool.graph.execution import blaming_the_size
from cctool.graph.trace import Call, Trace, trace


@dataclass(frozen=True)
class CountedCall:
    """One call with its cost.

    Attributes:
        call: the call.
        module: qualified name of the module that the cost belongs to: the one that owns the weight, else the
            innermost one executing. They differ where a parent computes with its child's parameters, as
            `nn.MultiheadAttention` does with `out_proj`.
        weight: qualified name of the first parameter among the arguments, None without one.
        cost: its operations.
    """

    call: Call
    module: str
    weight: str | None
    cost: Cost


@dataclass(frozen=True)
class ModelCost:
    """Cost of one forward pass.

    For `nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())` on (1, 3, 32, 32): 8*30*30 outputs, each the sum of
    3*3*3 products, so `total` is `Cost(macs=194_400, activation_ops=7_200)`.

    Attributes:
        calls: those that cost something or carry weights, in order.
        uncounted: number of calls of each function without a rule.
        touched: qualified names of the parameters and buffers that any call took.
    """

    calls: tuple[CountedCall, ...]
    uncounted: Mapping[str, int]
    touched: frozenset[str] = frozenset()

    @property
    def total(self) -> Cost:
        """Sum over all calls."""
        return sum((counted.cost for counted in self.calls), Cost())

    def by_module(self) -> dict[str, tuple[CountedCall, ...]]:
        """Calls of each module, in order of their first call."""
        grouped: dict[str, list[CountedCall]] = {}
        for counted in self.calls:
            grouped.setdefault(counted.module, []).append(counted)
        return {name: tuple(calls) for name, calls in grouped.items()}


def count(model: nn.Module, traced: Trace) -> ModelCost:
    """Count a recorded pass of a model."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    # A tied parameter belongs to several modules: the one that is executing is preferred.
    owners = {names[0]: [n.rpartition(".")[0] for n in names] for names in aliases.values()}
    counted, uncounted = [], Counter[str]()
    for call in traced.calls:
        if not call.input_shapes or call.function in FREE:
            continue
        cost = _cost(call)
        if cost is None:
            uncounted[call.function] += 1
            continue
        weight = next((name for name in call.tensor_names if name in owners), None)
        owning = owners[weight] if weight else [call.module]
        module = call.module if call.module in owning else owning[0]
        counted.append(CountedCall(call, module, weight, cost))
    touched = frozenset(name for call in traced.calls for name in call.parameters)
    return ModelCost(tuple(counted), dict(uncounted), touched)


def _cost(call: Call) -> Cost | None:
    rule = RULES.get(call.function)
    try:
        cost = None if rule is None else rule(call)
        if cost is not None and call.of_complex:
            cost = replace(cost, macs=4 * cost.macs, matmul_macs=4 * cost.matmul_macs)
        return cost
    except (IndexError, KeyError, TypeError, ValueError):
        # Called in a form whose arguments the record does not name: it is reported as not counted.
        return None


def measure(model: nn.Module, input_shape: tuple[int, ...]) -> ModelCost:
    """Run one input of zeros through the model and count it.

    Args:
        model: any module that takes one tensor.
        input_shape: of one input, without the batch: (C, H, W).

    Raises:
        ArchitectureError: the model does not run on this input.
    """
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = torch.zeros(2, *input_shape, device=example.device, dtype=example.dtype)
    with blaming_the_size(input_shape):
        try:
            return count(model, trace(model, (inputs[:1],)))
        except Exception as refusal:
            try:
                # Code with a bare squeeze() does not take a single input, but it takes two.
                return _halved(count(model, trace(model, (inputs,))))
            except Exception:
                raise refusal from None


def _halved(cost: ModelCost) -> ModelCost:
    """The cost of one input from that of two; counts that do not depend on the batch are rounded down."""
    halves = (
        replace(counted, cost=Cost(*(getattr(counted.cost, f.name) // 2 for f in fields(Cost))))
        for counted in cost.calls
    )
    return replace(cost, calls=tuple(halves))
