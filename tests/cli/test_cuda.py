"""Every command on a CUDA device, against the same command on the CPU.

Float32 sums in another order differ by rounding: logits are compared to 1e-3 of their range (TF32 is off by
default for matrix products, on for cuDNN's convolutions), metrics to what one sample in n may flip.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import cctool
from cctool.checkpoint.checkpoint import Checkpoint
from cctool.cli.main import app

pytestmark = pytest.mark.cuda

DATA = ("--data", "digits", "--limit", "96", "--batch-size", "32")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    return result.stdout


def on_both(folder: Path, verb: str, *arguments: str) -> tuple[Checkpoint, Checkpoint]:
    """Run a writing command on each device and load what it wrote."""
    loaded = []
    for device in ("cpu", "cuda"):
        output = folder / f"{verb}.{device}.pt"
        run(verb, *arguments, "--device", device, "-o", str(output))
        loaded.append(cctool.load(output))
    return loaded[0], loaded[1]


def assert_close(a: torch.nn.Module, b: torch.nn.Module, tolerance: float) -> None:
    """Compare two networks by their logits."""
    inputs = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = a(inputs), b(inputs)
    assert (expected - found).abs().max() <= tolerance * (expected.max() - expected.min())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "student.pt"
    run("train", "--arch", "mobilenet_student", "--epochs", "2", *DATA, "--device", "cpu", "-o", str(path))
    return path


def test_train(tmp_path: Path) -> None:
    options = ("--arch", "mobilenet_student", "--epochs", "1", "--lr", "0.01", *DATA)
    cpu, cuda = on_both(tmp_path, "train", *options)
    assert_close(cpu.model, cuda.model, 0.05)


def test_train_in_half_precision(tmp_path: Path) -> None:
    for precision in ("bf16", "16"):
        output = tmp_path / f"{precision}.pt"
        options = ("--arch", "mobilenet_student", "--epochs", "1", *DATA, "--precision", precision)
        run("train", *options, "--device", "cuda", "-o", str(output))
        assert all(p.dtype == torch.float32 for p in cctool.load(output).model.parameters())


def test_distill(tmp_path: Path, student: Path) -> None:
    options = ("--arch", "mobilenet_student", "--teacher", str(student), "--epochs", "1", "--lr", "0.01")
    cpu, cuda = on_both(tmp_path, "distill", *options, *DATA)
    assert_close(cpu.model, cuda.model, 0.05)


def test_evaluate(student: Path) -> None:
    def metrics(device: str) -> dict[str, Any]:
        report = json.loads(run("evaluate", str(student), *DATA, "--device", device, "--json"))
        return report["metrics"]  # type: ignore[no-any-return]

    cpu, cuda = metrics("cpu"), metrics("cuda")
    assert cpu["n"] == cuda["n"] == 96
    assert abs(cpu["values"]["top1"] - cuda["values"]["top1"]) <= 100 / 96 + 1e-6
    assert cuda["values"]["loss"] == pytest.approx(cpu["values"]["loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["slimming", "l1", "l2", "random"])
def test_prune(tmp_path: Path, student: Path, method: str) -> None:
    cpu, cuda = on_both(tmp_path, "prune", str(student), "--method", method, "--limit", "96")
    for name, value in cpu.model.state_dict().items():
        assert torch.equal(value, cuda.model.state_dict()[name]), name


def test_recalibrate(tmp_path: Path, student: Path) -> None:
    cpu, cuda = on_both(tmp_path, "prune", str(student), "--recalibrate", "96", *DATA)
    assert_close(cpu.model, cuda.model, 1e-3)


@pytest.mark.parametrize("method", ["fp16", "bf16", "uint8"])
def test_quantize(tmp_path: Path, student: Path, method: str) -> None:
    cpu, cuda = on_both(tmp_path, "quantize", str(student), "--method", method, "--limit", "96")
    for name, value in cpu.model.state_dict().items():
        assert torch.equal(value, cuda.model.state_dict()[name]), name


def test_analyze(student: Path) -> None:
    def layers(device: str) -> Any:
        report = json.loads(run("analyze", str(student), "--device", device, "--json"))
        return {key: value for key, value in report.items() if key != "thop"}

    assert layers("cpu") == layers("cuda")


def test_export(tmp_path: Path, student: Path) -> None:
    import onnxruntime

    inputs = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    outputs = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.onnx"
        run("export", str(student), "--device", device, "-o", str(path), "--limit", "96")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs.append(torch.from_numpy(session.run(None, {"input": inputs})[0]))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_compare(student: Path) -> None:
    def rows(device: str) -> Any:
        return json.loads(run("compare", str(student), *DATA, "--device", device, "--json"))

    (cpu,), (cuda,) = rows("cpu"), rows("cuda")
    assert cpu["report"]["macs"] == cuda["report"]["macs"]
    assert cpu["report"]["metrics"]["n"] == cuda["report"]["metrics"]["n"]


TRANSFORMED = {
    "energy": ("--keep", "0.5"),
    "corner": ("--keep", "0.5", "--select", "corner", "--kernel", "haar"),
    "features": ("--target", "features", "--taps", "cnn.2", "--calibration", "32", "--channel-klt"),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_follows_a_transform(tmp_path: Path, student: Path, name: str) -> None:
    coded = tmp_path / "coded.pt"
    run("transform", str(student), *TRANSFORMED[name], *DATA, "--device", "cpu", "-o", str(coded))
    cpu, cuda = on_both(tmp_path, "prune", str(coded), "--method", "l1", *DATA)
    # A codec may round the other way at a tie of float32.
    assert_close(cpu.model, cuda.model, 1e-2 if name == "features" else 1e-3)
    cpu, cuda = on_both(tmp_path, "quantize", str(coded), *DATA)
    assert_close(cpu.model, cuda.model, 1e-2 if name == "features" else 1e-3)
    if name == "features":
        run("export", str(coded), "--device", "cuda", "-o", str(tmp_path / "coded.onnx"), "--limit", "32")
    report = json.loads(run("analyze", str(coded), "--device", "cuda", "--json"))
    expected = json.loads(run("analyze", str(coded), "--device", "cpu", "--json"))
    assert report["analysis"]["layers"] == expected["analysis"]["layers"]
