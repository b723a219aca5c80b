"""Is the cut network the masked one? An oracle that knows nothing of graphs and plans.

Before the cut every vector (bias, scale, shift, running mean) gets values of which no two are equal. The
values that a vector of the cut network lacks tell which channels its module lost; these channels are set to
zero in the dense network: the rows of the module's weights, its scales and shifts. Layer norms compute their
statistics over the kept channels by a hook, and attention that divides by the square root of its width gets
its queries scaled for the kept width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every vector and every small layer scale values of which no two are equal; in place."""
    generator = torch.Generator().manual_seed(seed)

    def distinct(count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.randperm(count, generator=generator).float() / count

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            leaf, long = name.rpartition(".")[2], max(tensor.shape, default=1)
            if tensor.ndim > 1 and tensor.is_floating_point() and not bool(tensor.any()):
                # a head of zeros, as some networks start with, would make every output equal
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
            if not tensor.is_floating_point() or tensor.numel() != long or long == 1:
                continue
            scale = leaf in ("weight", "running_var", "layer_scale", "gamma")
            low, high = (0.5, 1.5) if scale else (-0.1, 0.1)
            tensor.copy_(distinct(long, low, high).view(tensor.shape))


def _lost(dense: Tensor, cut: Tensor) -> Tensor:
    """Indices of the values that are missing."""
    return (~torch.isin(dense.flatten(), cut.flatten())).nonzero().flatten()


def _lost_rows(dense: Tensor, cut: Tensor) -> Tensor:
    """Filters that hold the values of no filter of the cut weight, which may lack input channels.

    Several values are looked for, as single ones may appear twice among millions.
    """
    rows, found = dense.flatten(1), torch.ones(len(dense), dtype=torch.bool)
    small = cut.flatten(1)
    if len(rows) == len(small):
        return torch.zeros(0, dtype=torch.long)
    for column in torch.linspace(0, small.shape[1] - 1, 8).long().unique():
        values = small[:, column]
        # The place of one value tells which column of the dense weight this one was.
        places = (rows == values[0]).nonzero()[:, 1]
        whole = next(rows[:, place] for place in places if torch.isin(values, rows[:, place]).all())
        found &= torch.isin(whole, values)
    return (~found).nonzero().flatten()


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


@torch.no_grad()
def mask(dense: nn.Module, cut: nn.Module) -> list[Any]:
    """Zero in place what the cut network lacks; returns the handles of the hooks.

    Args:
        dense: a network that was randomised as the cut one was before its cut.
        cut: the cut network.
    """
    handles = []
    small = dict(cut.named_modules())
    for name, module in dense.named_modules():
        mine, theirs = _own(module), _own(small[name])
        if isinstance(module, nn.LayerNorm) and "weight" in mine:
            lost = _lost(mine["weight"], theirs["weight"])
            if len(lost):
                handles.append(module.register_forward_hook(_layer_norm(lost)))
        elif isinstance(module, nn.MultiheadAttention):
            _mask_attention(module, small[name])
        elif isinstance(module, nn.Conv1d) and module.weight.shape[:2] == (1, 1):
            handles.append(module.register_forward_hook(_slides_over_kept))
        else:
            _mask_module(module, mine, theirs)
    for name, module in dense.named_modules():
        if type(module).__name__ == "ShiftedWindowAttention":
            _scale(module.qkv.weight, module.qkv.bias, small[name].qkv.bias.numel())
    return handles


def _mask_module(module: nn.Module, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if isinstance(module, (*_LAYERS, *_BATCH_NORMS)):
        mark = "bias" if isinstance(module, _LAYERS) else "weight"
        if mine.get("weight") is None:
            return
        lost = (
            _lost(mine[mark], theirs[mark]) if mark in mine else _lost_rows(mine["weight"], theirs["weight"])
        )
        for leaf in ("weight", "bias"):
            if mine.get(leaf) is not None:
                mine[leaf].index_fill_(0, lost, 0)
        return
    for leaf, tensor in mine.items():
        # tokens and position embeddings lie along the last dim, layer scales along their only long one
        dims = [d for d in range(tensor.ndim) if tensor.shape[d] != theirs[leaf].shape[d]]
        for dim in dims:
            first = tensor.movedim(dim, 0).flatten(1)[:, 0] if tensor.ndim > 1 else tensor
            other = theirs[leaf].movedim(dim, 0).flatten(1)[:, 0] if tensor.ndim > 1 else theirs[leaf]
            tensor.index_fill_(dim, _lost(first, other), 0)


def _layer_norm(lost: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.LayerNorm, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # torchvision's LayerNorm2d normalises over dim 1
        first = args[0].shape[-1] != module.weight.numel()
        x = args[0].movedim(1, -1) if first else args[0]
        kept = torch.ones(x.shape[-1], dtype=torch.bool)
        kept[lost] = False
        chosen = x[..., kept]
        centred = chosen - chosen.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        result = torch.zeros_like(x)
        result[..., kept] = normed * module.weight[kept] + module.bias[kept]
        return result.movedim(-1, 1) if first else result

    return hook


def _slides_over_kept(module: nn.Conv1d, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A kernel that slides over channels (ECA): masked ones, which are exactly 0, are left out."""
    kept = args[0].flatten(0, -2).abs().sum(0) != 0
    result = torch.zeros_like(output)
    result[..., kept] = module._conv_forward(args[0][..., kept], module.weight, module.bias)
    return result


def _mask_attention(module: nn.MultiheadAttention, cut: nn.MultiheadAttention) -> None:
    lost = _lost(module.in_proj_bias, cut.in_proj_bias)
    module.in_proj_weight.index_fill_(0, lost, 0)
    module.in_proj_bias.index_fill_(0, lost, 0)
    _scale(module.in_proj_weight, module.in_proj_bias, cut.in_proj_bias.numel())


def _scale(weight: Tensor, bias: Tensor, kept: int) -> None:
    """Scale the queries, the first third, by sqrt(width / kept width): scores are divided by sqrt(width)."""
    factor = (bias.numel() / kept) ** 0.5
    weight[: len(bias) // 3] *= factor
    bias[: len(bias) // 3] *= factor
