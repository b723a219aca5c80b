"""Files of masks: pictures whose levels or palette entries are class indices, placed like their images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.classes import IGNORED
from cctool.data.image_files import FileStream, decode, opened, put
from cctool.data.records import Augmentation, Shape, Target

_MODES = ("1", "L", "P")
SCANNED = 256


@dataclass(frozen=True)
class MaskStream:
    """Image files with masks, read one by one; implements `cctool.data.records.Stream`.

    Attributes:
        pictures: the images.
        masks: the file of each one's mask, relative to the folder of the images.
        classes: names in the order of the indices.
    """

    pictures: FileStream
    masks: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(
        self, index: int, shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> tuple[Tensor, Target | None]:
        """Return image ``index`` as uint8 [C, H, W] and its mask as int64 [H, W], cropped and flipped alike.

        The mask is resized to the nearest pixel; what lies outside of it is `IGNORED`.

        Raises:
            DataError: a file is missing or damaged, the mask has another size than the image, or it has an
                index that no class has; the message names the file.
        """
        pictures, path = self.pictures, self.pictures.folder / self.masks[index]
        image = decode(pictures.folder / pictures.files[index], shape[0])
        levels = read_mask(path)
        if levels.shape != (image.height, image.width):
            raise DataError(
                f"{path} is {levels.shape[1]}x{levels.shape[0]}, and its image {pictures.files[index]} is "
                f"{image.width}x{image.height}: both must have one size"
            )
        known = len(self.classes)
        beyond = levels[(levels >= known) & (levels != IGNORED)]
        if beyond.size:
            raise DataError(
                f"{path} has the class index {int(beyond[0])}; with {known} classes it must lie in "
                f"0..{known - 1}, or be {IGNORED} for pixels of no class (classes.txt names the classes)"
            )
        placed = pictures.placement(image.size, shape, augmentation, seed)
        mask = put(Image.fromarray(levels), placed, Image.Resampling.NEAREST, IGNORED)
        return pictures.served(image, placed, shape), torch.from_numpy(np.asarray(mask).astype(np.int64))

    def take(self, indices: Sequence[int]) -> "MaskStream":
        """A stream of these images only, in this order."""
        masks = tuple(self.masks[index] for index in indices)
        return replace(self, pictures=self.pictures.take(indices), masks=masks)


def read_mask(path: Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The class indices of a mask, uint8 [H, W]: the entries of a palette, or levels of gray.

    Raises:
        DataError: it is missing, damaged, or in colour; the message names it.
    """
    with opened(path) as image:
        if image.mode not in _MODES:
            raise DataError(
                f"{path} is a picture of mode {image.mode}; a mask holds a class index for each pixel, in a "
                "palette (mode P) or as 8-bit gray (mode L)"
            )
        try:
            return np.asarray(image).astype(np.uint8)
        # PIL's decoders may raise any exception on damaged files.
        except Exception as error:
            raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def largest_index(folder: Path, masks: Sequence[str]) -> int:
    """The largest class index in up to 256 masks, evenly spread; -1 if all of their pixels are of no class.

    Raises:
        DataError: as `read_mask`.
    """
    count = min(SCANNED, len(masks))
    largest = -1
    for place in range(count):
        levels = read_mask(folder / masks[place * len(masks) // count])
        counted = levels[levels != IGNORED]
        largest = max(largest, int(counted.max()) if counted.size else -1)
    return largest
