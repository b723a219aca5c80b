"""What a data set is made of: its splits, how training images are augmented, and the source of both."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cctool.base.errors import DataError

Shape = tuple[int, int, int]
Target = int | Tensor
"""What an image is to be told as: a class index, or a tensor (a mask, a vector, an image)."""

SPLITS = ("train", "validation", "test")
_ROLES = {"train": "training", "validation": "validation", "test": "test"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FINGERPRINT_SAMPLES = 64
FINGERPRINT_BYTES = 65536


class Crop(str, Enum):
    """How a training image is cropped: not at all, at random after padding, or a random part resized."""

    NONE = "none"
    PADDED = "padded"
    RESIZED = "resized"


class Padding(str, Enum):
    """What fills the border of a padded image: black, or the image mirrored at its edge."""

    ZERO = "zero"
    SYMMETRIC = "symmetric"


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented; (seed, epoch, image) alone decide what is drawn.

    Attributes:
        crop: see `Crop`.
        padding: pixels added on every side before a padded crop.
        padding_mode: what these pixels are.
        flip: mirror left to right with probability 1/2.
        rotation: the largest angle in degrees, in both directions; corners that open are black.
        area: smallest and largest share of the image's area that a resized crop takes, in (0, 1].
    """

    crop: Crop = Crop.NONE
    padding: int = 0
    padding_mode: Padding = Padding.ZERO
    flip: bool = False
    rotation: float = 0.0
    area: tuple[float, float] = (0.08, 1.0)


class Stream(Protocol):
    """Images that are read one by one, in worker processes, because they do not fit in memory."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(
        self, index: int, shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> tuple[Tensor, Target | None]:
        """Return image ``index`` as uint8 of ``shape`` [C, H, W], and its target if the stream knows it.

        Args:
            index: 0 <= index < len.
            shape: (C, H, W) to serve.
            augmentation: None for evaluation.
            seed: the only thing that random augmentation may depend on.
        """
        ...

    def take(self, indices: Sequence[int]) -> "Stream":
        """A stream of these images only, in this order."""
        ...


@dataclass(frozen=True, eq=False)
class Loaded:
    """Batches that the caller's own loader makes, in its own order.

    Attributes:
        batches: gives floating-point images [B, C, H, W], or pairs of them and targets [B, ...]; iterated
            once an epoch.
        sizes: images in each batch.
        labelled: whether they are pairs.
    """

    batches: Iterable[Any]
    sizes: tuple[int, ...]
    labelled: bool


@dataclass(frozen=True, eq=False)
class Split:
    """The training, validation or test part of a data set.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        shape: (C, H, W) of the images that `cctool.data.serving.batches` serves from it.
        images: uint8 [N, c, h, w] as stored (perhaps not yet of `shape`); None if `stream` reads them.
        labels: the targets, [N, ...]: int64 [N] for classes, else of any shape and type; None if there are
            none, or if one is only known once `stream` reads its image.
        stream: reads images that are not in memory.
        files: the images' paths relative to `folder`, if they are files.
        masks: likewise the files of their masks, if these are their targets.
        folder: the folder of the files.
        as_given: whether `images` are floating point [N, C, H, W] that the network takes as they are: neither
            normalised nor varied.
        loaded: the caller's batches, likewise taken as they are; in place of `images` and `stream`.
    """

    name: str
    shape: Shape
    images: Tensor | None = None
    labels: Tensor | None = None
    stream: Stream | None = None
    files: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None
    folder: Path | None = None
    as_given: bool = False
    loaded: Loaded | None = None
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        if self.images is not None:
            return len(self.images)
        if self.loaded is not None:
            return sum(self.loaded.sizes)
        return len(self.stream) if self.stream is not None else 0

    def images_on(self, device: torch.device) -> Tensor:
        """The stored images on ``device``, moved there once."""
        if self.images is None:
            raise DataError(f"the {self.name} images are read from files, they are not held in memory")
        if device not in self._on_device:
            self._on_device[device] = self.images.to(device)
        return self._on_device[device]

    def take(self, indices: Sequence[int]) -> "Split":
        """The split of these images only, in this order."""
        if self.loaded is not None:
            raise DataError("batches of a loader are served whole: give a loader over fewer images")
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        return dataclasses.replace(
            self,
            images=None if self.images is None else self.images[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            stream=None if self.stream is None else self.stream.take(indices),
            files=None if self.files is None else tuple(self.files[i] for i in indices),
            masks=None if self.masks is None else tuple(self.masks[i] for i in indices),
            _on_device={},
        )


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set that was found: what it holds, how it is best served, and its splits, read on demand.

    Attributes:
        name: the kind, such as ``cifar10``.
        reference: as the user wrote it, such as ``cifar10:DIR``.
        classes: class names in the order of the labels; empty if targets are no classes, or there are none.
        shape: (C, H, W) as served.
        mean: recommended preprocessing, per served channel, of images in 0..1.
        std: likewise.
        augmentation: recommended for training.
        loaders: split name -> function that reads it.
        notes: what was converted, held out or found unusual, one sentence each.
        whole: reads all images together; None unless the splits were made here and not by the source.
        limit: the largest number of images that are served of a split.
        held: whether it is in the caller's memory, where no reference leads.
        task: name of the task that its targets are for; None if nothing says which.
        labelled: whether any of its splits has targets.
        sizes: images of each split, as far as they are known before it is read.
        warnings: what is probably wrong with it, one sentence each.
        others: references of the data sets whose splits take the place of its own, by split.
    """

    name: str
    reference: str
    classes: tuple[str, ...]
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    loaders: Mapping[str, Callable[[], Split]]
    notes: tuple[str, ...] = ()
    whole: Callable[[], Split] | None = None
    limit: int | None = None
    held: bool = False
    task: str | None = "classification"
    labelled: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    _loaded: dict[str, Split] = field(default_factory=dict, repr=False)
    _served: dict[str, Split] = field(default_factory=dict, repr=False)

    def split(self, name: str) -> Split:
        """Return the split ``train``, ``validation`` or ``test``, which is read the first time only.

        Raises:
            DataError: the data set has no such split, or its files are damaged.
        """
        if name not in self._served:
            limited = _limited(self._load(name), self.limit)
            self._served[name] = dataclasses.replace(limited, name=name, shape=self.shape, _on_device={})
        return self._served[name]

    def origin(self, split: str) -> str:
        """Reference of the data set that a split is from."""
        return self.others.get(split, self.reference)

    def contents(self) -> str:
        """How many classes it has, if any, and how many images are served of each split.

        Raises:
            DataError: a split, whose size is known only once it is read, is damaged.
        """
        classes = f"{_counted(len(self.classes), 'class', 'classes')}; " if self.classes else ""
        counts = [f"{self._count(name):,} {word}" for name, word in _ROLES.items() if name in self.loaders]
        single = len(counts) == 1 and counts[0].startswith("1 ")
        return f"{classes}{', '.join(counts) or 'no'} image{'' if single else 's'}"

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the class names, and each split's size and a sample of its images as stored.

        It does not depend on the served shape or on ``--limit``, so one data set has one fingerprint.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for name in SPLITS:
            if name in self.loaders:
                _add_to_digest(digest, self._load(name))
        return digest.hexdigest()

    def _count(self, name: str) -> int:
        size = self.sizes.get(name)
        return min(len(self.split(name)) if size is None else size, self.limit or sys.maxsize)

    def _load(self, name: str) -> Split:
        if name not in self.loaders:
            there_are = ", ".join(self.loaders) or "none"
            option = {"validation": "; name one with --val-data", "test": "; name one with --test-data"}
            lacks = f"{name} split{'' if self.labelled else ' and no labels'}"
            raise DataError(f"{self.reference} has no {lacks} (it has: {there_are}){option.get(name, '')}")
        if name not in self._loaded:
            self._loaded[name] = self.loaders[name]()
        return self._loaded[name]


def _counted(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _limited(split: Split, limit: int | None) -> Split:
    """At most ``limit`` images, evenly spread, so that a source that is sorted by class keeps all classes."""
    if limit is None or limit >= len(split):
        return split
    return split.take([index * len(split) // limit for index in range(limit)])


def _add_to_digest(digest: "hashlib._Hash", split: Split) -> None:
    digest.update(f"{split.name} {len(split)}".encode())
    # A bounded sample, because reading all of a large data set takes minutes.
    sample = np.linspace(0, max(len(split) - 1, 0), num=min(FINGERPRINT_SAMPLES, len(split)), dtype=np.int64)
    for index in sample.tolist():
        if split.labels is not None:
            digest.update(_target_bytes(split.labels[index]))
        if split.files is not None and split.folder is not None:
            digest.update(split.files[index].encode())
            digest.update(_head(split.folder / split.files[index]))
            if split.masks is not None:
                digest.update(_head(split.folder / split.masks[index]))
        elif split.images is not None:
            digest.update(split.images[index].contiguous().numpy().tobytes())
        elif split.stream is not None:
            image, label = split.stream.read(index, split.shape, None, 0)
            digest.update(_target_bytes(label) + image.numpy().tobytes())


def _target_bytes(target: Target | None) -> bytes:
    if isinstance(target, Tensor) and target.dim():
        return target.contiguous().numpy().tobytes()
    return str(target.item() if isinstance(target, Tensor) else target).encode()


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return str(path.stat().st_size).encode() + file.read(FINGERPRINT_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
