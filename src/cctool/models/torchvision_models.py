"""torchvision's classifiers, segmentation networks and detectors as ``torchvision:NAME``, random weights.

Nothing is downloaded. A segmentation network returns a dict: ``out`` of shape (N, classes, H, W), and ``aux``
of the same shape where it was built with ``aux_loss=true``. A detector returns a list with a dict for each
image (``boxes``, ``labels``, ``scores``), whose lengths depend on the image; it resizes and normalises images
itself, and its ``num_classes`` includes the background.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from cctool.base.errors import ArchitectureError

# These read files, download or print, and a spec may come from an untrusted file.
REFUSED = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"})
# Their constructors warn that the default of `init_weights` will change, unless it is given.
NEED_INIT_WEIGHTS = frozenset({"googlenet", "inception_v3"})
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
