"""Networks of libraries that start from published weights."""

import hashlib
import socket
from pathlib import Path

import pytest
import torch

import cctool
from cctool.models import registry, torchvision_models
from shade_toys import picture_folder, ran

NAME = "shufflenet_v2_x0_5"
ARCH = f"torchvision:{NAME}"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file under the name of torchvision's weights, with the digits of its own SHA-256."""
    from torchvision.models import ShuffleNet_V2_X0_5_Weights

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("CCTOOL_DOWNLOAD", raising=False)
    torch.manual_seed(5)
    model = registry.build(ARCH, {"num_classes": 1000})
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / "made.pth")
    digits = hashlib.sha256((cache / "made.pth").read_bytes()).hexdigest()[:8]
    path = (cache / "made.pth").rename(cache / f"shufflenetv2_x0.5-{digits}.pth")
    monkeypatch.setattr(
        ShuffleNet_V2_X0_5_Weights.DEFAULT.value, "url", f"https://example.org/models/{path.name}"
    )
    return path


def test_published_weights_bring_their_preprocessing_and_classes(weights: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.pt"
    said = ran("train", "--arch", ARCH, "--pretrained", "--epochs", "0", "-o", made)
    assert f"published weights of {ARCH}: {weights.name}, 1000 classes, input 3x224x224" in said
    found = cctool.load(made)
    published = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, published[name]) for name, value in found.model.state_dict().items())
    assert found.spec.input_shape == (3, 224, 224)
    assert found.spec.classes == torchvision_models.imagenet_classes()
    assert found.spec.preprocessing is not None
    assert found.spec.preprocessing.mean == (0.485, 0.456, 0.406)
    assert found.spec.preprocessing.std == (0.229, 0.224, 0.225)
    parent = found.history[-1].parent
    assert parent is not None
    assert (parent.path, parent.file) == (weights.name, hashlib.sha256(weights.read_bytes()).hexdigest())
    # Without the option, the weights are random.
    ran("train", "--arch", ARCH, "--epochs", "0", "-o", tmp_path / "random.pt")
    random = cctool.load(tmp_path / "random.pt")
    assert not torch.equal(random.model.fc.weight, found.model.fc.weight)
    line = ["--input", "3x64x64", "--mean", ".5,.5,.5", "--std", ".5,.5,.5", "--epochs", "0"]
    ran("train", "--arch", ARCH, "--pretrained", *line, "-o", tmp_path / "small.pt")
    spec = cctool.load(tmp_path / "small.pt").spec
    assert spec.input_shape == (3, 64, 64)
    assert spec.preprocessing is not None
    assert spec.preprocessing.mean == (0.5, 0.5, 0.5)


def test_their_classes_go_with_names(weights: Path, tmp_path: Path) -> None:
    picture_folder(tmp_path / "known", {"crane": 30, "crane bird": 120, "tench": 220}, n=2)
    picture_folder(tmp_path / "others", {"crane": 30, "leaf": 120}, n=2)
    line = ["train", "--arch", ARCH, "--pretrained", "--input", "3x32x32", "--epochs", "1", "--data"]
    said = ran(*line, f"folder:{tmp_path / 'known'}", "-o", tmp_path / "known.pt")
    assert "3 of 1000 classes of the network, matched by name: crane, crane bird, tench" in said
    said = ran(*line, f"folder:{tmp_path / 'others'}", "-o", tmp_path / "others.pt", exit_code=1)
    assert "has the class 'leaf', which the network does not know; `cctool train --new-head` trains" in said
    said = ran(*line, f"folder:{tmp_path / 'others'}", "--new-head", "-o", tmp_path / "others.pt")
    assert "new head: fc, 2 classes (was 1000)" in said
    found = cctool.load(tmp_path / "others.pt")
    assert found.spec.classes == ("crane", "leaf")
    assert found.model.fc.weight.shape == (2, 1024)
    assert found.history[-1].options["start"] == {"pretrained": True, "new_head": True}


def test_in_memory(weights: Path) -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    made, _ = cctool.train(
        arch=ARCH, pretrained=True, new_head=True, input="3x32x32", data=(images, labels), epochs=1
    )
    assert made.model.fc.weight.shape == (2, 1024)
    published = torch.load(weights, weights_only=True)["conv1.0.weight"]
    assert float((made.model.conv1[0].weight.detach() - published).abs().max()) < 0.1
    with pytest.raises(cctool.CctoolError, match="--pretrained is for a fresh network"):
        cctool.train(made, pretrained=True, data=(images, labels), epochs=1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            ["--arch", "lenet"],
            "lenet has no published weights: --pretrained is for torchvision:NAME",
        ),
        ([], "--arch"),
        (["--arch", ARCH, "--arg", "num_classes=5"], "need num_classes=1000; --new-head changes the classes"),
        (
            ["--arch", "torchvision:resnet18"],
            "put the file there, or set CCTOOL_DOWNLOAD=1 to let",
        ),
        (["--arch", "torchvision:resnet19"], "torchvision has no network 'resnet19'"),
    ],
)
def test_wrong_uses(weights: Path, tmp_path: Path, line: list[str], why: str) -> None:
    output = tmp_path / "no.pt"
    usage = not line or "--arg" in line
    line = ["train", *line, "--pretrained", "--epochs", "0"]
    assert why in ran(*line, "-o", output, exit_code=2 if usage else 1)
    assert not output.exists()


def test_a_damaged_file_and_an_input_are_refused(weights: Path, tmp_path: Path) -> None:
    line = ["train", "--arch", ARCH, "--pretrained", "--epochs", "0", "-o", tmp_path / "no.pt"]
    weights.write_bytes(weights.read_bytes() + b"!")
    assert f"{weights} is damaged" in ran(*line, exit_code=1)
    ran("train", "--arch", "lenet", "--epochs", "0", "-o", tmp_path / "a.pt")
    said = ran("train", tmp_path / "a.pt", *line[1:], exit_code=2)
    assert "--pretrained is for a fresh network: leave INPUT out" in said
