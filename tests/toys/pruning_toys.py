"""Steps of a pruning that commands take apart, each in one call."""

from __future__ import annotations

import torch
from torch import nn

from cctool.graph.records import ChannelGraph
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.surgery import named_tensors, places_removed, zeroed
from cctool.pruning.scores.criteria import ScoreContext
from cctool.pruning.scores.units import score_families
from cctool.pruning.select.order import Selection, by_options, candidates, select_counts


@torch.no_grad()
def mask(model: nn.Module, graph: ChannelGraph, selection: Selection) -> None:
    """Zero in place all that the removed units touch; shapes stay."""
    tensors = dict(named_tensors(model))
    for name, places in places_removed(graph, selection).items():
        tensors[name].copy_(zeroed(tensors[name], places))


def select(
    model: nn.Module, graph: ChannelGraph, options: PruneOptions, context: ScoreContext, step: int = 1
) -> Selection:
    """Score, find the candidates and keep as many units of each as the options say."""
    chosen = candidates(model, graph, score_families(graph, options, context), options)
    return select_counts(graph, chosen, by_options(graph, chosen, options, step), options)
