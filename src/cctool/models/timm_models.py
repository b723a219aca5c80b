"""timm's classifiers as ``timm:NAME`` (the ``timm`` extra), always with random weights."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from cctool.base.errors import ArchitectureError

# A spec may come from an untrusted file: `checkpoint_path` would unpickle a file, and `pretrained*` download
# one. The others would build something other than a classifier, or on another device.
REFUSED = frozenset({
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "feature_cls",
    "features_only", "kwargs_filter", "model_cfg", "no_jit", "out_indices", "pruned", "scriptable",
})  # fmt: skip
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
