"""Classifiers of torchvision by their published sizes: half of every family, against the oracle."""

import copy

import pytest
import torch
from torchvision import models

from cctool.models.registry import build
from cctool.pruning.cut.planner import thin
from hook_oracle import HALF, distinct
from masking_oracle import outputs, relative
from statistics_oracle import masked

SIZES = {"swin_v2_t": 64, "maxvit_t": 224, "inception_v3": 96}
CONVOLUTIONAL = [
    "alexnet", "densenet169", "efficientnet_b0", "efficientnet_v2_s", "inception_v3", "mnasnet0_5",
    "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "shufflenet_v2_x1_5", "squeezenet1_1", "vgg11_bn", "wide_resnet50_2",
]  # fmt: skip
STATISTICS = ["convnext_tiny", "maxvit_t", "swin_t", "swin_v2_t", "vit_b_32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *STATISTICS])
def test_half_of_every_family(name: str) -> None:
    torch.manual_seed(0)
    extra = {"init_weights": False} if name == "inception_v3" else {}
    model = distinct(build(f"torchvision:{name}", {"num_classes": 10, **extra})).eval()
    size = SIZES.get(name, 224 if name in STATISTICS else 64)
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    cut = copy.deepcopy(model)
    report = thin(cut, (x[:1],), HALF).report
    queries = [
        n
        for n, m in model.named_modules()
        if type(m) is torch.nn.MultiheadAttention or (n.endswith("attn.qkv") and name == "swin_t")
    ]
    assert relative(outputs(masked(model, cut, queries), x), outputs(cut, x)) < 1e-6
    assert report.parameters_after < 0.5 * report.parameters_before
    assert bool(report.statistics) == (name in STATISTICS)
    assert not report.notes


def test_the_names_are_torchvisions() -> None:
    assert {*CONVOLUTIONAL, *STATISTICS} <= set(models.list_models(module=models))
