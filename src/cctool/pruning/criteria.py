"""The formulas by which units and weights are ranked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.errors import UsageError
from cctool.options.prune_choices import PruneMethod
from cctool.pruning.evidence import Evidence


@dataclass(frozen=True)
class Unscored:
    """The method cannot rank a family or a tensor, and why."""

    reason: str


def require_evidence(method: PruneMethod, evidence: Evidence | None) -> Evidence:
    """Evidence that was gathered for a method.

    Raises:
        UsageError: there is none, or it was gathered for another method.
    """
    if evidence is None:
        raise UsageError(
            f"--method {method.value} looks at training images: name them with --data, as in "
            "--data digits or --data folder:DIR"
        )
    if evidence.method is not method:
        raise UsageError(f"--method {method.value} was given the evidence of {evidence.method.value}")
    return evidence


def lamp(squares: Tensor) -> Tensor:
    """Score of each entry: its square over the sum of the squares of all that are not smaller.

    Lee et al. 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611, equation 1.
    Among equal entries the earlier one counts as the smaller. An entry behind which all is 0 scores 0.

    Args:
        squares: squared magnitudes; shape [n], at least 0.

    Returns:
        Shape [n], in [0, 1]; the largest entry scores 1 unless all are 0.

    >>> lamp(torch.tensor([1.0, 4.0, 5.0]))
    tensor([0.1000, 0.4444, 1.0000])
    """
    ordered, order = torch.sort(squares, stable=True)
    behind = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(ordered)
    scores[order] = ordered / behind.clamp_min(torch.finfo(ordered.dtype).tiny)
    return scores
