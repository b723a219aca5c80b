"""How much of a network's weights is zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["TOTAL", "sparsity"]

TOTAL = "total"
"""Key of the whole network in what `sparsity` returns."""


def sparsity(model: nn.Module) -> Mapping[str, float]:
    """Percentage of exact zeros in each weight of at least two dimensions, and in all of them (``total``).

    Biases and normalisation are left out; tied weights count once.
    """
    weights = {name: value for name, value in model.named_parameters() if value.dim() >= 2}
    zeros = {name: _zeros(value) for name, value in weights.items()}
    elements = sum(value.numel() for value in weights.values())
    shares = {name: 100 * zeros[name] / value.numel() for name, value in weights.items() if value.numel()}
    return shares | {TOTAL: 100 * sum(zeros.values()) / elements if elements else 0.0}


def _zeros(value: Tensor) -> int:
    return int(value.numel() - value.detach().count_nonzero())
