"""A trained ResNet-20 slimmed to half its MACs and fine-tuned, against Torch-Pruning's BNScale pruner.

Both start from the same file and run the same phases with the same loop, images, augmentation and seeds:
sparse training with an L1 penalty on the batch-norm scales, the cut, fine-tuning. What differs is each tool's
own: the penalty's code, which channels count as the least, and the surgery. The peer goes first, in small
steps, until its MACs are at most half; cctool then removes the fewest units that leave no more MACs than
that. MACs are counted by cctool's counter for both. Accuracy is top-1 on all test images.

    python benchmarks/slimming.py --weights resnet20.pth --data cifar10:DIR
"""

from __future__ import annotations

import argparse
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import record
from cctool.base.runtime import Reporter, Silent, resolve_device, seed_everything
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.data.records import DataSource
from cctool.data.registry import open_data
from cctool.graph.cost import measure
from cctool.operations.context import Context
from cctool.operations.data import measured
from cctool.operations.opening import open_checkpoint
from cctool.operations.prune.sparse_training import sparsified
from cctool.operations.registries import tables
from cctool.operations.train.finetune import finetune
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.prune.choices import PruneMethod, Sparsifier
from cctool.options.prune.options import PruneOptions, SparsifyOptions
from cctool.options.train.fit import FitOptions
from cctool.pruning.cut.planner import plan_thinning, thin
from cctool.pruning.cut.surgery import apply_cut
from cctool.training.constraints.base import Constraint

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PEER_STEPS = 400  # as in Torch-Pruning's own scripts that prune to a speed-up


class Aloud(Silent):
    """Says on stdout how far a run of an hour has come."""

    def note(self, text: str) -> None:
        """Say something, and when."""
        print(f"# {time.strftime('%H:%M:%S')} {text}", flush=True)


class PeerPenalty(Constraint):
    """Torch-Pruning's regularizer, called where its documentation calls it: before the optimizer's step."""

    def __init__(self, pruner: object, model: nn.Module) -> None:
        self.pruner, self.model = pruner, model

    def gradients(self) -> None:
        """Add the subgradients of the penalty."""
        self.pruner.regularize(self.model)  # type: ignore[attr-defined]


class Run:
    """What both tools share in one run: the network, the data, the phases' settings."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments = arguments
        self.reporter: Reporter = Aloud()
        device = resolve_device(arguments.device)
        self.context = Context(
            device=device,
            runtime=RuntimeOptions(device=arguments.device, seed=seed),
            model_options=ModelOptions(),
            tables=tables(),
            user_code=frozenset(),
            reporter=self.reporter,
            output=Path("none.pt"),
            force=False,
            stamp=lambda outcome: outcome.checkpoint,
        )
        self.data = DataOptions(data=arguments.data, batch_size=arguments.batch_size)
        named = ModelOptions(arch="resnet20", mean=MEAN, std=STD)
        self.checkpoint = open_checkpoint(
            Path(arguments.weights), named, self.context.tables, frozenset(), Silent()
        )
        self.checkpoint.model.to(device)
        self.source: DataSource = open_data(arguments.data, input_shape=self.checkpoint.spec.input_shape)

    def fresh(self) -> Checkpoint:
        """The trained network again, every generator at its seed."""
        seed_everything(self.context.runtime.seed)
        return replace(self.checkpoint, model=deepcopy(self.checkpoint.model))

    def fit_options(self, epochs: int, lr: float) -> FitOptions:
        """SGD with momentum, cosine, and the defaults of `cctool train`."""
        return FitOptions(epochs=epochs, optimizer="sgd", lr=lr)

    def macs(self, model: nn.Module) -> int:
        """Multiply-accumulates of one image."""
        return measure(model, self.checkpoint.spec.input_shape).total.macs

    def accuracy(self, checkpoint: Checkpoint) -> float:
        """Top-1 on the test split, in percent."""
        checkpoint.model.eval()
        found = round(measured(checkpoint, self.source, self.data, self.context).values["top1"], 2)
        self.reporter.note(f"{found} % at {self.macs(checkpoint.model):,} MACs")
        return found

    def finetuned(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same network after the last phase; the best epoch by validation counts."""
        options = self.fit_options(self.arguments.epochs, self.arguments.lr)
        return finetune(checkpoint, self.source, options, self.data, self.context)

    def example(self) -> torch.Tensor:
        """Two random images."""
        return torch.randn(2, *self.checkpoint.spec.input_shape, device=self.context.device)


def torch_pruning(run: Run) -> dict[str, object]:
    import torch_pruning as tp

    start = run.fresh()
    model, limit = start.model, run.macs(start.model) // 2

    def pruner() -> object:
        return tp.pruner.BNScalePruner(
            model,
            run.example()[:1],
            importance=tp.importance.BNScaleImportance(),
            reg=run.arguments.strength,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=PEER_STEPS,
            ignored_layers=[model.fc],
        )

    penalty = PeerPenalty(pruner(), model)
    options = run.fit_options(run.arguments.sparse_epochs, run.arguments.sparse_lr)
    sparse = finetune(
        start, run.source, options, run.data, run.context, constraints=(penalty,), choose_best=False
    )
    result: dict[str, object] = {"after_sparse_training": run.accuracy(sparse)}
    model.eval()
    cutting = pruner()
    while run.macs(model) > limit:
        cutting.step()  # type: ignore[attr-defined]
    return result | _finish(run, sparse)


def cctool(run: Run, limit: int) -> dict[str, object]:
    start = run.fresh()
    sparsify = SparsifyOptions(
        Sparsifier.GAMMA_L1,
        epochs=run.arguments.sparse_epochs,
        strength=run.arguments.strength,
        lr=run.arguments.sparse_lr,
    )
    options = PruneOptions(method=PruneMethod.SLIMMING, rate=0.5, sparsify=sparsify, optimizer="sgd")
    sparse = sparsified(start, run.source, options, run.context)
    result: dict[str, object] = {"after_sparse_training": run.accuracy(sparse)}
    rate = fewest(run, sparse.model.eval(), options, limit)
    thin(sparse.model, (run.example(),), replace(options, rate=rate))
    return result | {"rate": round(rate, 4)} | _finish(run, sparse)


def fewest(run: Run, model: nn.Module, options: PruneOptions, limit: int) -> float:
    """The smallest rate, in thousandths, that leaves at most so many MACs."""
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        copy = deepcopy(model)
        plan = plan_thinning(copy, (run.example(),), replace(options, rate=middle / 1000)).plan
        apply_cut(copy, plan)
        low, high = (low, middle) if run.macs(copy) <= limit else (middle, high)
    return high / 1000


def _finish(run: Run, cut: Checkpoint) -> dict[str, object]:
    result: dict[str, object] = {
        "macs": run.macs(cut.model),
        "parameters": sum(parameter.numel() for parameter in cut.model.parameters()),
        "after_cut": run.accuracy(cut),
    }
    return result | {"accuracy": run.accuracy(run.finetuned(cut))}


def row(arguments: argparse.Namespace, seed: int) -> dict[str, object]:
    run = Run(arguments, seed)
    dense = run.fresh()
    found: dict[str, object] = {
        "seed": seed,
        "device": run.context.device.type,
        "n": len(run.source.split("test")),
        "sparse_epochs": arguments.sparse_epochs,
        "epochs": arguments.epochs,
        "strength": arguments.strength,
        "dense": {"accuracy": run.accuracy(dense), "macs": run.macs(dense.model)},
    }
    found["torch_pruning"] = peer = torch_pruning(run)
    found["cctool"] = ours = cctool(run, int(str(peer["macs"])))
    found["difference"] = round(float(str(ours["accuracy"])) - float(str(peer["accuracy"])), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", required=True, help="state dict of the trained resnet20")
    parser.add_argument("--data", required=True, help="as cctool's --data: cifar10:DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sparse-epochs", type=int, default=1)
    parser.add_argument("--sparse-lr", type=float, default=0.01)
    parser.add_argument(
        "--strength", type=float, default=0.01, help="weight of the L1 penalty, of both tools"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Torch-Pruning warns about every parameter that it does not know
    rows = [row(arguments, seed) for seed in arguments.seeds]
    command = (
        "python benchmarks/slimming.py --weights resnet20.pth --data cifar10:DIR "
        f"--sparse-epochs {arguments.sparse_epochs} --sparse-lr {arguments.sparse_lr} "
        f"--strength {arguments.strength} --epochs {arguments.epochs} --lr {arguments.lr}"
    )
    record.write("slimming", command, arguments.seeds[0], rows)


if __name__ == "__main__":
    main()
