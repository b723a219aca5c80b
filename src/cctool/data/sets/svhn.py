"""SVHN's cropped digits (Netzer et al. 2011), from its MATLAB files of format 2."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.places import missing, root_folder
from cctool.data.records import Augmentation, Crop, DataSource, Shape
from cctool.data.sets.matlab_file import read_variables, shapes_of
from cctool.data.splits import official_loaders, official_sizes

SHAPE = (3, 32, 32)
MEAN = (0.4377, 0.4438, 0.4728)
STD = (0.1980, 0.2010, 0.1970)
CLASSES = 10
TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"
# The largest of its files unpacks to 226 MB.
LIMIT = 2**30


def open_svhn(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open SVHN's training and test digits, with the splits of `official_loaders`.

    Label 10, which its files give to zeros, is class 0. ``input_shape`` has no effect.

    Raises:
        DataError: a file is missing or damaged; the message says which.
    """
    root = root_folder(folder)
    places = [root / "svhn", root / "SVHN", root]
    place = next((place for place in places if (place / TRAIN).is_file()), None)
    if place is None:
        raise missing(reference, f"{TRAIN} and {TEST}", places)
    counts = {name: _count(place / name) for name in (TRAIN, TEST)}
    return DataSource(
        name="svhn",
        reference=reference,
        classes=tuple(map(str, range(CLASSES))),
        shape=SHAPE,
        mean=MEAN,
        std=STD,
        # No flips: a mirrored digit is another one, or none.
        augmentation=Augmentation(crop=Crop.PADDED, padding=4),
        loaders=official_loaders(partial(_read, place), SHAPE),
        sizes=official_sizes(counts[TRAIN], counts[TEST]),
    )


def _count(path: Path) -> int:
    shapes = shapes_of(path, ("X", "y"))
    count = shapes["y"][0] if shapes["y"] else 0
    if shapes["X"] != (32, 32, 3, count) or shapes["y"] != (count, 1) or not count:
        raise DataError(
            f"{path} is damaged: X is {_written(shapes['X'])} and y {_written(shapes['y'])}, "
            "32x32x3xN and Nx1 are expected (format 2, cropped digits)"
        )
    return count


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _read(place: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    path = place / (TRAIN if train else TEST)
    count = _count(path)
    found = read_variables(path, ("X", "y"), LIMIT)
    pixels, labels = found["X"], found["y"]
    if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, count) or labels.dtype.kind not in "iuf":
        raise DataError(f"{path} is damaged: pixels are bytes and labels numbers; fetch it again")
    digits = labels.reshape(-1).astype(np.int64)
    if digits.min() < 1 or digits.max() > CLASSES:
        odd = digits.min() if digits.min() < 1 else digits.max()
        raise DataError(f"{path} is damaged: label {odd}, allowed are 1..{CLASSES}")
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(digits % CLASSES)
