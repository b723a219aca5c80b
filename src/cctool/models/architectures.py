"""The tables of architectures: our own networks by name, and the libraries whose networks have a prefix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from cctool.models import timm_models, torchvision_models
from cctool.models.alexnet import AlexNet
from cctool.models.densenet import CifarDenseNet
from cctool.models.lenet import LeNet
from cctool.models.mobilenet import MobileNetStudent
from cctool.models.resnet import CifarPreActResNet, CifarResNet
from cctool.models.vgg import STAGES_A, STAGES_D, STAGES_E, CifarVGG

Shape = tuple[int, int, int]

CIFAR_SHAPE: Shape = (3, 32, 32)


@dataclass(frozen=True)
class Architecture:
    """One of our own networks.

    Attributes:
        name: its reference on the command line.
        build: the builder; ``--arg`` may set its keyword arguments, ``in_channels`` and ``num_classes`` among
            them.
        input_shape: (C, H, W) unless data or the user say otherwise.
        summary: one line for the list of architectures.
        minimum_size: the smallest H and W that it takes.
        fixed_size: whether it takes only H and W of `input_shape`.
    """

    name: str
    build: Callable[..., nn.Module]
    input_shape: Shape
    summary: str
    minimum_size: int = 8
    fixed_size: bool = False


@dataclass(frozen=True)
class Collected:
    """The networks of a library, whose references share a prefix.

    Attributes:
        names: all names, sorted; raises ArchitectureError if the library is missing.
        build: (name, arguments) -> module with random weights.
        default_arguments: (channels, classes) of a data set -> arguments for it.
        input_shape: (name, arguments) -> (C, H, W).
        summary: one line for the list of architectures.
    """

    names: Callable[[], Sequence[str]]
    build: Callable[[str, Mapping[str, Any]], nn.Module]
    default_arguments: Callable[[int | None, int | None], dict[str, int]]
    input_shape: Callable[[str, Mapping[str, Any]], Shape]
    summary: str


# Signatures of the builders say which arguments may be set; `partial` hides those that are fixed.
_preact20 = partial(CifarPreActResNet, 3)
_OWN = (
    Architecture("lenet", LeNet, (1, 32, 32), "LeNet-5 with ReLU", 32, fixed_size=True),
    Architecture("alexnet", AlexNet, CIFAR_SHAPE, "AlexNet, CIFAR form", 32, fixed_size=True),
    Architecture("resnet20", partial(CifarResNet, 3), CIFAR_SHAPE, "ResNet for CIFAR, 20 layers"),
    Architecture("resnet32", partial(CifarResNet, 5), CIFAR_SHAPE, "ResNet for CIFAR, 32 layers"),
    Architecture("resnet44", partial(CifarResNet, 7), CIFAR_SHAPE, "ResNet for CIFAR, 44 layers"),
    Architecture("resnet56", partial(CifarResNet, 9), CIFAR_SHAPE, "ResNet for CIFAR, 56 layers"),
    Architecture("resnet110", partial(CifarResNet, 18), CIFAR_SHAPE, "ResNet for CIFAR, 110 layers"),
    Architecture("preact_resnet20", _preact20, CIFAR_SHAPE, "Pre-activation ResNet, 20 layers"),
    Architecture("vgg11", partial(CifarVGG, STAGES_A), CIFAR_SHAPE, "VGG-11 with batch norm for CIFAR", 32),
    Architecture("vgg16", partial(CifarVGG, STAGES_D), CIFAR_SHAPE, "VGG-16 with batch norm for CIFAR", 32),
    Architecture("vgg19", partial(CifarVGG, STAGES_E), CIFAR_SHAPE, "VGG-19 with batch norm for CIFAR", 32),
    Architecture(
        "densenet40", partial(CifarDenseNet, 12), CIFAR_SHAPE, "DenseNet for CIFAR, 40 layers, k=12"
    ),
    Architecture(
        "mobilenet_student", MobileNetStudent, (3, 256, 256), "small MobileNet for distillation", 16
    ),
)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _OWN}

COLLECTIONS: dict[str, Collected] = {
    "torchvision": Collected(
        torchvision_models.names,
        torchvision_models.build,
        torchvision_models.default_arguments,
        torchvision_models.input_shape,
        "torchvision's classifiers, segmentation networks and detectors",
    ),
    "timm": Collected(
        timm_models.names,
        timm_models.build,
        timm_models.default_arguments,
        timm_models.input_shape,
        "timm's classifiers (extra: timm)",
    ),
}
