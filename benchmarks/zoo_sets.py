"""The networks of the zoo beside torchvision's classifiers, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from cctool.models.registry import input_shape

TIMM = """
    mobilenetv3_small_100 mobilenetv4_conv_small regnetx_002 regnety_002 mobilenetv2_100 efficientnet_lite0
    mixnet_s mobilenetv1_100 mnasnet_100 ghostnet_100 rexnet_100 efficientnet_b0 tf_efficientnet_b0 fbnetc_100
    mobilenetv3_large_100 mobilenetv3_rw mobilenetv2_140 densenet121 densenetblur121d repvgg_a0 resnet18
    skresnet18 efficientnet_b3 dpn68 hrnet_w18_small efficientnetv2_rw_t densenet169 dla34 resnet26d
    ecaresnet26t cspresnet50 resnet34 resnext50_32x4d resnet50 resnet50d resnet50_gn resnetblur50
    res2net50_26w_4s cspdarknet53 seresnet50 xception41 selecsls42 inception_v4 wide_resnet50_2 vgg11 vgg13_bn
    vgg16_bn vgg19
"""
"""timm's VGG, ResNet, DenseNet, MobileNet and EfficientNet families, and others
with layers of their own; the small ones first."""


SEGMENTED_CLASSES = 21
"""Classes of torchvision's segmentation networks."""


SIDE = 128
"""Of the images that these networks get; Inception v4 takes none below 75."""


def timm_names() -> list[str]:
    """References of timm's networks."""
    return [f"timm:{name}" for name in TIMM.split()]


def segmentation_names() -> list[str]:
    """References of torchvision's segmentation networks."""
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models.segmentation)]


def shape_of(name: str, arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Input shape: what the network was made for, but smaller images for timm's and segmentation networks.

    Which channels go together does not depend on the size of the image, and their number is large.
    """
    channels, height, width = input_shape(name, arguments)
    side = SIDE if name in segmentation_names() or name.startswith("timm:") else max(height, width)
    return channels, min(side, height), min(side, width)


def segmentation_arguments(name: str) -> dict[str, Any]:
    """Auxiliary heads on, where a segmentation network has one; nothing for other networks."""
    return {"aux_loss": True} if name in segmentation_names() and "lraspp" not in name else {}


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Tensors of an output that may be a tuple or a dict."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)
