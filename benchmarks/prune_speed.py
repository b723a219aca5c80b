"""Time to trace a network and cut half of every family by l2, against Torch-Pruning 1.6.1 in the same run.

Both do the same work: find the coupled channels, score, choose half of each, cut the module in place. What
cctool does besides (the cut network compared with the masked one at two batch sizes) is timed apart. The two
take turns on fresh copies of one network; the ratio is that of the medians.

    python benchmarks/prune_speed.py [REPEATS]
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import record
from cctool.graph.channels import couple
from cctool.models.registry import build
from cctool.options.prune.choices import PruneMethod, Scope
from cctool.options.prune.options import PruneOptions
from cctool.pruning.cut.planner import thin
from cctool.pruning.cut.surgery import apply_cut, plan_cut
from cctool.pruning.scores.units import score_context
from cctool.pruning.select.order import select

SEED = 0
NETWORKS = ["resnet50", "densenet121", "mobilenet_v2"]
HALF = PruneOptions(method=PruneMethod.L2, rate=0.5, scope=Scope.LOCAL)


def plan_and_cut(model: nn.Module, x: Tensor) -> None:
    graph = couple(model, (x,))
    apply_cut(model, plan_cut(model, graph, select(model, graph, HALF, score_context(model))))


def verified(model: nn.Module, x: Tensor) -> None:
    thin(model, (x,), HALF)


def torch_pruning(model: nn.Module, x: Tensor) -> None:
    import torch_pruning as tp

    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[head],
    ).step()


TOOLS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "cctool": plan_and_cut,
    "cctool_verified": verified,
    "torch_pruning": torch_pruning,
}


def row(name: str, repeats: int) -> dict[str, object]:
    torch.manual_seed(SEED)
    model = build(f"torchvision:{name}", {}).eval()
    x = torch.randn(1, 3, 224, 224)
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    parameters = {}
    for repeat in range(repeats + 1):
        for tool, run in TOOLS.items():
            network = copy.deepcopy(model)
            start = time.perf_counter()
            run(network, x)
            elapsed = time.perf_counter() - start
            parameters[tool] = sum(p.numel() for p in network.parameters())
            if repeat:  # the first turn warms up
                seconds[tool].append(elapsed)
    medians = {tool: statistics.median(times) for tool, times in seconds.items()}
    return {
        "network": name,
        "repeats": repeats,
        "seconds": {tool: round(value, 4) for tool, value in medians.items()},
        "ratio": round(medians["cctool"] / medians["torch_pruning"], 3),
        "ratio_verified": round(medians["cctool_verified"] / medians["torch_pruning"], 3),
        "parameters": parameters,
        "dense_parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would drown the difference
    warnings.simplefilter("ignore")  # Torch-Pruning warns about every parameter that it does not know
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    command = " ".join(["python", "benchmarks/prune_speed.py", *sys.argv[1:]])
    record.write("prune_speed", command, SEED, [row(name, repeats) for name in NETWORKS])


if __name__ == "__main__":
    main()
