"""Every architecture that prune must know: cut, written in both formats, read in a new process, cut again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.prune import run as prune
from cctool.operations.registries import tables
from cctool.options.common import RuntimeOptions
from cctool.options.prune.choices import PruneMethod
from cctool.options.prune.options import PruneOptions

FOREIGN = ("resnet18", "mobilenet_v2", "densenet121", "googlenet")
# The deeper ones of a family have its shallowest one's rules, and these two of torchvision's take long.
SLOW = ("resnet32", "resnet44", "resnet56", "resnet110", "vgg16", "vgg19", "torchvision:densenet121")
SLOW = (*SLOW, "torchvision:googlenet")
ARCHITECTURES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in (*registry.ARCHITECTURES, *(f"torchvision:{name}" for name in FOREIGN))
]

LOAD = """
import json, sys, torch, cctool
torch.set_num_threads(1)
with torch.no_grad():
    logits = {path: cctool.load(path).model(torch.load(inputs)) for path, inputs in json.loads(sys.argv[1])}
torch.save(logits, sys.argv[2])
"""


def dense(architecture: str, path: Path) -> tuple[int, int, int]:
    """Write a network with random batch-norm statistics, and give its input shape."""
    torch.manual_seed(0)
    arguments = {"init_weights": False} if architecture == "torchvision:googlenet" else {}
    shape = (3, 64, 64) if ":" in architecture else registry.input_shape(architecture, {})
    if architecture == "mobilenet_student":
        shape = (3, 32, 32)
    model = registry.build(architecture, arguments)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    spec = ModelSpec(architecture=architecture, arguments=arguments, input_shape=shape)
    save(Checkpoint(model, spec), path, tables())
    return shape


def cut(source: Path, output: Path) -> Checkpoint:
    request = pipeline.Request("prune", str(source), str(output), runtime=RuntimeOptions(device="cpu"))
    options = PruneOptions(method=PruneMethod.L2, rate=0.5)
    (product,) = pipeline.write(prune.run, options, request)
    return load(product.path, tables())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cut_network_round_trips_and_is_cut_again(architecture: str, tmp_path: Path) -> None:
    shape = dense(architecture, tmp_path / "dense.pt")
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [tmp_path / "cut.pt", tmp_path / "cut.safetensors", tmp_path / "again.pt"]
    checkpoints = [cut(tmp_path / "dense.pt", file) for file in files[:2]]
    checkpoints.append(cut(files[1], files[2]))
    arguments = json.dumps([[str(file), str(tmp_path / "inputs.pt")] for file in files])
    command = [sys.executable, "-c", LOAD, arguments, str(tmp_path / "logits.pt")]
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    subprocess.run(command, check=True)
    logits = torch.load(tmp_path / "logits.pt")
    sizes = [sum(p.numel() for p in checkpoint.model.parameters()) for checkpoint in checkpoints]
    for file, checkpoint in zip(files, checkpoints, strict=True):
        with torch.no_grad():
            assert torch.equal(logits[str(file)], checkpoint.model(inputs)), file.name
    torch.set_num_threads(torch_threads)
    assert torch.equal(logits[str(files[0])], logits[str(files[1])])
    assert sizes[0] == sizes[1] > sizes[2]
    model = checkpoints[2].model
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(inputs).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
