"""How much of each architecture can be cut, and what freezes the rest; Torch-Pruning's share beside it.

A weight counts as removable when some unit that may go owns it: all but the output's own bias and the bits
between fixed channels. Both tools are counted in the same way, from the dense network.

    python benchmarks/prune_table.py
"""

from __future__ import annotations

import copy
import time
import warnings

import torch
from torch import Tensor, nn

import record
from cctool.graph.channels import couple
from cctool.graph.records import ChannelGraph
from cctool.models.registry import build, input_shape

SEED = 0
OWN = [
    "lenet", "alexnet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "preact_resnet20",
    "vgg11", "vgg16", "vgg19", "densenet40", "mobilenet_student",
]  # fmt: skip
FOREIGN = ["torchvision:" + name for name in ("resnet18", "mobilenet_v2", "densenet121", "googlenet")]


def removable(model: nn.Module, graph: ChannelGraph) -> int:
    """Parameters that some removable unit owns."""
    free = torch.zeros(graph.label_count, dtype=torch.bool)
    for family in graph.families:
        if family.units > 1:
            free[family.labels] = True
    marked = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for entry in graph.tensors:
        if entry.name in marked:
            mark(marked[entry.name], int(entry.key), free[entry.labels].nonzero().flatten())
    return sum(int(mask.sum()) for mask in marked.values())


def mark(mask: Tensor, dim: int, indices: Tensor) -> None:
    mask.index_fill_(dim, indices, True)


def removable_by_torch_pruning(
    model: nn.Module, x: Tensor, heads: list[nn.Module] | None = None
) -> tuple[int, int]:
    """The same count from Torch-Pruning's groups, the output layers ignored; and the number of groups.

    Without `heads` the last linear layer counts as the output layer.
    """
    import torch_pruning as tp

    if heads is None:
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    marked = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in model.parameters()}
    count = 0
    types = [tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR]
    for group in graph.get_all_groups(ignored_layers=heads, root_module_types=types):
        count += 1
        for dependency, indices in group:
            layer = dependency.target.module
            if not isinstance(layer, nn.Module) or len(indices) < 2:
                continue
            out = graph.is_out_channel_pruning_fn(dependency.handler)
            turned = isinstance(layer, nn.ConvTranspose2d)
            for name, parameter in layer.named_parameters(recurse=False):
                if name == "weight" and parameter.ndim > 1:
                    dim = int(out == turned)
                    if parameter.shape[dim] >= max(indices) + 1:
                        mark(marked[id(parameter)], dim, torch.tensor(indices))
                elif out or (parameter.ndim == 1 and not isinstance(layer, (nn.Linear, nn.Conv2d))):
                    mark(marked[id(parameter)], 0, torch.tensor(indices))
    return sum(int(mask.sum()) for mask in marked.values()), count


def row(name: str) -> dict[str, object]:
    torch.manual_seed(SEED)
    arguments = {"init_weights": False} if name.endswith("googlenet") else {}
    model = build(name, arguments).eval()
    x = torch.randn(1, *input_shape(name, arguments))
    total = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    graph = couple(model, (x,))
    seconds = time.perf_counter() - start
    theirs, groups = removable_by_torch_pruning(copy.deepcopy(model), x)
    frozen = [
        {
            "parameter": f.parameter,
            "dim": f.dim,
            "indices": f.indices,
            "of": f.of,
            "op": f.op,
            "module": f.module,
            "reason": f.reason,
        }
        for f in graph.frozen
    ]
    return {
        "architecture": name,
        "parameters": total,
        "families": len(graph.families),
        "units": sum(family.units for family in graph.families),
        "seconds": round(seconds, 3),
        "removable": round(removable(model, graph) / total, 6),
        "torch_pruning_removable": round(theirs / total, 6),
        "torch_pruning_groups": groups,
        "frozen": frozen,
    }


def main() -> None:
    warnings.simplefilter("ignore")  # Torch-Pruning warns about every parameter that it does not know
    record.write("prune_table", "python benchmarks/prune_table.py", SEED, [row(n) for n in OWN + FOREIGN])


if __name__ == "__main__":
    main()
