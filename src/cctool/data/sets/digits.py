"""The 1,797 UCI handwritten digits that ship inside the package, 8x8 pixels served at 1x32x32."""

import io
from functools import partial
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.records import Augmentation, Crop, DataSource, Shape, Split
from cctool.data.splits import stratified

SHAPE = (1, 32, 32)
LEVELS = 16
COUNTS = {"train": 1200, "validation": 237, "test": 360}
# Of the 1,200 training images at 32x32, in 0..1.
MEAN = 0.3053
STD = 0.3236


def open_digits(reference: str, folder: str = "", input_shape: Shape | None = None) -> DataSource:
    """Open the digits: 1,200 training, 237 validation and 360 test images, stratified by class.

    The source defines no splits for this file, so a fixed stratified permutation does. All 13 writers are in
    all three splits. ``input_shape`` has no effect.

    Raises:
        DataError: a folder is named, or the file in the package is damaged.
    """
    if folder:
        raise DataError(f"{reference}: the digits lie inside the package; write digits alone")
    images, labels = _read()
    parts = dict(zip(COUNTS, stratified(labels.tolist(), list(COUNTS.values())), strict=True))
    whole = Split("train", SHAPE, images=images, labels=labels)
    return DataSource(
        name="digits",
        reference=reference,
        classes=tuple(str(digit) for digit in range(10)),
        shape=SHAPE,
        mean=(MEAN,),
        std=(STD,),
        augmentation=Augmentation(crop=Crop.PADDED, padding=2, rotation=10.0),
        loaders={name: partial(whole.take, part) for name, part in parts.items()},
        sizes=COUNTS,
    )


def _read() -> tuple[Tensor, Tensor]:
    try:
        content = resources.files("cctool.data").joinpath("files/digits.npz").read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            levels, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the digits inside the cctool package are damaged ({error}); install it again"
        ) from error
    images = torch.from_numpy(levels).float().unsqueeze(1) * (255 / LEVELS)
    served = F.interpolate(images, size=SHAPE[1:], mode="bilinear", align_corners=False)
    return served.round().to(torch.uint8), torch.from_numpy(labels).to(torch.int64)
