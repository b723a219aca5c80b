import socket

import pytest
import torch

from cctool.base.errors import ArchitectureError
from cctool.models.architectures import COLLECTIONS
from cctool.models.registry import build, defaults, input_shape, listing
from cctool.models.torchvision_models import allowed_arguments, classifiers, detectors, segmentation_networks

HAS_TIMM = not listing()[-1].summary.endswith("not installed")
needs_timm = pytest.mark.skipif(not HAS_TIMM, reason="timm is an extra")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


def test_all_of_torchvisions_networks_for_images_are_there() -> None:
    from torchvision import models

    names = [record.name for record in listing("torchvision")]
    modules = (models, models.segmentation, models.detection)
    expected = [name for module in modules for name in models.list_models(module=module)]
    assert names == [f"torchvision:{name}" for name in sorted(expected)]
    assert len(names) >= 86


@pytest.mark.parametrize("name", segmentation_networks())
def test_segmentation_networks_build_without_a_download(name: str, no_network: None) -> None:
    from torchvision import models

    aux = {} if name.startswith("lraspp") else {"aux_loss": True}
    with torch.device("meta"):
        ours = build(f"torchvision:{name}", {"num_classes": 5, **aux})
        theirs = models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **aux)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert any(key.startswith("aux_classifier") for key in ours.state_dict()) == bool(aux)
    with pytest.raises(ArchitectureError, match=r"does not take weights_backbone; allowed: .*num_classes"):
        build(f"torchvision:{name}", {"weights_backbone": "DEFAULT"})


@pytest.mark.parametrize("name", detectors())
def test_detectors_build_without_a_download(name: str, no_network: None) -> None:
    from torchvision import models

    with torch.device("meta"):
        ours = build(f"torchvision:{name}", defaults(f"torchvision:{name}", channels=3, classes=5))
        theirs = models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    # What the network scales its images to, along the shorter side.
    assert input_shape(f"torchvision:{name}", {}) == (3, *[theirs.transform.min_size[-1]] * 2)
    with pytest.raises(ArchitectureError, match=r"does not take weights_backbone; allowed: .*num_classes"):
        build(f"torchvision:{name}", {"weights_backbone": "DEFAULT"})


def test_a_detectors_size_and_thresholds_are_arguments() -> None:
    given = {"min_size": 96, "max_size": 160, "score_thresh": 0.25}
    with torch.device("meta"):
        model = build("torchvision:retinanet_resnet50_fpn", given)
    assert (model.transform.min_size, model.transform.max_size, model.score_thresh) == ((96,), 160, 0.25)
    assert input_shape("torchvision:retinanet_resnet50_fpn", given) == (3, 96, 96)
    with pytest.raises(ArchitectureError, match=r"does not take min_size; allowed: .*score_thresh"):
        build("torchvision:ssdlite320_mobilenet_v3_large", {"min_size": 96})


@pytest.mark.parametrize(
    "name", ["resnet18", "googlenet", "inception_v3", "mobilenet_v3_small", "squeezenet1_0"]
)
def test_torchvision_builds_what_torchvision_builds(name: str, no_network: None) -> None:
    from torchvision import models

    with torch.device("meta"):
        ours = build(f"torchvision:{name}", {"num_classes": 11})
        needed = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        theirs = models.get_model(name, weights=None, num_classes=11, **needed)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize(
    "name",
    ["weights", "weights_backbone", "progress", "pretrained", "norm_layer", "block", "layers", "kwargs"],
)
def test_torchvision_refuses_what_could_fetch_or_run(name: str) -> None:
    with pytest.raises(ArchitectureError, match=f"does not take {name}; allowed: .*num_classes"):
        build("torchvision:resnet18", {name: "DEFAULT"})


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "vit_b_16",
        "maxvit_t",
        "efficientnet_b0",
        "swin_t",
        "convnext_tiny",
        "regnet_y_400mf",
        "vgg11",
    ],
)
def test_allowed_arguments_have_classes_and_no_callable(name: str) -> None:
    allowed = allowed_arguments(name)
    assert "num_classes" in allowed
    assert not {"norm_layer", "block", "stem_type", "block_type", "activation", "downsample_layer"} & set(
        allowed
    )


def test_torchvision_argument_of_the_wrong_type() -> None:
    with pytest.raises(ArchitectureError, match="torchvision:resnet18 cannot be built with"):
        build("torchvision:resnet18", {"num_classes": "many"})


def test_torchvision_near_miss() -> None:
    with pytest.raises(ArchitectureError, match=r"no network 'resnt18'.*resnet18"):
        build("torchvision:resnt18", {})


def test_torchvision_shapes_and_defaults() -> None:
    assert defaults("torchvision:resnet18", channels=1, classes=10) == {"num_classes": 10}
    assert input_shape("torchvision:resnet18", {}, (1, 28, 28)) == (3, 224, 224)
    assert input_shape("torchvision:inception_v3", {}) == (3, 299, 299)
    assert input_shape("torchvision:vit_b_16", {"image_size": 64}) == (3, 64, 64)
    assert input_shape("torchvision:maxvit_t", {"input_size": [64, 96]}) == (3, 64, 96)


def test_torchvision_image_size_reaches_the_network() -> None:
    with torch.device("meta"):
        model = build("torchvision:vit_b_16", {"image_size": 64})
    assert model.encoder.pos_embedding.shape[1] == (64 // 16) ** 2 + 1


@needs_timm
def test_timm_builds_and_takes_the_data_sets_arguments(no_network: None) -> None:
    arguments = defaults("timm:resnet18", channels=1, classes=10)
    assert arguments == {"in_chans": 1, "num_classes": 10}
    with torch.device("meta"):
        model = build("timm:resnet18", arguments)
    assert model.conv1.weight.shape[1] == 1
    assert model.fc.weight.shape[0] == 10
    assert input_shape("timm:resnet18", arguments) == (1, 224, 224)
    assert input_shape("timm:vit_tiny_patch16_224", {"img_size": 64}) == (3, 64, 64)


@needs_timm
def test_timm_name_with_a_pretrained_tag_downloads_nothing(no_network: None) -> None:
    with torch.device("meta"):
        model = build("timm:resnet18.a1_in1k", {})
    assert model.fc.weight.shape[0] == 1000
    with pytest.raises(ArchitectureError, match=r"resnet18\.nonsense"):
        build("timm:resnet18.nonsense", {})


@needs_timm
@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_strict",
        "features_only",
        "cache_dir",
        "pruned",
        "device",
    ],
)
def test_timm_refuses_what_reads_files_or_the_network(name: str) -> None:
    with pytest.raises(ArchitectureError, match=f"does not take {name}"):
        build("timm:resnet18", {name: "x"})


@needs_timm
@pytest.mark.parametrize(
    "name", ["hf-hub:someone/net", "hf_hub:someone/net", "local-dir:/tmp", "../resnet18", "resnet_18"]
)
def test_timm_names_from_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ArchitectureError, match="no network"):
        build(f"timm:{name}", {})


@needs_timm
def test_timm_unknown_argument() -> None:
    with pytest.raises(ArchitectureError, match="timm:resnet18 cannot be built"):
        build("timm:resnet18", {"wings": 2})


def test_missing_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from cctool.models import timm_models

    timm_models.names.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArchitectureError, match=r"pip install 'cctool\[timm\]'"):
        build("timm:resnet18", {})
    assert listing()[-1].summary.endswith("not installed")
    timm_models.names.cache_clear()


def test_unknown_family() -> None:
    with pytest.raises(ArchitectureError, match=f"there are: {', '.join(COLLECTIONS)}"):
        listing("keras")


@pytest.mark.slow
@pytest.mark.parametrize("record", [f"torchvision:{name}" for name in classifiers()])
def test_every_torchvision_classifier_builds(record: str, no_network: None) -> None:
    name = record.partition(":")[2]
    # RegNet scales random weights in its constructor, so only parameters may be on meta: build them for real.
    model = build(record, {"num_classes": 3})
    shape = input_shape(record, {})
    assert shape == (3, 299, 299) if name == "inception_v3" else (3, 224, 224)
    assert any(parameter.shape[0] == 3 for parameter in model.parameters())
