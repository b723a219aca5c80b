"""CIFAR-10 and CIFAR-100 from their official binary files, or from torchvision's copies of the Python ones.

A record is one label byte (CIFAR-100: coarse, then fine) and 3,072 bytes, 3x32x32. Nothing is unpickled
except by torchvision, which checks the MD5 of each file first.
"""

import warnings
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

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
OFFICIAL = (50_000, 10_000)
TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class CifarSet:
    """The files of one of the two sets, and its classes and statistics."""

    name: str
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    names_file: str
    label_bytes: int
    classes: int
    torchvision_class: str
    torchvision_folder: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = CifarSet(
    "cifar10",
    "cifar-10-batches-bin",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("test_batch.bin",),
    "batches.meta.txt",
    1,
    10,
    "CIFAR10",
    "cifar-10-batches-py",
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)
CIFAR100 = CifarSet(
    "cifar100",
    "cifar-100-binary",
    ("train.bin",),
    ("test.bin",),
    "fine_label_names.txt",
    2,
    100,
    "CIFAR100",
    "cifar-100-python",
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
)


def open_cifar(layout: CifarSet, reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open CIFAR, with the splits of `official_loaders`; ``input_shape`` has no effect.

    Raises:
        DataError: neither layout was found; the message says which files belong where.
    """
    root = root_folder(folder)
    places = [root / layout.folder, root]
    binary = next((place for place in places if (place / layout.train_files[0]).is_file()), None)
    if binary is None and not (root / layout.torchvision_folder).is_dir() and not download_allowed():
        wanted = f"{layout.train_files[0]} and the other files of {layout.folder}"
        raise missing(reference, wanted, places, downloadable=True)
    read = partial(_read_binary, layout, binary) if binary else partial(_read_torchvision, layout, root)
    return DataSource(
        name=layout.name,
        reference=reference,
        classes=_class_names(layout, binary),
        shape=SHAPE,
        mean=layout.mean,
        std=layout.std,
        augmentation=Augmentation(crop=Crop.PADDED, padding=4, flip=True),
        loaders=official_loaders(read, SHAPE),
        sizes=official_sizes(*_counts(layout, binary)),
    )


def _counts(layout: CifarSet, folder: Path | None) -> tuple[int, int]:
    """Training and test images; those of the files whose MD5 torchvision checks are known."""
    if folder is None:
        return OFFICIAL
    record = layout.label_bytes + PIXELS
    sizes = (
        sum(path.stat().st_size for name in files if (path := folder / name).is_file())
        for files in (layout.train_files, layout.test_files)
    )
    train, test = (size // record for size in sizes)
    return train, test


def _read_binary(layout: CifarSet, folder: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    files = layout.train_files if train else layout.test_files
    records = np.concatenate([_read_file(folder / name, layout) for name in files])
    labels = torch.from_numpy(records[:, layout.label_bytes - 1].astype(np.int64))
    images = torch.from_numpy(records[:, layout.label_bytes :].reshape(-1, *SHAPE))
    return images, labels


def _read_file(path: Path, layout: CifarSet) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; it belongs to {layout.name}"
        ) from error
    record = layout.label_bytes + PIXELS
    if len(content) == 0 or len(content) % record:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes are not a whole number of records of {record} bytes; "
            "fetch it again"
        )
    records = content.reshape(-1, record)
    largest = int(records[:, layout.label_bytes - 1].max())
    if largest >= layout.classes:
        raise DataError(f"{path} is damaged: label {largest}, allowed are 0..{layout.classes - 1}")
    return records


def _read_torchvision(layout: CifarSet, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    try:
        with warnings.catch_warnings():
            # The official files were pickled by NumPy 1; newer versions warn when they read its dtypes.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            kind = getattr(datasets, layout.torchvision_class)
            found = kind(str(root), train=train, download=download_allowed())
    except (RuntimeError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{layout.name}: torchvision could not read {root}: {text}") from error
    images = torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
    return images, torch.tensor(found.targets, dtype=torch.int64)


def _class_names(layout: CifarSet, folder: Path | None) -> tuple[str, ...]:
    path = None if folder is None else folder / layout.names_file
    if path is not None and path.is_file():
        names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
        if len(names) == layout.classes:
            return names
    return TEN if layout.classes == len(TEN) else tuple(str(label) for label in range(layout.classes))
