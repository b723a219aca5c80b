"""Published weights: found in the caches of libraries, verified, and downloaded only if that is allowed."""

import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from cctool.base.errors import ArchitectureError, CorruptCheckpointError
from cctool.models import registry, timm_models, torchvision_models
from cctool.models.published import distinct, from_address, from_hub

HAS_TIMM = not registry.listing()[-1].summary.endswith("not installed")
needs_timm = pytest.mark.skipif(not HAS_TIMM, reason="timm is an extra")
CONTENT = b"weights"
DIGITS = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache in a folder of this test, and no network."""

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("CCTOOL_DOWNLOAD", raising=False)
    found = tmp_path / "hub" / "checkpoints"
    found.mkdir(parents=True)
    return found


def test_a_file_in_torchs_cache_is_verified_by_its_name(cache: Path) -> None:
    name = f"net-{DIGITS[:8]}.pth"
    (cache / name).write_bytes(CONTENT)
    assert from_address("torchvision:net", f"https://example.org/{name}") == cache / name
    (cache / name).write_bytes(CONTENT + b"!")
    with pytest.raises(CorruptCheckpointError, match=f"begins with [0-9a-f]{{8}}, and not with {DIGITS[:8]}"):
        from_address("torchvision:net", f"https://example.org/{name}")
    with pytest.raises(ArchitectureError, match=r"the name of net\.pth has no SHA-256"):
        from_address("torchvision:net", "https://example.org/net.pth")


def test_nothing_is_downloaded_unless_the_environment_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"net-{DIGITS[:8]}.pth"
    asked: list[Any] = []

    def download(address: str, path: str, *, hash_prefix: str, progress: bool) -> None:
        asked.append((address, hash_prefix, progress))
        Path(path).write_bytes(CONTENT)

    with pytest.raises(
        ArchitectureError, match=rf"not in {cache / name}; put the file there, or set CCTOOL_DOWNLOAD=1"
    ):
        from_address("torchvision:net", f"https://example.org/{name}")
    monkeypatch.setenv("CCTOOL_DOWNLOAD", "1")
    with pytest.raises(ArchitectureError, match=r"torchvision:net: cannot download net-.*\.pth: "):
        from_address("torchvision:net", f"https://example.org/{name}")
    assert not list(cache.iterdir())
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert from_address("torchvision:net", f"https://example.org/{name}") == cache / name
    assert asked == [(f"https://example.org/{name}", DIGITS[:8], False)]


@needs_timm
def test_a_file_in_the_hubs_cache_is_verified_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    look = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *names: look(*names, cache_dir=tmp_path)
    )
    with pytest.raises(ArchitectureError, match=r"timm:net: its published weights are not in .*or set CC"):
        from_hub("timm:net", "timm/net", ["model.safetensors"])
    folder = tmp_path / "models--timm--net"
    for part in ("blobs", "refs", "snapshots/1"):
        (folder / part).mkdir(parents=True)
    (folder / "refs" / "main").write_text("1")
    (folder / "blobs" / DIGITS).write_bytes(CONTENT)
    link = folder / "snapshots" / "1" / "pytorch_model.bin"
    link.symlink_to(folder / "blobs" / DIGITS)
    assert from_hub("timm:net", "timm/net", ["model.safetensors", "pytorch_model.bin"]) == link
    (folder / "blobs" / DIGITS).write_bytes(b"other")
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        from_hub("timm:net", "timm/net", ["pytorch_model.bin"])
    link.unlink()
    link.write_bytes(CONTENT)
    with pytest.raises(ArchitectureError, match="is not stored under its SHA-256"):
        from_hub("timm:net", "timm/net", ["pytorch_model.bin"])


def test_torchvision_says_what_weights_need() -> None:
    resnet = registry.published("torchvision:resnet18")
    assert resnet.arguments == {"num_classes": 1000}
    assert resnet.input_shape == (3, 224, 224)
    assert resnet.mean == (0.485, 0.456, 0.406)
    assert resnet.std == (0.229, 0.224, 0.225)
    assert resnet.classes is not None
    assert len(set(resnet.classes)) == 1000
    assert resnet.classes[0] == "tench"
    assert registry.published("torchvision:googlenet").arguments["transform_input"] is True
    large = registry.published("torchvision:vit_h_14")
    assert (large.arguments["image_size"], large.input_shape) == (518, (3, 518, 518))
    segmentation = registry.published("torchvision:fcn_resnet50")
    assert segmentation.arguments == {"num_classes": 21, "aux_loss": True}
    assert segmentation.classes is not None
    assert segmentation.classes[1] == "aeroplane"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_these_arguments_build_what_torchvision_loads_its_weights_into(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    # As torchvision does with weights, but for reading them.
    loaded: list[set[str]] = []

    def load(model: torch.nn.Module, state: object, *args: object, **named: object) -> None:
        loaded.append(set(model.state_dict()))

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", load)
    for kind in (models.GoogLeNet_Weights, models.Inception_V3_Weights):
        monkeypatch.setattr(kind, "get_state_dict", lambda *args, **named: {})
    monkeypatch.setattr(models._api.WeightsEnum, "get_state_dict", lambda *args, **named: {})
    with torch.device("meta"):
        ours = registry.build(f"torchvision:{name}", registry.published(f"torchvision:{name}").arguments)
        theirs = (
            models.get_model(name, weights="DEFAULT", weights_backbone=None, progress=False)
            if (name in torchvision_models.segmentation_networks())
            else models.get_model(name, weights="DEFAULT", progress=False)
        )
    assert set(ours.state_dict()) == loaded[-1]
    assert getattr(ours, "transform_input", None) == getattr(theirs, "transform_input", None)


def test_names_of_classes_are_distinct_in_every_version_of_torchvision() -> None:
    now = list(torchvision_models.imagenet_classes())
    before = [name if i not in (134, 639) else name.split()[0] for i, name in enumerate(now)]
    assert before.count("crane") == before.count("maillot") == 2
    assert torchvision_models.class_names(before) == tuple(now)
    assert (now[134], now[517], now[638], now[639]) == ("crane bird", "crane", "maillot", "maillot tank suit")
    assert distinct(["N/A", "cat", "N/A"]) == ("N/A (0)", "cat", "N/A (2)")


@needs_timm
def test_timm_says_what_weights_need() -> None:
    found = registry.published("timm:resnet18.a1_in1k")
    assert found.label == "timm/resnet18.a1_in1k"
    assert found.arguments == {"in_chans": 3, "num_classes": 1000}
    assert found.classes == torchvision_models.imagenet_classes()
    assert registry.published("timm:convnext_tiny.fb_in22k").classes is None
    by_address = registry.published("timm:gcvit_tiny.in1k")
    assert by_address.label.endswith(".pth")
    with pytest.raises(ArchitectureError, match="publishes no weights of a classifier darknet17"):
        timm_models.published("darknet17")


@pytest.mark.parametrize("reference", ["lenet", "net.py:make"])
def test_only_libraries_publish_weights(reference: str) -> None:
    with pytest.raises(ArchitectureError, match=f"{reference} has no published weights: --pretrained is for"):
        registry.published(reference)
