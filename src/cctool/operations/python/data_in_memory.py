"""Data in memory: the caller's loaders and tensors, which go to the network without preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cctool.base.errors import DataError
from cctool.data.records import SPLITS, Augmentation, DataSource, Loaded, Shape, Split


def is_reference(data: Any) -> bool:
    """Whether data are named, as ``digits`` or ``folder:DIR``, and not in memory."""
    return data is None or isinstance(data, str)


def in_memory(parts: Mapping[str, Any], classes: tuple[str, ...], limit: int | None) -> DataSource:
    """A data set of loaders or tensors.

    Args:
        parts: ``train``, ``validation`` or ``test`` -> a loader of (images, labels) or images; a pair of
            tensors (images, labels); or images alone. Images are floating point [N, C, H, W], normalised
            already; labels are int64 [N].
        classes: names of the network's classes; empty if unknown.
        limit: use at most this many images of each pair of tensors.

    Raises:
        DataError: if a part is something else, is empty, or its images differ in shape from another part's.
    """
    splits = {name: _split(name, part) for name, part in parts.items()}
    unknown = sorted(splits.keys() - set(SPLITS))
    if unknown or not splits:
        raise DataError(
            f"data in memory: {', '.join(SPLITS)} are the parts, not {', '.join(unknown) or 'none'}"
        )
    shapes = {split.shape for split in splits.values()}
    if len(shapes) > 1:
        raise DataError(f"data in memory: the parts' images differ in shape: {sorted(shapes)}")
    (shape,) = shapes
    first = splits[next(name for name in SPLITS if name in splits)]
    labels = max(
        (int(split.labels.max()) + 1 for split in splits.values() if split.labels is not None), default=0
    )
    return DataSource(
        name="data in memory",
        reference=f"in memory (n={len(first)}, {'x'.join(map(str, shape))})",
        classes=classes or tuple(map(str, range(labels))),
        shape=shape,
        # Images are neither scaled nor centred: (x / 255 - mean) / std would be x.
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
        augmentation=Augmentation(),
        loaders={name: partial(splits.__getitem__, name) for name in splits},
        limit=limit,
        held=True,
    )


def _split(name: str, part: Any) -> Split:
    if isinstance(part, Tensor):
        return _of_tensors(name, part, None)
    if isinstance(part, (tuple, list)) and len(part) == 2 and all(isinstance(item, Tensor) for item in part):
        return _of_tensors(name, part[0], part[1])
    if isinstance(part, Iterable) and not isinstance(part, (str, bytes, tuple, list, Mapping)):
        return _of_loader(name, part)
    raise DataError(
        f"data in memory, {name}: a loader, a pair of tensors (images, labels) or a tensor of images is "
        f"expected, not {_named(part)}"
    )


def _named(part: Any) -> str:
    """The type of something, with those of its items."""
    name = type(part).__name__
    items = {type(item).__name__: None for item in part} if isinstance(part, (tuple, list)) else {}
    return f"{name} of {', '.join(items)}" if items else name


def _of_tensors(name: str, images: Tensor, labels: Tensor | None) -> Split:
    if images.dim() != 4 or not images.is_floating_point() or not len(images):
        raise DataError(
            f"data in memory, {name}: floating-point images [N, C, H, W] are expected, as the network takes "
            f"them, not {images.dtype} of shape {tuple(images.shape)}"
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
        raise DataError(
            f"data in memory, {name}: whole-number labels [{len(images)}] are expected, "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    whole = None if labels is None else labels.to(torch.int64)
    return Split(name, _shape(images), images=images, labels=whole, as_given=True)


def _of_loader(name: str, loader: Iterable[Any]) -> Split:
    batches = iter(loader)
    if batches is loader:
        raise DataError(
            f"data in memory, {name}: a {type(loader).__name__} gives its batches once only; "
            "a loader that can start again is needed"
        )
    first = next(batches, None)
    images = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise DataError(
            f"data in memory, {name}: the loader must give images [B, C, H, W], or pairs of them and labels, "
            f"not {type(images).__name__}"
        )
    labelled = isinstance(first, (tuple, list)) and len(first) > 1
    return Split(
        name, _shape(images), as_given=True, loaded=Loaded(loader, _sizes(loader), labelled=labelled)
    )


def _sizes(loader: Iterable[Any]) -> tuple[int, ...]:
    """Number of images in each batch: computed for a `DataLoader`, counted in one pass for other loaders."""
    if isinstance(loader, DataLoader) and loader.batch_size is not None and isinstance(loader.sampler, Sized):
        whole, rest = divmod(len(loader.sampler), loader.batch_size)
        return (loader.batch_size,) * whole + ((rest,) if rest and not loader.drop_last else ())
    return tuple(len(item[0] if isinstance(item, (tuple, list)) else item) for item in loader)


def _shape(images: Tensor) -> Shape:
    return images.shape[1], images.shape[2], images.shape[3]
