"""Coupled channels: which channels must be cut together, and every index of every tensor that they touch.

One traced forward pass records a channel id for every element of every activation (`ledger.py`, `rules/`);
the connected components of the ids that it ties are the units (`solution.py`). The terms are those of
Torch-Pruning (Fang et al., "DepGraph", CVPR 2023), the method is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from cctool.base.detectors import before_boxes
from cctool.graph.execution import Event, execute, tensors_in, with_tensors
from cctool.graph.ledger import INPUT, Kind, Ledger, compact, constant_ids
from cctool.graph.records import ChannelGraph
from cctool.graph.rules import apply_rule
from cctool.graph.solution import solve
from cctool.graph.widths import Scale, Width, remembered

OUTPUT_WIDTH = "the width of the model's output"
"""Why channels of the outputs are fixed, unless something before the outputs fixes them."""

# Reading these says nothing about channels. Most calls are of this kind, so the pass skips them early.
_SILENT = """
    size shape dim ndim numel nelement item device dtype layout is_cuda is_floating_point is_complex stride
    is_contiguous get_device is_sparse is_quantized is_meta grad grad_fn is_leaf names len index itemsize
    element_size data_ptr is_inference is_nested is_mkldnn storage_offset
"""
_SILENT_NAMES = frozenset(_SILENT.split())


def couple(
    model: nn.Module, inputs: Sequence[Tensor], exact: bool = False, heads: bool = False
) -> ChannelGraph:
    """Find the channels that must be cut together.

    Takes one forward pass, or two if some parameters are used in training mode only.

    Args:
        model: any module, in any mode; it is not changed.
        inputs: positional arguments of its forward, on its device; one sample suffices.
        exact: freeze widths over which statistics run (layer norm, attention) instead of noting them.
        heads: cut whole attention heads where the code allows it, not the same positions of every head.
    """
    # What chooses boxes has no parameters, and takes what the head puts out, whose width is an output's.
    with before_boxes(model):
        try:
            return _coupled(model, tuple(inputs), exact, heads, widths=True)
        except Exception:  # code that accepts int but no subclass of it may fail in any way
            return _coupled(model, tuple(inputs), exact, heads, widths=False)


def _coupled(
    model: nn.Module, inputs: tuple[Tensor, ...], exact: bool, heads: bool, widths: bool
) -> ChannelGraph:
    ledger = Ledger(model, exact, heads)
    with remembered(model, ledger, heads) if widths else nullcontext():
        _carry(ledger, inputs, training=False, widths=widths)
        note = _carry_training(ledger, inputs, widths) if _unused(ledger) else ""
    return solve(ledger, _unused(ledger), note)


def _carry(ledger: Ledger, inputs: tuple[Tensor, ...], training: bool, widths: bool) -> None:
    for value in tensors_in(inputs):
        ledger.set(value, constant_ids(INPUT, value.shape))

    def observe(event: Event) -> None:
        if event.name in _SILENT_NAMES:
            return
        ledger.begin(event.name, event.module)
        # Before the rule, which may fail: the statistic has to refer to this call in any case.
        _note_factors(ledger, event)
        apply_rule(ledger, event)

    sizes = ledger.sizes if widths else None
    output = execute(ledger.model, inputs, [observe], training=training, sizes=sizes)
    ledger.begin("output", "")
    for result in tensors_in(output):
        if result.ndim:
            ledger.freeze(compact(ledger.of(result)), OUTPUT_WIDTH)


_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "floor_divide", "pow", "float_power"})


def _note_factors(ledger: Ledger, event: Event) -> None:
    """Note arguments that were computed from widths: the call's result depends on them."""
    named: list[tuple[int | str, Any]] = [*enumerate(event.args), *event.kwargs.items()]
    for place, value in named:
        if type(value) is Scale or (type(value) is Width and event.name in _ARITHMETIC):
            ledger.statistic(
                Kind.FACTOR, place, value.powers, "it calculates with a number made of this width"
            )


def _carry_training(ledger: Ledger, inputs: tuple[Tensor, ...], widths: bool) -> str:
    """Bind the parameters of auxiliary heads, which run in training mode only, by a second pass."""
    # Batch norm in training mode refuses a single value per channel.
    doubled = with_tensors(inputs, _at_least_two)
    checkpoint = len(ledger.freezes), len(ledger.ties), dict(ledger.bindings), dict(ledger.attributes)
    noted, equal = len(ledger.statistics), len(ledger.equal_widths)
    note = ""
    try:
        _carry(ledger, doubled, training=True, widths=widths)
    except Exception as error:  # user code may fail in training mode in any way
        # What half a pass has found may be wrong: the ledger goes back to the pass in evaluation mode.
        freezes, ties, ledger.bindings, ledger.attributes = checkpoint
        del ledger.freezes[freezes:], ledger.ties[ties:], ledger.equal_widths[equal:]
        note = f"training mode raises {type(error).__name__}"
    if not ledger.exact:
        # Statistics are found again by the number of their call in evaluation mode, which is verified.
        del ledger.statistics[noted:]
    return note


def _at_least_two(value: Tensor) -> Tensor:
    single = value.ndim and value.shape[0] == 1
    return value.expand(2, *value.shape[1:]) if single else value


def _unused(ledger: Ledger) -> list[str]:
    used = {name for name, _ in ledger.bindings} | set(ledger.elements)
    return [name for name, _ in ledger.model.named_parameters() if name not in used]
