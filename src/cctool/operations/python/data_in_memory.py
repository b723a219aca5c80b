"""Data in memory: the caller's loaders and tensors, which go to the network without preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cctool.base.errors import DataError
from cctool.data.classes import IGNORED
from cctool.data.records import SPLITS, Augmentation, DataSource, Loaded, Shape, Split

_WITH_CLASSES = ("classification", "segmentation")


def is_reference(data: Any) -> bool:
    """Whether data are named, as ``digits`` or ``folder:DIR``, and not in memory."""
    return data is None or isinstance(data, str)


def in_memory(parts: Mapping[str, Any], classes: tuple[str, ...], limit: int | None) -> DataSource:
    """A data set of loaders or tensors.

    Args:
        parts: ``train``, ``validation`` or ``test`` -> a loader of (images, targets) or images; a pair of
            tensors (images, targets); or images alone. Images are floating point [N, C, H, W], normalised
            already. Whole numbers [N] are class indices, whole numbers [N, H, W] masks of classes, floating
            point [N, ...] values to be told; other targets need a task that is named.
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
    examples = {name: found for name, split in splits.items() if (found := _example(split)) is not None}
    tasks = {name: _task_of(found) for name, found in examples.items()}
    if len(set(tasks.values())) > 1:
        told = ", ".join(f"{name} for {task}" for name, task in tasks.items())
        raise DataError(f"data in memory: the parts' targets differ in kind: {told}")
    task = next(iter(tasks.values()), None)
    return DataSource(
        name="data in memory",
        reference=f"in memory (n={len(first)}, {'x'.join(map(str, shape))})",
        classes=(classes or _numbered(splits.values())) if task in _WITH_CLASSES else (),
        shape=shape,
        # Images are neither scaled nor centred: (x / 255 - mean) / std would be x.
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
        augmentation=Augmentation(),
        loaders={name: partial(splits.__getitem__, name) for name in splits},
        limit=limit,
        held=True,
        task=task,
        labelled=bool(examples),
        sizes={name: len(split) for name, split in splits.items()},
    )


def _example(split: Split) -> Tensor | None:
    """Some targets of a part, [B, ...]; None if it has none."""
    if split.loaded is None:
        return split.labels
    first = next(iter(split.loaded.batches)) if split.loaded.labelled else (None, None)
    return first[1] if isinstance(first[1], Tensor) else None


def _task_of(targets: Tensor) -> str | None:
    """The task that targets [B, ...] are for, if their type and shape say it."""
    if targets.is_floating_point():
        return "regression"
    whole = targets.dtype != torch.bool
    return {1: "classification", 3: "segmentation"}.get(targets.dim()) if whole else None


def _numbered(splits: Iterable[Split]) -> tuple[str, ...]:
    """Names for the classes that occur in tensors; () where loaders hold them."""
    held = [split.labels for split in splits if split.labels is not None]
    found = [labels[labels != IGNORED] if labels.dim() > 1 else labels for labels in held]
    largest = max((int(labels.max()) for labels in found if labels.numel()), default=-1)
    return tuple(map(str, range(largest + 1)))


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
    if labels is None or labels.is_floating_point() or labels.dtype == torch.bool:
        targets = labels
    else:
        targets = labels.to(torch.int64)
    if targets is not None and (not targets.dim() or len(targets) != len(images) or targets.is_complex()):
        raise DataError(
            f"data in memory, {name}: targets [{len(images)}] or [{len(images)}, ...] are expected, one for "
            f"each image, not {targets.dtype} of shape {tuple(targets.shape)}"
        )
    return Split(name, _shape(images), images=images, labels=targets, as_given=True)


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
