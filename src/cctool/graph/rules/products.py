"""Rules of products of activations: matrix products, einsum, attention."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

from torch import Tensor

from cctool.graph.execution import Event
from cctool.graph.ledger import FIXED, INPUT, Kind, Ledger, Role, compact, constant_ids, varying
from cctool.graph.rules.layers import ids_along, matmul_parameter, opaque, runs_over
from cctool.graph.trace import argument


def matrix_product(ledger: Ledger, event: Event) -> None:
    """`matmul`, `mm`, `bmm`: with a matrix parameter a linear layer, else see `contract`."""
    a, b = (*event.args, *event.kwargs.values())[:2]
    weight = b if ledger.name(b) is not None or ledger.turned(b) is not None else None
    if weight is not None and weight.ndim == 2 and ledger.name(a) is None and a.ndim > 1:
        matmul_parameter(ledger, event, a, weight, None)
    elif a.ndim < 2 or b.ndim < 2 or ledger.name(a) is not None or weight is not None:
        opaque(ledger, event, f"no rule for `{event.name}` of these operands")
    else:
        batch = ascii_letters[: event.result.ndim - 2]
        left, right = batch[len(batch) - a.ndim + 2 :], batch[len(batch) - b.ndim + 2 :]
        contract(ledger, event, [a, b], [f"{left}XY", f"{right}YZ"], f"{batch}XZ")


def add_matrix_product(ledger: Ledger, event: Event) -> None:
    """`addmm(bias, x, W)` with parameters is a linear layer."""
    bias, x, weight = event.args[:3] if len(event.args) >= 3 else (None, None, None)
    known = isinstance(weight, Tensor) and (ledger.name(weight) or ledger.turned(weight))
    if known and ledger.name(bias) is not None and bias.ndim == 1 and not event.kwargs:
        matmul_parameter(ledger, event, x, weight, bias)
    else:
        opaque(ledger, event, "no rule for `addmm` of these operands")


def add_batched_product(ledger: Ledger, event: Event) -> None:
    """`baddbmm(c, a, b)`: c, which is broadcast, plus the batched product of a and b."""
    added, a, b = event.args[:3]
    letters = "BXZ"[3 - added.ndim :]
    contract(ledger, event, [a, b, added], ["BXY", "BYZ", letters], "BXZ")


def einsum(ledger: Ledger, event: Event) -> None:
    """`einsum` with an equation, with or without an ellipsis and an arrow."""
    equation, operands = event.args[0], list(event.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    written, arrow, output = equation.replace(" ", "").partition("->")
    terms = written.split(",")
    spare = [letter for letter in ascii_letters if letter not in equation]
    terms = [_spelled(term, tensor.ndim, spare) for term, tensor in zip(terms, operands, strict=True)]
    if not arrow:
        joined = "".join(terms)
        output = "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    contract(ledger, event, operands, terms, _spelled(output, event.result.ndim, spare))


def _spelled(term: str, ndim: int, spare: Sequence[str]) -> str:
    """A term with its ellipsis replaced by letters, aligned at the right as in broadcasting."""
    missing = ndim - len(term.replace("...", ""))
    return term.replace("...", "".join(spare[:missing][::-1]))


def contract(
    ledger: Ledger, event: Event, operands: Sequence[Tensor], terms: Sequence[str], output: str
) -> None:
    """A sum of products, its dims named by letters as in einsum.

    Channels that several operands have at one letter are tied; a letter that is summed over is not in the
    output. A parameter among the operands is a layer: it reads at the letters that it shares with other
    operands, and its remaining letters are output channels.
    """
    letters: dict[str, Tensor] = {}
    arriving: list[tuple[str, Tensor]] = []
    for tensor, term in zip(operands, terms, strict=True):
        if ledger.name(tensor) is not None and not ledger.known(tensor):
            continue
        ids = ledger.of(tensor)
        if len(varying(ids)) > 1 or len(set(term)) < len(term):
            opaque(ledger, event, f"`{event.name}` mixes channels that lie in several dims")
            return
        arriving.append((term, ids))
        letters.update({term[dim]: compact(ids).reshape(-1) for dim in varying(ids)})
    for term, ids in arriving:
        for dim, letter in enumerate(term):
            if letter in letters and ids.shape[dim] > 1:
                fixed = constant_ids(FIXED, (ids.shape[dim],))
                ledger.tie(letters[letter], compact(ids).reshape(-1) if dim in varying(ids) else fixed)
    for tensor, term in zip(operands, terms, strict=True):
        if ledger.name(tensor) is not None and not ledger.known(tensor):
            _layer(ledger, tensor, term, letters, {x for other, _ in arriving for x in other}, output)
    sent = [letter for letter in output if letter in letters]
    if len(sent) > 1:
        for letter in sent:
            ledger.freeze(letters[letter], f"`{event.name}` sends out channels in several dims")
    if len(sent) == 1:
        ids = ids_along(letters[sent[0]], output.index(sent[0]), event.result.shape)
    else:
        ids = constant_ids(FIXED if len(sent) > 1 else _single(arriving, letters), event.result.shape)
    ledger.set(event.result, ids)


def _single(arriving: Sequence[tuple[str, Tensor]], letters: dict[str, Tensor]) -> int:
    """Id of a product without channel dims: that of the single input channel, if there is one."""
    values = [int(compact(ids).reshape(-1)[0]) for _, ids in arriving if not varying(ids)]
    return max((value for value in values if value > INPUT), default=FIXED)


def _layer(
    ledger: Ledger, weight: Tensor, term: str, letters: dict[str, Tensor], shared: set[str], output: str
) -> None:
    for dim, letter in enumerate(term):
        if letter in output and letter not in shared:
            letters[letter] = ledger.produce(weight, dim, weight.shape[dim])
            ledger.bind(weight, dim, letters[letter], Role.FILTER)
        else:
            fixed = constant_ids(FIXED, (weight.shape[dim],))
            ledger.bind(weight, dim, letters.get(letter, fixed).reshape(-1), Role.CONSUMER)


def attention(ledger: Ledger, event: Event) -> None:
    """`scaled_dot_product_attention`: two products; scores are divided by the root of the query's width."""
    query, key, value = (argument(event, name) for name in ("query", "key", "value"))
    mask, scale = argument(event, "attn_mask"), event.kwargs.get("scale", _at(event.args, 6))
    if event.kwargs.get("enable_gqa", _at(event.args, 7)):
        opaque(ledger, event, "attention with grouped queries")
        return
    batch = ascii_letters[: event.result.ndim - 2]
    terms = [
        batch[len(batch) - t.ndim + 2 :] + tail for t, tail in ((query, "XD"), (key, "YD"), (value, "YE"))
    ]
    operands = [query, key, value]
    if mask is not None:
        letters = f"{batch}XY"
        terms, operands = [*terms, letters[len(letters) - mask.ndim :]], [*operands, mask]
    ids = ledger.of(query)
    contract(ledger, event, operands, terms, f"{batch}XE")
    if scale is None and varying(ids) == [ids.ndim - 1]:
        reason = "its scores are divided by the square root of this width"
        runs_over(ledger, ids.ndim - 1, compact(ids).reshape(-1), Kind.SCALE, reason)


def _at(arguments: Sequence[Any], position: int) -> Any:
    return arguments[position] if len(arguments) > position else None
