"""A data set made by the user's own function, ``my.py:factory``, named on the command line.

The function takes the arguments that the command line gives and returns a mapping, or an object with
attributes:

- ``train``, ``validation``, ``test``: each is either a pair of arrays (uint8 images [N, H, W], [N, H, W, C]
  or [N, C, H, W]; targets [N, ...]) that is held in memory, or a map-style data set (``__len__`` and
  ``__getitem__``) of pairs (image, target) that is read on demand. An image is a PIL image, a uint8 array
  [H, W] or [H, W, C], a uint8 tensor [C, H, W], or a floating-point tensor [C, H, W] in 0..1. At least one
  split is required. What a target may be is said in `user_targets`.
- ``classes``: the class names, or their number; only needed if targets are class indices.
- ``task`` (optional): name of the task that the targets are for, where they do not show it.
- ``mean``, ``std`` (optional): recommended preprocessing per channel, of images in 0..1.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cctool.base import user_code
from cctool.base.errors import DataError, UserCodeError
from cctool.data.records import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SPLITS,
    Augmentation,
    DataSource,
    Shape,
    Split,
    Target,
)
from cctool.data.serving import augment
from cctool.data.serving.convert import convert
from cctool.data.sets.user_targets import Targets, as_tensor, kind_of
from cctool.data.splits import held_out


@dataclass(frozen=True)
class UserStream:
    """A user's map-style data set, read one item at a time; implements `cctool.data.records.Stream`."""

    reference: str
    dataset: Any
    targets: Targets
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(
        self, index: int, shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> tuple[Tensor, Target | None]:
        """Return item ``index`` as uint8 [C, H, W] and its target, with all random states set by ``seed``.

        Raises:
            UserCodeError: the data set raised, or gave something other than (image, target).
        """
        position = self.indices[index]
        with _seeded(seed):
            item = user_code.call_often(self.reference, self.dataset.__getitem__, position)
        where = f"{self.reference}: item {position}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise UserCodeError(f"{where} is a {type(item).__name__}, not a pair (image, label)")
        image, target = _image(item[0], where).unsqueeze(0), self.targets.read(item[1], where)
        if augmentation is not None:
            size = (image.shape[2], image.shape[3])
            image = augment.apply(image, augment.draw(1, size, augmentation, seed, 0), augmentation)
        served = convert(image, shape)[0]
        return (served if served.dtype == torch.uint8 else served.round().to(torch.uint8)), target

    def take(self, indices: Sequence[int]) -> "UserStream":
        """A stream of these items only, in this order."""
        return replace(self, indices=tuple(self.indices[index] for index in indices))


def open_user_data(
    reference: str, named: Collection[str], arguments: Mapping[str, Any] | None = None
) -> DataSource:
    """Call the user's function and check what it returns.

    A missing validation split is held out of the training split (a tenth, by a fixed permutation); a missing
    test split is replaced by the validation split. A note reports either.

    Args:
        reference: ``my.py:factory`` or ``package.module:factory``.
        named: the references that the command line names.
        arguments: keyword arguments of the function; the data set's reference has them, too.

    Raises:
        DataError: the reference was not named.
        UserCodeError: the function failed or returned the wrong thing.
    """
    given = dict(arguments or {})
    if not user_code.is_named(reference, named):
        raise DataError(
            f"{reference} is user code, which runs only when it is named: name it with --data {reference}"
        )
    returned = user_code.call(reference, user_code.load(reference), **given)
    parts = {name: part for name in SPLITS if (part := _get(returned, name)) is not None}
    if not parts:
        raise UserCodeError(
            f"{reference} returned a {type(returned).__name__} with none of {', '.join(SPLITS)}; "
            "it must return a mapping with at least one of them, and 'classes' if there are any"
        )
    classes = _classes(_get(returned, "classes"), reference)
    # Read once: an item may be drawn at random.
    items = {name: _first_item(name, part, reference) for name, part in parts.items() if not _is_pair(part)}
    targets = _targets(reference, parts, items, classes, _get(returned, "task"))
    splits = {
        name: _stream(name, part, items[name], reference, targets)
        if name in items
        else _held(name, part, reference, targets)
        for name, part in parts.items()
    }
    shape = next(iter(splits.values())).shape
    divided, notes = _complete(reference, splits)
    mean, std = _statistics(returned, shape[0], reference)
    return DataSource(
        name=reference,
        reference=user_code.with_arguments(reference, given),
        classes=classes,
        shape=shape,
        mean=mean,
        std=std,
        augmentation=Augmentation(),
        loaders={name: partial(divided.__getitem__, name) for name in divided},
        notes=notes,
        task=targets.task,
        labelled=targets.labelled,
        sizes={name: len(split) for name, split in divided.items()},
    )


def _get(returned: Any, name: str) -> Any:
    return returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)


def _classes(classes: Any, reference: str) -> tuple[str, ...]:
    if classes is None:
        return ()
    if isinstance(classes, int) and not isinstance(classes, bool) and classes >= 1:
        return tuple(str(label) for label in range(classes))
    if isinstance(classes, (list, tuple)) and classes:
        return tuple(str(name) for name in classes)
    raise UserCodeError(
        f"{reference} returned classes={classes!r}; it must give the class names, or their number"
    )


def _targets(
    reference: str,
    parts: Mapping[str, Any],
    items: Mapping[str, Any],
    classes: tuple[str, ...],
    told: Any,
) -> Targets:
    """The kind of the targets, from the first target of the first part."""
    name, part = next(iter(parts.items()))
    if name in items:
        item = items[name]
        # What is no pair is reported when it is read.
        example = item[1] if isinstance(item, (tuple, list)) and len(item) == 2 else 0
    else:
        example = part[1][0] if len(part[1].shape) and len(part[1]) else part[1]
    targets = kind_of(example, classes, told, reference)
    if targets.are_classes and isinstance(example, str):
        targets.index(example, f"{reference}: item 0")
    if targets.are_classes and not classes:
        raise UserCodeError(
            f"{reference} returned classes=None; it must give the class names, or their number"
        )
    return targets


def _is_pair(part: Any) -> bool:
    return isinstance(part, (tuple, list)) and len(part) == 2 and all(hasattr(a, "shape") for a in part)


def _first_item(name: str, part: Any, reference: str) -> Any:
    where = f"{reference}: {name}"
    if not hasattr(part, "__getitem__") or not hasattr(part, "__len__"):
        raise UserCodeError(
            f"{where} is a {type(part).__name__}; it must be a pair of arrays (images, targets), "
            "or a data set with __len__ and __getitem__"
        )
    if user_code.call(reference, part.__len__) == 0:
        raise UserCodeError(f"{where} has no items")
    return user_code.call(reference, part.__getitem__, 0)


def _held(name: str, part: Any, reference: str, targets: Targets) -> Split:
    where = f"{reference}: {name}"
    images, labels = _images(part[0], where), as_tensor(part[1], where)
    if not len(images):
        raise UserCodeError(f"{where} has no images")
    numbers = not labels.is_floating_point() and labels.dim() == 1
    fits = labels.dim() > 0 and len(labels) == len(images) and (numbers or not targets.are_classes)
    if not fits:
        given = f"labels of shape {tuple(labels.shape)} and {labels.dtype}"
        needed = "a whole number as its label" if targets.are_classes else "a target"
        raise UserCodeError(f"{where} has {len(images)} images but {given}; each image needs {needed}")
    if targets.are_classes:
        for label in (int(labels.min()), int(labels.max())):
            targets.index(label, where)
    targets.check(labels, where)
    return Split(name, _shape(images[0]), images=images, labels=labels)


def _stream(name: str, part: Any, item: Any, reference: str, targets: Targets) -> Split:
    count = user_code.call(reference, part.__len__)
    stream = UserStream(reference, part, targets, tuple(range(count)))
    first = item[0] if isinstance(item, (tuple, list)) and item else item
    return Split(name, _shape(_image(first, f"{reference}: {name}: item 0")), stream=stream)


def _complete(reference: str, splits: dict[str, Split]) -> tuple[dict[str, Split], tuple[str, ...]]:
    notes = []
    if "train" in splits and "validation" not in splits:
        count = len(splits["train"])
        kept, held = held_out(count, max(1, count // 10))
        splits["validation"] = splits["train"].take(held)
        splits["train"] = splits["train"].take(kept)
        notes.append(f"{reference} gives no validation part: {len(held)} training images are held out")
    if "validation" in splits and "test" not in splits:
        splits["test"] = splits["validation"]
        notes.append(f"{reference} gives no test part: its validation images stand in; see --test-data")
    return splits, tuple(notes)


def _statistics(returned: Any, channels: int, reference: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found = []
    for name, imagenet, other in (("mean", IMAGENET_MEAN, 0.5), ("std", IMAGENET_STD, 0.25)):
        default = imagenet if channels == 3 else (other,) * channels
        values = _get(returned, name)
        try:
            given = default if values is None else tuple(float(value) for value in values)
        except (TypeError, ValueError) as error:
            raise UserCodeError(f"{reference} returned {name}={values!r}; it must be numbers") from error
        if len(given) != channels:
            raise UserCodeError(f"{reference} returned {len(given)} values as {name} for {channels} channels")
        found.append(given)
    return found[0], found[1]


def _images(images: Any, where: str) -> Tensor:
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8 or tensor.dim() not in (3, 4):
        raise UserCodeError(
            f"{where} has images of type {tensor.dtype} and shape {tuple(tensor.shape)}; they must be uint8 "
            "[N, H, W], [N, H, W, C] or [N, C, H, W]"
        )
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    # Images 1 or 3 pixels high are taken as channels first: the size alone cannot tell.
    channels_last = tensor.shape[3] in (1, 3) and tensor.shape[1] not in (1, 3)
    return tensor.permute(0, 3, 1, 2).contiguous() if channels_last else tensor.contiguous()


def _image(image: Any, where: str) -> Tensor:
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        pixels = image[:, :, None] if image.ndim == 2 else image
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    if isinstance(image, Tensor) and image.dim() == 3:
        if image.dtype == torch.uint8:
            return image
        # NaN fails this test, too.
        if image.is_floating_point() and bool(((image >= 0) & (image <= 1)).all()):
            return (image * 255).round().to(torch.uint8)
        raise UserCodeError(
            f"{where}: a tensor of {image.dtype} must lie in 0..1; leave normalising to --mean, --std"
        )
    kind = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
    raise UserCodeError(f"{where}: the image is a {kind}; see docs/datasets.md for what it may be")


def _shape(image: Tensor) -> Shape:
    return image.shape[0], image.shape[1], image.shape[2]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random with ``seed``, and restore their states afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
