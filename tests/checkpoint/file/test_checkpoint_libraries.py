"""All of torchvision's classifiers and thirty of timm's: saved, loaded, equal logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec
from cctool.models import registry
from cctool.models.torchvision_models import classifiers
from cctool.operations.registries import tables

TORCHVISION = classifiers()

# Non-persistent buffers (swin, maxvit, levit, eva, regnet), tied weights, plain convolutions and attention.
TIMM = (
    "resnet18", "resnet26d", "seresnet50", "ecaresnet26t", "resnext26ts", "regnetx_002", "regnety_002",
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_lite0", "tf_efficientnet_b0",
    "ghostnet_050",
    "hardcorenas_a", "lcnet_050", "dla46_c", "convnext_atto", "repvgg_a0", "vgg11_bn", "densenet121",
    "mixer_s32_224", "resmlp_12_224", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "coat_lite_tiny", "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "maxvit_rmlp_pico_rw_256", "levit_128s",
    "pit_ti_224",
    "edgenext_xx_small", "beit_base_patch16_224", "nf_regnet_b0",
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Libraries warn of their own future."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def survives(reference: str, folder: Path) -> None:
    registries = tables()
    torch.manual_seed(0)
    with quiet():
        model = registries.build(reference, {}).eval()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.running_var, 0.5, 2)
        shape = registry.input_shape(reference, {})
        inputs = torch.randn(1, *shape)
        spec = ModelSpec(architecture=reference, input_shape=shape)
        checkpoint = Checkpoint(model, spec)
        with torch.no_grad():
            expected = model(inputs)
        assert torch.isfinite(expected).all()
        ties = sum(1 for _ in model.named_parameters(remove_duplicate=False))
        for suffix in (".pt", ".safetensors"):
            path = folder / f"a{suffix}"
            parent = save(checkpoint, path, registries)
            loaded = load(path, registries)
            path.unlink()
            assert loaded.origin is not None
            assert loaded.origin.content == parent.content
            with torch.no_grad():
                assert torch.equal(loaded.model(inputs), expected)
            assert sum(1 for _ in loaded.model.parameters()) == sum(1 for _ in model.parameters())
            assert sum(1 for _ in loaded.model.named_parameters(remove_duplicate=False)) == ties
            assert replace(loaded, origin=None).spec == spec


def test_there_are_eighty() -> None:
    assert len(TORCHVISION) == 80


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, tmp_path: Path) -> None:
    survives(f"torchvision:{name}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    survives(f"timm:{name}", tmp_path)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf"])
def test_a_few_of_torchvision(name: str, tmp_path: Path) -> None:
    survives(f"torchvision:{name}", tmp_path)
