"""A data set made by the user's own function, ``my.py:factory``, named on the command line.

The function takes no arguments and returns a mapping, or an object with attributes:

- ``train``, ``validation``, ``test``: each is either a pair of arrays (uint8 images [N, H, W], [N, H, W, C]
  or [N, C, H, W]; integer labels [N]) that is held in memory, or a map-style data set (``__len__`` and
  ``__getitem__``) of pairs (image, label) that is read on demand. An image is a PIL image, a uint8 array
  [H, W] or [H, W, C], a uint8 tensor [C, H, W], or a floating-point tensor [C, H, W] in 0..1. At least one
  split is required.
- ``classes``: the class names, or their number.
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
from cctool.data.records import IMAGENET_MEAN, IMAGENET_STD, SPLITS, Augmentation, DataSource, Shape, Split
from cctool.data.serving import augment
from cctool.data.serving.convert import convert
from cctool.data.splits import held_out


@dataclass(frozen=True)
class UserStream:
    """A user's map-style data set, read one item at a time; implements `cctool.data.records.Stream`."""

    reference: str
    dataset: Any
    classes: int
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(
        self, index: int, shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> tuple[Tensor, int | None]:
        """Return item ``index`` as uint8 [C, H, W] and its label, with all random states set by ``seed``.

        Raises:
            UserCodeError: the data set raised, or gave something other than (image, label).
        """
        position = self.indices[index]
        with _seeded(seed):
            item = user_code.call_often(self.reference, self.dataset.__getitem__, position)
        where = f"{self.reference}: item {position}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise UserCodeError(f"{where} is a {type(item).__name__}, not a pair (image, label)")
        image, label = _image(item[0], where).unsqueeze(0), _label(item[1], self.classes, where)
        if augmentation is not None:
            size = (image.shape[2], image.shape[3])
            image = augment.apply(image, augment.draw(1, size, augmentation, seed, 0), augmentation)
        served = convert(image, shape)[0]
        return (served if served.dtype == torch.uint8 else served.round().to(torch.uint8)), label

    def take(self, indices: Sequence[int]) -> "UserStream":
        """A stream of these items only, in this order."""
        return replace(self, indices=tuple(self.indices[index] for index in indices))


def open_user_data(reference: str, named: Collection[str]) -> DataSource:
    """Call the user's function and check what it returns.

    A missing validation split is held out of the training split (a tenth, by a fixed permutation); a missing
    test split is replaced by the validation split. A note reports either.

    Args:
        reference: ``my.py:factory`` or ``package.module:factory``.
        named: the references that the command line names.

    Raises:
        DataError: the reference was not named.
        UserCodeError: the function failed or returned the wrong thing.
    """
    if not user_code.is_named(reference, named):
        raise DataError(
            f"{reference} is user code, which runs only when it is named: name it with --data {reference}"
        )
    returned = user_code.call(reference, user_code.load(reference))
    classes = _classes(_get(returned, "classes"), reference)
    parts = {name: _get(returned, name) for name in SPLITS}
    given = {name: part for name, part in parts.items() if part is not None}
    if not given:
        raise UserCodeError(
            f"{reference} returned a {type(returned).__name__} with none of {', '.join(SPLITS)}; "
            "it must return a mapping with at least one of them, and 'classes'"
        )
    splits = {name: _split(name, part, reference, len(classes)) for name, part in given.items()}
    shape = next(iter(splits.values())).shape
    divided, notes = _complete(reference, splits)
    mean, std = _statistics(returned, shape[0], reference)
    return DataSource(
        name=reference,
        reference=reference,
        classes=classes,
        shape=shape,
        mean=mean,
        std=std,
        augmentation=Augmentation(),
        loaders={name: partial(divided.__getitem__, name) for name in divided},
        notes=notes,
    )


def _get(returned: Any, name: str) -> Any:
    return returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)


def _classes(classes: Any, reference: str) -> tuple[str, ...]:
    if isinstance(classes, int) and not isinstance(classes, bool) and classes >= 1:
        return tuple(str(label) for label in range(classes))
    if isinstance(classes, (list, tuple)) and classes:
        return tuple(str(name) for name in classes)
    raise UserCodeError(
        f"{reference} returned classes={classes!r}; it must give the class names, or their number"
    )


def _split(name: str, part: Any, reference: str, classes: int) -> Split:
    where = f"{reference}: {name}"
    if isinstance(part, (tuple, list)) and len(part) == 2 and all(hasattr(array, "shape") for array in part):
        images, labels = _images(part[0], where), torch.as_tensor(part[1])
        if labels.dim() != 1 or len(labels) != len(images) or labels.is_floating_point() or not len(images):
            raise UserCodeError(f"{where} has {len(images)} images but labels of shape {tuple(labels.shape)}")
        for label in (int(labels.min()), int(labels.max())):
            _label(label, classes, where)
        return Split(name, _shape(images[0]), images=images, labels=labels.to(torch.int64))
    if not hasattr(part, "__getitem__") or not hasattr(part, "__len__"):
        raise UserCodeError(
            f"{where} is a {type(part).__name__}; it must be a pair of arrays (images, labels), "
            "or a data set with __len__ and __getitem__"
        )
    count = user_code.call(reference, part.__len__)
    if count == 0:
        raise UserCodeError(f"{where} has no items")
    stream = UserStream(reference, part, classes, tuple(range(count)))
    item = user_code.call(reference, part.__getitem__, 0)
    first = item[0] if isinstance(item, (tuple, list)) and item else item
    return Split(name, _shape(_image(first, f"{where}: item 0")), stream=stream)


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


def _label(label: Any, classes: int, where: str) -> int:
    try:
        value = int(label)
    except (TypeError, ValueError) as error:
        raise UserCodeError(f"{where} has the label {label!r}; it must be a whole number") from error
    if not 0 <= value < classes:
        raise UserCodeError(
            f"{where} has the label {value}; with {classes} classes it must lie in 0..{classes - 1}"
        )
    return value


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
