"""torchvision's classifiers, segmentation networks and detectors as ``torchvision:NAME``.

They are built with random weights, and nothing is downloaded meanwhile; `published` says where torchvision's
own weights are. A segmentation network returns a dict: ``out`` of shape (N, classes, H, W), and ``aux``
of the same shape where it was built with ``aux_loss=true``. A detector returns a list with a dict for each
image (``boxes``, ``labels``, ``scores``), whose lengths depend on the image; it resizes and normalises images
itself, and its ``num_classes`` includes the background.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import nn

from cctool.base.errors import ArchitectureError
from cctool.models.published import Published, distinct, from_address

# These read files, download or print, and a spec may come from an untrusted file.
REFUSED = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"})
# Their constructors warn that the default of `init_weights` will change, unless it is given.
NEED_INIT_WEIGHTS = frozenset({"googlenet", "inception_v3"})
# What torchvision sets where weights are given, besides the number of classes.
ARGUMENTS_OF_WEIGHTS = {name: {"transform_input": True} for name in ("googlenet", "inception_v3")}
IMAGENET_CLASSES = 1000
# Older versions of torchvision gave two classes each the names "crane" and "maillot".
RENAMED = {(134, "crane"): "crane bird", (639, "maillot"): "maillot tank suit"}
INPUT_SIZES = {"inception_v3": 299}
DEFAULT_SIZE = 224
_DETECTOR_SIZES = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 320,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}
_DETECTOR_SIZE = 800


@cache
def classifiers() -> tuple[str, ...]:
    """The names of all of torchvision's classifiers, sorted."""
    from torchvision import models

    return tuple(models.list_models(module=models))


@cache
def segmentation_networks() -> tuple[str, ...]:
    """The names of all of torchvision's segmentation networks, sorted."""
    from torchvision import models

    return tuple(models.list_models(module=models.segmentation))


@cache
def detectors() -> tuple[str, ...]:
    """The names of all of torchvision's detectors, sorted."""
    from torchvision import models

    return tuple(models.list_models(module=models.detection))


def task_of(name: str) -> str | None:
    """``segmentation`` for a segmentation network; None for others."""
    return "segmentation" if name in segmentation_networks() else None


def names() -> tuple[str, ...]:
    """The names of all networks that can be built, sorted."""
    return tuple(sorted({*classifiers(), *segmentation_networks(), *detectors()}))


def allowed_arguments(name: str) -> tuple[str, ...]:
    """The arguments that may be set: those with JSON values that the builder does not set itself."""
    from torchvision import models

    if name in segmentation_networks():
        return ("num_classes",) if name.startswith("lraspp") else ("aux_loss", "num_classes")
    builder = inspect.signature(models.get_model_builder(name))
    constructor = builder.return_annotation
    if name in detectors():
        numbers = _numbers(inspect.signature(constructor.__init__))
        # Those of fixed size are named for it, and their anchors are made for it.
        sizes = {"min_size", "max_size"} if "min_size" in numbers or "max_size" in numbers else set()
        keypoints = {"num_keypoints"} & set(builder.parameters)
        return tuple(sorted({"num_classes"} | numbers | sizes | keypoints))
    found = {
        parameter.name
        for parameter in inspect.signature(constructor.__init__).parameters.values()
        if parameter.default is not inspect.Parameter.empty and "Callable" not in str(parameter.annotation)
    }
    if name.startswith("vit_"):
        # The builder sets it to 224 unless it is given, so it has no default in the constructor.
        found.add("image_size")
    if name == "maxvit_t":
        found.add("input_size")
    return tuple(sorted(found - REFUSED))


def _numbers(signature: inspect.Signature) -> set[str]:
    """The parameters whose defaults are numbers: thresholds, counts and sizes."""
    found = signature.parameters.values()
    return {p.name for p in found if isinstance(p.default, (int, float)) and not isinstance(p.default, bool)}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the network ``name`` with random weights.

    Raises:
        ArchitectureError: an argument is refused or unknown.
    """
    from torchvision import models

    allowed = allowed_arguments(name)
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        why = " (weights are not downloaded: give a file of them)" if REFUSED & set(unknown) else ""
        raise ArchitectureError(
            f"torchvision:{name} does not take {', '.join(unknown)}; allowed: {', '.join(allowed)}{why}"
        )
    arguments = dict(arguments)
    if name in NEED_INIT_WEIGHTS:
        arguments.setdefault("init_weights", True)
    if name in segmentation_networks() or name in detectors():
        arguments["weights_backbone"] = None  # its default would be downloaded
    model: nn.Module = models.get_model(name, weights=None, progress=False, **arguments)
    return model


def default_arguments(channels: int | None, classes: int | None) -> dict[str, int]:
    """``num_classes`` from the data set; the channels are always three, so gray images are served as RGB."""
    return {} if classes is None else {"num_classes": classes}


def input_shape(name: str, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """The input size (3, H, W) that ``name`` was made for, or that of the arguments.

    224x224 or 299x299; for a detector, the size that it scales images to.
    """
    if name in detectors():
        side = _detector_size(name, arguments)
        return 3, side, side
    size = arguments.get("image_size", arguments.get("input_size", INPUT_SIZES.get(name, DEFAULT_SIZE)))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return 3, int(height), int(width)


def _detector_size(name: str, arguments: Mapping[str, Any]) -> int:
    size = arguments.get("min_size", _DETECTOR_SIZES.get(name, _DETECTOR_SIZE))
    return int(size[-1] if isinstance(size, (list, tuple)) else size)


def published(name: str) -> Published:
    """The weights that torchvision gives this network by default.

    Raises:
        ArchitectureError: there are none.
    """
    from torchvision import models

    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    if weights is None:
        raise ArchitectureError(f"torchvision publishes no weights of {name}")
    served = weights.transforms()
    classes = class_names(weights.meta["categories"])
    arguments: dict[str, Any] = {"num_classes": len(classes), **ARGUMENTS_OF_WEIGHTS.get(name, {})}
    if "aux_loss" in allowed_arguments(name):
        arguments["aux_loss"] = True
    if name.startswith("vit_"):
        arguments["image_size"] = served.crop_size[0]
    size = getattr(served, "crop_size", None)
    return Published(
        label=weights.url.rpartition("/")[2],
        arguments=arguments,
        input_shape=(3, size[0], size[0]) if size else input_shape(name, arguments),
        classes=classes,
        # Networks without these take images in 0..1, and normalise them themselves.
        mean=tuple(getattr(served, "mean", (0.0,) * 3)),
        std=tuple(getattr(served, "std", (1.0,) * 3)),
        fetch=partial(from_address, f"torchvision:{name}", weights.url),
    )


def class_names(categories: Sequence[str]) -> tuple[str, ...]:
    """Torchvision's names of classes, which are distinct in the same way in all of its versions."""
    return distinct(
        [
            RENAMED.get((i, name), name) if len(categories) == IMAGENET_CLASSES else name
            for i, name in enumerate(categories)
        ]
    )


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of the 1000 classes of ILSVRC2012, in the order of every network's outputs."""
    from torchvision import models

    return class_names(models.ResNet18_Weights.DEFAULT.meta["categories"])
