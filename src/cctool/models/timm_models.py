"""timm's classifiers as ``timm:NAME`` (the ``timm`` extra).

They are built with random weights, and nothing is downloaded meanwhile; `published` says where the published
ones are.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from cctool.base.errors import ArchitectureError
from cctool.models.published import Published, distinct, from_address, from_hub
from cctool.models.torchvision_models import IMAGENET_CLASSES, imagenet_classes

# A spec may come from an untrusted file: `checkpoint_path` would unpickle a file, and `pretrained*` download
# one. The others would build something other than a classifier, or on another device.
REFUSED = frozenset({
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "feature_cls",
    "features_only", "kwargs_filter", "model_cfg", "no_jit", "out_indices", "pruned", "scriptable",
})  # fmt: skip
# Names of a file of weights in a repository, the safe format first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
DEFAULT_SHAPE = (3, 224, 224)


@cache
def names() -> tuple[str, ...]:
    """The names of all timm models, without pretrained tags, sorted.

    Raises:
        ArchitectureError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ArchitectureError(
            "timm:NAME needs the timm package, which is not installed: pip install 'cctool[timm]'"
        ) from error
    return tuple(timm.list_models())


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the timm model ``name`` with random weights.

    Raises:
        ArchitectureError: an argument would read a file, reach the network or not give a classifier.
    """
    import timm

    refused = sorted(key for key in arguments if key in REFUSED or key.startswith("pretrained"))
    if refused:
        raise ArchitectureError(
            f"timm:{name} does not take {', '.join(refused)} here: nothing is downloaded or read from a file "
            "while a network is built; give a checkpoint file with --arch instead"
        )
    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model


def default_arguments(channels: int | None, classes: int | None) -> dict[str, int]:
    """``in_chans`` and ``num_classes`` from the data set."""
    found = {"in_chans": channels, "num_classes": classes}
    return {key: value for key, value in found.items() if value is not None}


def input_shape(name: str, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """The input size (C, H, W) of timm's configuration of ``name``, or of ``in_chans`` and ``img_size``."""
    import timm

    configuration = timm.get_pretrained_cfg(name)
    channels, height, width = configuration.input_size if configuration else DEFAULT_SHAPE
    size = arguments.get("img_size", (height, width))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(arguments.get("in_chans", channels)), int(height), int(width)


def published(name: str) -> Published:
    """The weights that timm gives ``name``, which may have a tag, as in ``resnet18.a1_in1k``.

    Networks of 1000 classes are taken to know those of ILSVRC2012, as timm itself does.

    Raises:
        ArchitectureError: there are none.
    """
    import timm

    found = timm.get_pretrained_cfg(name)
    reference = f"timm:{name}"
    fetch: Callable[[], Path]
    if found is not None and found.num_classes and found.hf_hub_id:
        names = (found.hf_hub_filename,) if found.hf_hub_filename else HUB_FILES
        label, fetch = found.hf_hub_id, partial(from_hub, reference, found.hf_hub_id, names)
    elif found is not None and found.num_classes and isinstance(found.url, str) and found.url:
        label, fetch = found.url.rpartition("/")[2], partial(from_address, reference, found.url)
    else:
        raise ArchitectureError(f"timm publishes no weights of a classifier {name}")
    classes = distinct(found.label_names) if found.label_names else None
    if classes is None and found.num_classes == IMAGENET_CLASSES:
        classes = imagenet_classes()
    return Published(
        label=label,
        arguments={"in_chans": found.input_size[0], "num_classes": found.num_classes},
        input_shape=found.input_size,
        classes=classes,
        mean=tuple(found.mean),
        std=tuple(found.std),
        fetch=fetch,
    )
