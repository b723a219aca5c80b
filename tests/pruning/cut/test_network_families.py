"""Families of networks from timm, and segmentation networks: cut by half, exactly, saved, cut again.

The oracle is that of `hook_oracle.py`: hooks on the dense network that know nothing of graphs and plans.
`benchmarks/prune_zoo.py --set timm` and `--set segmentation` do the same for all, beside Torch-Pruning.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.thin import thinned
from cctool.checkpoint.spec import ModelSpec
from cctool.models.registry import build, listing
from cctool.operations import pipeline
from cctool.operations.inspect import analyze
from cctool.operations.prune import run as prune
from cctool.operations.registries import tables
from cctool.options.common import ModelOptions, RuntimeOptions
from cctool.options.inspect.analyze import AnalyzeOptions
from cctool.pruning.cut.planner import thin
from hook_oracle import HALF, count, difference, distinct, lost_channels, masked, run, tensors_of

needs_timm = pytest.mark.skipif(
    listing()[-1].summary.endswith("not installed"), reason="timm is an extra of cctool"
)

# Widths that attributes hold: slices (rexnet), lists of a split (mixnet), halves of one (cspresnet,
# skresnet), groups of a fixed filter (resnetblur); computed padding (tf_efficientnet), branches (repvgg).
FEW = {"rexnet_100": 0.34, "skresnet18": 0.27}
MANY = {
    "mixnet_s": 0.37, "cspresnet50": 0.27, "resnetblur50": 0.28, "res2net50_26w_4s": 0.28, "dpn68": 0.28,
    "repvgg_a0": 0.29, "tf_efficientnet_b0": 0.33, "ghostnet_100": 0.32, "hrnet_w18_small": 0.3,
    "regnety_002": 0.29, "selecsls42": 0.27, "vgg11": 0.26, "densenetblur121d": 0.29, "dla34": 0.26,
    "mobilenetv4_conv_small": 0.35, "efficientnet_lite0": 0.34, "seresnet50": 0.27,
    "resnext50_32x4d": 0.28, "xception41": 0.28,
}  # fmt: skip
SEGMENTATION = {"lraspp_mobilenet_v3_large": 0.27}
SEGMENTATION_SLOW = {
    "fcn_resnet50": 0.26, "fcn_resnet101": 0.26, "deeplabv3_resnet50": 0.26, "deeplabv3_resnet101": 0.26,
    "deeplabv3_mobilenet_v3_large": 0.26,
}  # fmt: skip


def check(reference: str, arguments: dict[str, Any], below: float, folder: Path, side: int = 64) -> None:
    torch.manual_seed(0)
    model = distinct(build(reference, arguments)).eval()
    x = torch.randn(3, 3, side, side, dtype=torch.float64)
    cut = copy.deepcopy(model)
    found = thin(cut, (x[:1],), HALF)
    assert not found.report.notes
    assert count(cut) < below * count(model)
    outputs = run(cut, (x,))
    assert difference(masked(model, lost_channels(model, cut), (x,)), outputs) < 1e-7

    attributes = [(module, key) for module, values in found.plan.attributes.items() for key in values]
    spec = ModelSpec(architecture=reference, arguments=arguments, input_shape=(3, side, side))
    spec = thinned(spec, cut, found.plan.tensors, attributes)
    save(Checkpoint(cut.float(), spec), folder / "cut.pt", tables())
    loaded = load(folder / "cut.pt", tables()).model
    again = run(loaded, (x.float(),))
    assert all(torch.equal(a, b) for a, b in zip(again, run(cut, (x.float(),)), strict=True))

    sum(tensor.square().mean() for tensor in tensors_of(loaded.train()(x.float()))).backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in loaded.parameters())
    thin(loaded, (x[:1].float(),), HALF)
    assert count(loaded) < count(cut)
    assert [t.shape for t in run(loaded, (x.float(),))] == [t.shape for t in outputs]


@needs_timm
@pytest.mark.parametrize("name", FEW)
def test_a_few_of_timm(name: str, tmp_path: Path) -> None:
    check(f"timm:{name}", {"num_classes": 10}, FEW[name], tmp_path)


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_many_of_timm(name: str, tmp_path: Path) -> None:
    check(f"timm:{name}", {}, MANY[name], tmp_path)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation(name: str, tmp_path: Path) -> None:
    check(f"torchvision:{name}", {"num_classes": 5}, SEGMENTATION[name], tmp_path)


def test_a_bare_state_dict_of_a_segmentation_network_goes_through_the_commands(tmp_path: Path) -> None:
    """`cctool prune FILE.pth --arch torchvision:lraspp_mobilenet_v3_large`, then `analyze`, then `prune`."""
    reference = "torchvision:lraspp_mobilenet_v3_large"
    torch.save(build(reference, {"num_classes": 4}).state_dict(), tmp_path / "bare.pth")
    named = ModelOptions(arch=reference, input_shape=(3, 64, 64))
    runtime = RuntimeOptions(device="cpu")
    request = pipeline.Request(
        "prune", str(tmp_path / "bare.pth"), str(tmp_path / "cut.pt"), model=named, runtime=runtime
    )
    (first,) = pipeline.write(prune.run, HALF, request)
    # The number of classes is read off the file.
    assert load(first.path, tables()).spec.arguments == {"num_classes": 4}
    again = pipeline.Request("prune", str(first.path), str(tmp_path / "again.pt"), runtime=runtime)
    (second,) = pipeline.write(prune.run, HALF, again)
    seen = pipeline.read(
        analyze.run, AnalyzeOptions(), pipeline.Request("analyze", str(second.path), runtime=runtime)
    )
    counts = [count(load(product.path, tables()).model) for product in (first, second)]
    assert counts[1] < 0.4 * counts[0]
    assert seen.analysis.layers.totals.parameters == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTATION_SLOW)
def test_segmentation_with_auxiliary_heads(name: str, tmp_path: Path) -> None:
    check(f"torchvision:{name}", {"num_classes": 5, "aux_loss": True}, SEGMENTATION_SLOW[name], tmp_path)
