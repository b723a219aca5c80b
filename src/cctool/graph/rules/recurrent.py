"""Rules of recurrent layers: their inputs, and the hidden units, which are rows of every gate of every layer.

A hidden unit whose weights are all 0 stays 0 (in LSTM, GRU and Elman cells), so units can be cut: the rows of
all gates, the columns that read the unit back, and the weights that read the layer's output. All layers and
directions of one module have the same `hidden_size`, so unit u is cut in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cctool.graph.execution import Event, tensors_in
from cctool.graph.ledger import Ledger, Role, varying
from cctool.graph.rules.layers import ids_along, opaque, vector

_UNREAD = "packed sequences and projections of recurrent layers"


def recurrent(ledger: Ledger, event: Event) -> None:
    """`lstm(x, states, weights, has_biases, layers, ...)`, `gru`, `rnn_tanh`, `rnn_relu`."""
    x, states, weights, has_biases, layers = event.args[:5]
    per_layer = 4 if has_biases else 2
    readable = isinstance(weights, (list, tuple)) and isinstance(layers, int)
    if not readable or len(weights) % (per_layer * layers):
        opaque(ledger, event, f"no rule for {_UNREAD}")
        return
    cells = [weights[start : start + per_layer] for start in range(0, len(weights), per_layer)]
    directions = len(cells) // layers
    hidden = _hidden(ledger, event, cells, states)
    if hidden is None:
        return
    arriving = vector(ledger, ledger.of(x), -1)
    ledger.count_in(event.module, "input_size", arriving)
    for number, cell in enumerate(cells):
        first = number < directions
        _bind(ledger, cell, arriving if first else hidden.repeat(directions), hidden)
    output, *last = tensors_in(event.result)
    ledger.set(output, ids_along(hidden.repeat(directions), -1, output.shape))
    for state in last:
        ledger.set(state, ids_along(hidden, -1, state.shape))


def cell(ledger: Ledger, event: Event) -> None:
    """`lstm_cell(x, states, W_ih, W_hh, b_ih, b_hh)`, `gru_cell`, `rnn_tanh_cell`, `rnn_relu_cell`."""
    x, states, *weights = event.args
    weights = [weight for weight in weights if weight is not None]
    hidden = _hidden(ledger, event, [weights], states)
    if hidden is None:
        return
    arriving = vector(ledger, ledger.of(x), -1)
    ledger.count_in(event.module, "input_size", arriving)
    _bind(ledger, weights, arriving, hidden)
    for state in tensors_in(event.result):
        ledger.set(state, ids_along(hidden, -1, state.shape))


def _hidden(ledger: Ledger, event: Event, cells: Sequence[Sequence[Tensor]], states: object) -> Tensor | None:
    """Ids of the hidden units, tied to those of the input states; None if the rule cannot read the call."""
    read_back = cells[0][1]
    size = read_back.shape[1]
    named = all(ledger.name(weight) is not None for weights in cells for weight in weights)
    square = all(weights[1].shape[1] == size == read_back.shape[1] for weights in cells)
    if not named or not square or any(t.shape[-1] != size for t in tensors_in(states)):
        opaque(ledger, event, f"no rule for {_UNREAD}")
        return None
    hidden = ledger.produce(read_back, 1, size)
    for state in tensors_in(states):
        ids = ledger.of(state)
        if varying(ids):  # otherwise zeros, made by the layer or by the network
            ledger.tie(hidden, vector(ledger, ids, -1))
    ledger.count_in(event.module, "hidden_size", hidden)
    return hidden


def _bind(ledger: Ledger, weights: Sequence[Tensor], arriving: Tensor, hidden: Tensor) -> None:
    # The weight stacks the gates: 4 of an LSTM, 3 of a GRU, 1 of an Elman cell.
    gates = hidden.repeat(weights[0].shape[0] // len(hidden))
    for tensor, columns in zip(weights[:2], (arriving, hidden), strict=True):
        ledger.bind(tensor, 1, columns, Role.CONSUMER)
        ledger.bind(tensor, 0, gates, Role.FILTER)
    for bias in weights[2:]:
        ledger.bind(bias, 0, gates, Role.BIAS)
