"""The networks of the zoo beside torchvision's classifiers, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from cctool.models.registry import input_shape

TIMM = """
    vgg11 vgg13_bn vgg16_bn vgg19 resnet18 resnet26d resnet34 resnet50 resnet50d resnext50_32x4d seresnet50
    wide_resnet50_2 ecaresnet26t resnet50_gn resnetblur50 densenet121 densenet169 densenetblur121d
    mobilenetv2_100 mobilenetv2_140 mobilenetv3_large_100 mobilenetv3_small_100 mobilenetv3_rw
    mobilenetv4_conv_small mobilenetv1_100 efficientnet_b0 efficientnet_b3 efficientnet_lite0
    efficientnetv2_rw_t tf_efficientnet_b0 mixnet_s ghostnet_100 mnasnet_100 fbnetc_100 hrnet_w18_small dla34
    res2net50_26w_4s skresnet18 regnetx_002 regnety_002 rexnet_100 inception_v4 xception41 cspresnet50
    cspdarknet53 selecsls42 repvgg_a0 dpn68
"""
"""timm's VGG, ResNet, DenseNet, MobileNet and EfficientNet families, and others with layers of their own."""


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
