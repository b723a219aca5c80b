"""The masked network whose statistics run over the kept channels, made without the plan under test.

Every vector of the network has values of which no two are equal, so that those that the cut network lacks
tell which channels each module lost. In a copy of the dense network the rows of these channels are set to
zero; layer norms compute over the kept channels, by a hook; attention that divides its scores by the square
root of its width gets its queries (the first third of what computes them) scaled for the kept width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_ROWS = (nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def lost(dense: Tensor, cut: Tensor) -> Tensor:
    """Indices of the values that are missing."""
    missing = ~torch.isin(dense.flatten(), cut.flatten())
    assert int(missing.sum()) == dense.numel() - cut.numel()
    return missing.nonzero().flatten()


@torch.no_grad()
def masked(dense: nn.Module, cut: nn.Module, queries: Sequence[str] = ()) -> nn.Module:
    """The masked copy of a network.

    Args:
        dense: the network before the cut.
        cut: the network after it.
        queries: names of the modules whose attention scores are divided by the square root of their width:
            linear layers that send out queries, keys and values, or `nn.MultiheadAttention`.
    """
    result = copy.deepcopy(dense)
    small = dict(cut.named_modules())
    for name, module in result.named_modules():
        other = small[name]
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(_over_kept(lost(module.weight, other.weight)))
        elif isinstance(module, nn.MultiheadAttention):
            gone = lost(module.in_proj_bias, other.in_proj_bias)
            module.in_proj_weight[gone], module.in_proj_bias[gone] = 0, 0
        elif isinstance(module, (*_ROWS, *_NORMS)):
            mark = "bias" if isinstance(module, _ROWS) and module.bias is not None else "weight"
            if mark == "bias" or module.weight.ndim == 1:
                gone = lost(getattr(module, mark), getattr(other, mark))
                module.weight[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0
        else:
            _zero_loose(module, other)
    for name in queries:
        module, other = result.get_submodule(name), small[name]
        packed = isinstance(module, nn.MultiheadAttention)
        weight = module.in_proj_weight if packed else module.weight
        bias = module.in_proj_bias if packed else module.bias
        left = other.in_proj_bias if packed else other.bias
        third = len(bias) // 3
        weight[:third] *= (len(bias) / len(left)) ** 0.5
        bias[:third] *= (len(bias) / len(left)) ** 0.5
    return result


def _zero_loose(module: nn.Module, other: nn.Module) -> None:
    """Tokens, position embeddings and layer scales: their channels lie in the dim whose size differs."""
    for name, tensor in module.named_parameters(recurse=False):
        small = getattr(other, name)
        for dim in range(tensor.ndim):
            if tensor.shape[dim] != small.shape[dim]:
                marks = [t.movedim(dim, 0).flatten(1)[:, 0] if t.ndim > 1 else t for t in (tensor, small)]
                tensor.index_fill_(dim, lost(*marks), 0)


def _over_kept(gone: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        first = type(module) is not nn.LayerNorm  # torchvision's LayerNorm2d normalises over dim 1
        x = args[0].movedim(1, -1) if first else args[0]
        kept = torch.ones(x.shape[-1], dtype=torch.bool)
        kept[gone] = False
        mean = x[..., kept].mean(-1, keepdim=True)
        variance = (x[..., kept] - mean).square().mean(-1, keepdim=True)
        normed = (x - mean) / (variance + module.eps).sqrt() * module.weight + module.bias
        result = torch.where(kept, normed, 0)
        return result.movedim(-1, 1) if first else result

    return hook
