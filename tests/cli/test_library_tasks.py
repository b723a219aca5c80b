"""Detectors and torchvision's segmentation networks through the verbs, by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cctool.base import user_code
from cctool.cli.main import app
from cctool.models import registry
from segmentation_toys import YOLO, segmentation_set

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def invoke(line: str) -> str:
        result = CliRunner().invoke(app, line.split())
        told = " ".join((result.stdout + result.stderr).split())
        assert result.exit_code == 0, told
        return result.stdout if "--json" in line else told

    return invoke


def through_the_verbs(run: Run, file: str, named: str, later: str, taps: str) -> None:
    """Calibrate on unlabelled pictures, cut by them, quantize and export; nothing claims a metric."""
    lines = (
        f"prune {file} {named} --data images:set --method apoz --rate 0.3 --recalibrate 8 -o p.pt",
        f"quantize p.pt {later} --method int8 --calibration 8 -o q.pt",
        f"transform p.pt {later} --target features --taps {taps} --calibration 8 -o f.pt",
    )
    for line in lines:
        told = run(line)
        assert "not measured: nothing says what this network's outputs mean" in told
        assert "top-1" not in told
    for name in ("p.pt", "q.pt", "f.pt"):
        document = json.loads(run(f"analyze {name} {later} --json"))
        assert document["history"][-1]["metrics_after"] == []
    assert (
        json.loads(run(f"analyze p.pt {later} --json"))["history"][0]["after"]["parameters"]
        < json.loads(run(f"analyze p.pt {later} --json"))["history"][0]["before"]["parameters"]
    )


def test_a_network_with_three_heads_in_a_dict(run: Run, tmp_path: Path) -> None:
    segmentation_set(tmp_path / "set", side=32)
    (tmp_path / "yolo.py").write_text(YOLO)
    model: nn.Module = user_code.load("yolo.py:make")()
    torch.save(model.state_dict(), "y.pth")
    named = "--arch yolo.py:make --input 3x32x32 --mean .5,.5,.5 --std .25,.25,.25"
    through_the_verbs(run, "y.pth", named, "--arch yolo.py:make", "middle")
    told = run("export q.pt --arch yolo.py:make")
    assert "verified" in told
    assert "layers on integers" in told
    outputs = onnxruntime.InferenceSession("q.onnx").get_outputs()
    assert [output.name for output in outputs] == ["small", "middle", "large"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "taps"),
    [
        ("ssdlite320_mobilenet_v3_large", {}, "backbone.features.0.4"),
        ("retinanet_resnet50_fpn", {"min_size": 64, "max_size": 64}, "backbone.body.layer1"),
    ],
)
def test_torchvisions_detectors(
    run: Run, tmp_path: Path, name: str, arguments: dict[str, int], taps: str
) -> None:
    segmentation_set(tmp_path / "set", side=64)
    torch.manual_seed(0)
    torch.save(registry.build(f"torchvision:{name}", arguments).state_dict(), "d.pth")
    given = " ".join(f"--arg {key}={value}" for key, value in arguments.items())
    named = f"--arch torchvision:{name} {given} --mean 0,0,0 --std 1,1,1"
    through_the_verbs(run, "d.pth", named, "", taps)
    assert "verified" in run("export q.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50"])
def test_torchvisions_segmentation_networks(run: Run, tmp_path: Path, name: str) -> None:
    segmentation_set(tmp_path / "set", side=64, counts=(16, 4, 4))
    run(
        f"train --arch torchvision:{name} --data segment:set --input 3x64x64 --epochs 1 --batch-size 8 "
        "-o t.pt"
    )
    run("prune t.pt --target macs=0.5 --method l2 --finetune-epochs 1 --batch-size 8 -o p.pt")
    run("quantize p.pt --method int8 -o q.pt")
    run("transform p.pt --target features -o f.pt")
    run("distill p.pt --teacher t.pt --epochs 1 --batch-size 8 -o s.pt")
    for file in ("p.pt", "q.pt", "f.pt", "s.pt"):
        values = json.loads(run(f"evaluate {file} --json"))["metrics"]["values"]
        assert set(values) == {"loss", "miou", "pixels"}
    before = json.loads(run("analyze p.pt --json"))["history"][-1]
    assert before["after"]["macs"] <= 0.5 * before["before"]["macs"]
    assert "verified" in run("export q.pt")
    assert onnxruntime.InferenceSession("q.onnx").get_outputs()[0].name == "out"
