"""MNIST and Fashion-MNIST from their files in LeCun's idx format, compressed (.gz) or not."""

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.places import download_allowed, missing, root_folder
from cctool.data.records import Augmentation, Crop, DataSource, Shape
from cctool.data.splits import official_loaders, official_sizes

IMAGES_MAGIC = 0x00000803
LABELS_MAGIC = 0x00000801
CLASSES = 10
PARTS = {True: "train", False: "t10k"}
_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class MnistSet:
    """The name, classes, statistics and augmentation of one of the two sets."""

    name: str
    torchvision_class: str
    classes: tuple[str, ...]
    mean: float
    std: float
    augmentation: Augmentation


MNIST = MnistSet(
    "mnist",
    "MNIST",
    tuple(str(digit) for digit in range(CLASSES)),
    0.1307,
    0.3081,
    Augmentation(crop=Crop.PADDED, padding=2, rotation=10.0),
)
FASHION_MNIST = MnistSet(
    "fashion-mnist",
    "FashionMNIST",
    _CLOTHES,
    0.2860,
    0.3530,
    Augmentation(crop=Crop.PADDED, padding=2, flip=True),
)


def open_mnist(layout: MnistSet, reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open MNIST or Fashion-MNIST, with the splits of `official_loaders`; ``input_shape`` has no effect.

    Raises:
        DataError: the files were not found; the message says where they belong.
    """
    root = root_folder(folder)
    places = [root / layout.torchvision_class / "raw", root / "raw", root]
    place = _find(places)
    if place is None and download_allowed():
        _download(layout, root)
        place = _find(places)
    if place is None:
        raise missing(reference, "train-images-idx3-ubyte[.gz] and its siblings", places, downloadable=True)
    first, _ = _read(place, train=False)
    sizes = official_sizes(_count(place), len(first))
    shape = (1, first.shape[2], first.shape[3])
    return DataSource(
        name=layout.name,
        reference=reference,
        classes=layout.classes,
        shape=shape,
        mean=(layout.mean,),
        std=(layout.std,),
        augmentation=layout.augmentation,
        loaders=official_loaders(partial(_read, place), shape),
        sizes=sizes,
    )


def read_idx(path: Path, magic: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Read an idx file of unsigned bytes: magic, a big-endian 32-bit size per dimension, then the values.

    Args:
        path: the file, compressed by gzip if it ends in ``.gz``.
        magic: 0x0803 for images, 0x0801 for labels.

    Raises:
        DataError: it cannot be read, is of another kind, or its length is not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from error
    # The last byte of an idx magic is the number of dimensions.
    header = 4 * (1 + (magic & 0xFF))
    sizes = np.frombuffer(content[:header], dtype=">u4") if len(content) >= header else np.zeros(1, ">u4")
    if int(sizes[0]) != magic:
        raise DataError(f"{path} is damaged: an idx file of this kind starts with 0x{magic:08x}")
    shape = [int(size) for size in sizes[1:]]
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} is damaged: {len(content) - header} bytes follow a header of {math.prod(shape)}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _find(places: list[Path]) -> Path | None:
    return next((place for place in places if _file(place, "train-images-idx3-ubyte") is not None), None)


def _file(place: Path, name: str) -> Path | None:
    return next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)


def _read(place: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    arrays = []
    for kind, magic in (("images-idx3", IMAGES_MAGIC), ("labels-idx1", LABELS_MAGIC)):
        name = f"{PARTS[train]}-{kind}-ubyte"
        path = _file(place, name)
        if path is None:
            raise DataError(f"{place / name}[.gz] is missing; put it into the folder of the other files")
        arrays.append(read_idx(path, magic))
    images, labels = arrays
    if len(images) != len(labels) or not len(images):
        raise DataError(f"{place} is damaged: {len(images)} {PARTS[train]} images, but {len(labels)} labels")
    if labels.max() >= CLASSES:
        raise DataError(f"{place} is damaged: label {labels.max()}, allowed are 0..{CLASSES - 1}")
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _count(place: Path) -> int:
    """Training images, as the header of their labels says; 0 if there is none, which reading them reports."""
    path = _file(place, f"{PARTS[True]}-labels-idx1-ubyte")
    if path is None:
        return 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(8)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch it again") from error
    return int.from_bytes(header[4:], "big")


def _download(layout: MnistSet, root: Path) -> None:
    from torchvision import datasets

    try:
        getattr(datasets, layout.torchvision_class)(str(root), download=True)
    except (RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{layout.name}: torchvision could not download it to {root}: {text}") from error
