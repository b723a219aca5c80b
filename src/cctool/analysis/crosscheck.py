"""A comparison of our counts with thop's, and why they differ.

thop 0.1.1 counts by forward hooks on module classes. It leaves buffers on the model and prints, so it runs on
a copy, with stdout redirected. The conventions stated for each kind were read from its code; differences that
they do not explain are listed by layer.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from cctool.analysis.layers import ROOT
from cctool.base.networks import copied, some
from cctool.graph.cost import ModelCost
from cctool.graph.cost_rules import Cost


@dataclass(frozen=True)
class CrossCheckLine:
    """One kind of operation.

    Attributes:
        kind: what is counted.
        ours: operations as we count them.
        thop: operations as thop counts them.
        explanation: why they differ; empty if they do not.
    """

    kind: str
    ours: int
    thop: int
    explanation: str


@dataclass(frozen=True)
class CrossCheck:
    """thop's figures.

    Attributes:
        total: thop's total, which mixes multiply-accumulates with element operations; None if it failed.
        lines: the same by kind; the sum of their `thop` is `total`.
        failure: why thop could not count this network, if it failed.
    """

    total: int | None
    lines: tuple[CrossCheckLine, ...] = ()
    failure: str | None = None


_ACTIVATIONS = (nn.PReLU, nn.Softmax, nn.LeakyReLU, nn.ReLU)
_POOLS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample,
)  # fmt: skip
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

_PRODUCTS, _MATMUL, _NORM, _ACTIVATION, _POOLING, _ELEMENTWISE, _OTHER = (
    "convolution and linear",
    "attention and matmul",
    "norm",
    "activation",
    "pooling",
    "elementwise",
    "recurrent",
)

_REASONS = {
    _MATMUL: "thop hooks modules, so products of activations are invisible to it",
    _NORM: "we count one operation an element (batch norm folds into its convolution), thop two, and four "
    "where the norm has weights",
    _ACTIVATION: "we count one operation an element; thop none for ReLU and its kin, 3 n - 1 for a softmax "
    "over n",
    _POOLING: "we count every element that is read; thop none for max pooling, one an output for average "
    "pooling, one an element and one an output for adaptive pooling, 11 an output for bilinear resampling",
    _ELEMENTWISE: "thop hooks modules, so additions and products in `forward` are invisible to it",
    _OTHER: "we have no rule for recurrent layers, see what was not counted",
}


def check_against_thop(model: nn.Module, input_shape: tuple[int, ...], cost: ModelCost) -> CrossCheck:
    """Count a network with thop and explain the difference.

    Args:
        model: it is not changed.
        input_shape: (C, H, W).
        cost: our counts of the same input.
    """
    try:
        total, found = _run_thop(model, input_shape)
    # thop, its hooks and deep copies may fail in any way: the table must not fail with the cross-check.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return CrossCheck(None, failure=f"thop failed: {type(error).__name__}: {text}")
    by_kind = dict.fromkeys((_PRODUCTS, *_REASONS), 0)  # in the order of the table
    for name, operations in found.items():
        by_kind[_kind(model.get_submodule(name))] += operations
    ours = _ours(cost.total)
    lines = [
        CrossCheckLine(
            kind, ours[kind], by_kind[kind], _explain(kind, ours[kind], by_kind[kind], model, found, cost)
        )
        for kind in by_kind
        if ours[kind] or by_kind[kind]
    ]
    return CrossCheck(total, tuple(lines))


def _ours(total: Cost) -> dict[str, int]:
    return {
        _PRODUCTS: total.macs,
        _MATMUL: total.matmul_macs,
        _NORM: total.norm_ops,
        _ACTIVATION: total.activation_ops,
        _POOLING: total.pooling_ops,
        _ELEMENTWISE: total.elementwise_ops,
        _OTHER: 0,
    }


def _run_thop(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """Returns thop's total, and its operations by qualified name of the modules that it hooks."""
    with _silent():
        import thop

        duplicate = copied(model).eval()
        example = next(duplicate.parameters(), torch.empty(0))
        inputs = torch.zeros(1, *input_shape, device=example.device, dtype=example.dtype)
        total, _, layers = thop.profile(duplicate, inputs=(inputs,), verbose=False, ret_layer_info=True)
    found = {name: round(operations) for name, operations in _walk(layers, "")}
    # The total also has what thop counts for the root module itself.
    rest = round(total) - sum(found.values())
    return round(total), found | ({"": rest} if rest else {})


def _walk(layers: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, (operations, _, children) in layers.items():
        if children:
            yield from _walk(children, f"{prefix}{name}.")
        elif operations:
            yield f"{prefix}{name}", operations


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(sink):
            yield


def _kind(module: nn.Module) -> str:
    if isinstance(module, (_NormBase, nn.LayerNorm)):
        return _NORM
    if isinstance(module, _ACTIVATIONS):
        return _ACTIVATION
    if isinstance(module, _POOLS):
        return _POOLING
    return _OTHER if isinstance(module, _RECURRENT) else _PRODUCTS


def _explain(
    kind: str, ours: int, thop: int, model: nn.Module, found: Mapping[str, int], cost: ModelCost
) -> str:
    if ours == thop:
        return ""
    if kind != _PRODUCTS:
        return _REASONS[kind]
    reasons = []
    macs = {name: sum(call.cost.macs for call in calls) for name, calls in cost.by_module().items()}
    differing = [name for name, count in macs.items() if count and count != found.get(name, 0)]
    unseen = [name for name in differing if name not in found]
    transposed = [
        name
        for name in differing
        if name in found and isinstance(model.get_submodule(name), _ConvTransposeNd)
    ]
    rest = [name for name in differing if name not in unseen and name not in transposed]
    if unseen:
        reasons.append(
            f"{sum(macs[name] for name in unseen):,} MACs are invisible to thop, which hooks modules of "
            f"known classes only, not functions, raw parameters or attention's projections: {_listed(unseen)}"
        )
    if transposed:
        reasons.append(
            "for transposed convolutions thop multiplies the kernel with the output's size instead of the "
            f"input's: {_listed(transposed)}"
        )
    if rest:
        reasons.append("counted differently: " + some([f"{n} ({macs[n]:,} and {found[n]:,})" for n in rest]))
    twice = [
        name
        for name in found
        if name not in macs and isinstance(model.get_submodule(name), (_ConvNd, nn.Linear))
    ]
    if twice:
        reasons.append(f"thop adds a shared module at every place that holds it: {_listed(twice)}")
    return "; ".join(reasons)


def _listed(names: list[str]) -> str:
    return some([name or ROOT for name in names])
