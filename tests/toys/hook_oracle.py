"""Cut == masked for networks of any layers, inputs and outputs, the masks made by hooks alone.

As `masking_oracle.py`, which knows the layers of classifiers: every vector of the network gets values of
which no two are equal, the values that the cut network lacks tell which channels each module lost, and hooks
on the dense network set these channels of the module's output to zero. Nothing here knows of graphs or plans.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cctool.options.prune.choices import PruneMethod, Scope
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import thin
from cctool.pruning.cut.report import PruneReport

HALF = PruneOptions(method=PruneMethod.L2, rate=0.5, scope=Scope.LOCAL)
TOLERANCE = 1e-9  # of the spread over the batch, in float64

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_MARK = {"bias": (nn.modules.conv._ConvNd, nn.Linear), "weight": (*_NORMS, nn.PReLU, nn.Embedding)}


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors_of([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from tensors_of(item)


def distinct(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, and values in every vector of which no two are equal; weights keep the signal's size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.double().named_parameters(), *model.named_buffers()]:
            leaf = name.rpartition(".")[2]
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 1:
                positive = leaf in ("weight", "running_var", "var")
                tensor.copy_(
                    torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    + (0.5 if positive else -0.5)
                )
            elif tensor.ndim > 1 and isinstance(tensor, nn.Parameter):
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn * (2 / tensor[0].numel()) ** 0.5)
    return model


def lost_channels(dense: nn.Module, cut: nn.Module) -> dict[str, Tensor]:
    """Output channels that each module lost, told by the values that are missing."""
    lost, small = {}, dict(cut.named_modules())
    for name, module in dense.named_modules():
        for leaf, kinds in _MARK.items():
            if not isinstance(module, kinds):
                continue
            mine, theirs = getattr(module, leaf, None), getattr(small[name], leaf, None)
            if mine is None and isinstance(module, nn.modules.batchnorm._NormBase):
                mine, theirs = module.running_mean, small[name].running_mean
            if mine is not None and mine.ndim == 2:  # an embedding: the first row marks the columns
                mine, theirs = mine[0], theirs[0]
            if mine is not None and theirs is not None:
                lost[name] = (~torch.isin(mine, theirs)).nonzero().flatten()
    return lost


@torch.no_grad()
def run(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Tensors of the output in evaluation mode."""
    return list(tensors_of(model.eval()(*inputs)))


def masked(dense: nn.Module, lost: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs of the dense network with the lost channels of each module's output set to zero."""
    network = copy.deepcopy(dense)
    for name, module in network.named_modules():
        if name in lost:
            dim = -1 if isinstance(module, (nn.Linear, nn.Embedding)) else 1
            module.register_forward_hook(
                lambda module, args, output, dim=dim, gone=lost[name]: output.index_fill(dim, gone, 0)
            )
    return run(network, inputs)


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Largest difference over the spread of what is expected across the batch, of all outputs."""
    expected, actual = [t.detach() for t in expected], [t.detach() for t in actual]
    assert [t.shape for t in expected] == [t.shape for t in actual]
    spreads = [float((e - e.mean(dim=0)).abs().max()) for e in expected]
    assert min(spreads) > 1e-6, "an output does not look at the input"
    return max(float((e - a).abs().max()) / s for e, a, s in zip(expected, actual, spreads, strict=True))


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def check_exact(
    model: nn.Module, inputs: Sequence[Tensor], below: float, options: PruneOptions = HALF
) -> tuple[nn.Module, PruneReport]:
    """Cut half of every family: exactly, below a fraction of the parameters; train a step, cut again.

    Args:
        model: any network.
        inputs: arguments of its forward.
        below: fraction of the parameters that has to be undercut.
        options: of the pruning.

    Returns:
        The cut network and the report.
    """
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    distinct(model)
    dense_outputs = run(model, inputs)
    cut = copy.deepcopy(model)
    report = thin(cut, inputs, options).report
    assert not report.notes
    assert count(cut) < below * count(model)
    outputs = run(cut, inputs)
    assert difference(masked(model, lost_channels(model, cut), inputs), outputs) < TOLERANCE
    assert difference(dense_outputs, outputs) > 1e-3
    again = copy.deepcopy(cut)
    result = again.train()(*inputs)
    sum(tensor.square().mean() for tensor in tensors_of(result)).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in again.parameters())
    thin(again, inputs, options)
    assert count(again) < count(cut)
    assert [t.shape for t in run(again, inputs)] == [t.shape for t in outputs]
    return cut, report
