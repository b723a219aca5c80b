"""Image files: decoded, scaled, cropped and augmented one by one, or held in memory if they are small."""

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.records import Augmentation, Crop, Padding, Shape, Target
from cctool.data.serving.augment import RATIO

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PIL_MODES = {1: "L", 3: "RGB"}
MEASURED = 64
DECODING_THREADS = 4


@dataclass(frozen=True)
class Resize:
    """How an image of any size is scaled before it is cropped to the served size H x W.

    Attributes:
        margin: the image covers ``margin`` times the served size (ImageNet: 256/224).
        native: if given, images are scaled by max(H, W) / ``native`` instead, so that crops of the native
            size are cut out of images that are not scaled at all.
    """

    margin: float = 1.0
    native: int | None = None

    def scaled_size(self, size: tuple[int, int], shape: Shape) -> tuple[int, int]:
        """The (width, height) to resize an image of ``size`` (width, height) to."""
        width, height = size
        if self.native is not None:
            factor = max(shape[1:]) / self.native
        else:
            factor = max(shape[2] * self.margin / width, shape[1] * self.margin / height)
        return max(1, round(width * factor)), max(1, round(height * factor))


@dataclass(frozen=True)
class FileStream:
    """Image files read one by one; implements `cctool.data.records.Stream`.

    Attributes:
        folder: the data set's folder.
        files: paths relative to it.
        geometry: how images are scaled.
        padding_mode: what fills an image that is smaller than the crop.
    """

    folder: Path
    files: tuple[str, ...]
    geometry: Resize
    padding_mode: Padding = Padding.SYMMETRIC

    def __len__(self) -> int:
        return len(self.files)

    def read(
        self, index: int, shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> tuple[Tensor, Target | None]:
        """Return image ``index`` as uint8 [C, H, W]; without augmentation its centre.

        Raises:
            DataError: the file is missing or damaged; the message names it.
        """
        image = decode(self.folder / self.files[index], shape[0])
        return self.served(image, self.placement(image.size, shape, augmentation, seed), shape), None

    def placement(
        self, size: tuple[int, int], shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> "Placement":
        """How an image of ``size`` (width, height) is served at ``shape`` (C, H, W); the seed alone draws."""
        return placement(size, shape, self.geometry, augmentation or Augmentation(), self.padding_mode, seed)

    def served(self, image: Image.Image, placed: "Placement", shape: Shape) -> Tensor:
        """A decoded image as uint8 [C, H, W]."""
        image = put(image, placed, Image.Resampling.BILINEAR)
        pixels = np.asarray(image).reshape(shape[1], shape[2], shape[0])
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def take(self, indices: Sequence[int]) -> "FileStream":
        """A stream of these images only, in this order."""
        return replace(self, files=tuple(self.files[index] for index in indices))


@dataclass(frozen=True)
class Placement:
    """How an image becomes the served one, with what was drawn for it; a mask is placed like its image.

    Attributes:
        size: (width, height) that the image, or its `part`, is resized to.
        part: (left, top, right, bottom) of the image in pixels; None for all of it.
        borders: (columns, rows, kind) added on both sides, one after the other.
        crop: (left, top, right, bottom) that is cut out at last; None for all.
        flip: whether it is mirrored left to right.
        angle: by which it is turned, in degrees; None leaves it.
    """

    size: tuple[int, int]
    part: tuple[float, float, float, float] | None = None
    borders: tuple[tuple[int, int, Padding], ...] = ()
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    angle: float | None = None


def placement(
    size: tuple[int, int],
    shape: Shape,
    geometry: Resize,
    augmentation: Augmentation,
    padding_mode: Padding,
    seed: int,
) -> Placement:
    """Draw how an image is served; see `FileStream.placement`."""
    # A separate generator, so that the seed alone decides, whatever else draws random numbers.
    draw = random.Random(seed)
    if augmentation.crop is Crop.RESIZED:
        found = Placement((shape[2], shape[1]), _random_part(size, augmentation.area, draw))
    else:
        found = _cut(geometry.scaled_size(size, shape), shape, augmentation, padding_mode, draw)
    flip = augmentation.flip and draw.random() < 0.5
    angle = draw.uniform(-augmentation.rotation, augmentation.rotation) if augmentation.rotation else None
    return replace(found, flip=flip, angle=angle)


def put(image: Image.Image, placed: Placement, resampling: Image.Resampling, fill: int = 0) -> Image.Image:
    """An image where its placement says; ``fill`` is the level of what lies outside of it."""
    image = image.resize(placed.size, resampling, box=placed.part)
    for columns, rows, mode in placed.borders:
        image = _padded(image, columns, rows, mode, fill)
    if placed.crop is not None:
        image = image.crop(placed.crop)
    if placed.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placed.angle is not None:
        image = image.rotate(placed.angle, resampling, fillcolor=fill)
    return image


def _cut(
    size: tuple[int, int], shape: Shape, augmentation: Augmentation, mode: Padding, draw: random.Random
) -> Placement:
    (width, height), borders = size, []
    padded = augmentation.crop is Crop.PADDED
    if padded and augmentation.padding:
        borders.append((augmentation.padding, augmentation.padding, augmentation.padding_mode))
        width, height = width + 2 * augmentation.padding, height + 2 * augmentation.padding
    # An image smaller than the crop is filled up, evenly on both sides.
    missing_x, missing_y = max(0, shape[2] - width), max(0, shape[1] - height)
    if missing_x or missing_y:
        columns, rows = math.ceil(missing_x / 2), math.ceil(missing_y / 2)
        borders.append((columns, rows, mode))
        width, height = width + 2 * columns, height + 2 * rows
    spare_x, spare_y = width - shape[2], height - shape[1]
    left = draw.randint(0, spare_x) if padded else spare_x // 2
    top = draw.randint(0, spare_y) if padded else spare_y // 2
    return Placement(size, None, tuple(borders), (left, top, left + shape[2], top + shape[1]))


@dataclass(frozen=True)
class ImageSizes:
    """What the headers of a sample of image files say.

    Attributes:
        channels: 1 if all of them are gray, else 3.
        common: (H, W) if all of them have the same size, else None.
        longest: the longest side of any of them, in pixels.
    """

    channels: int
    common: tuple[int, int] | None
    longest: int


def measure_images(folder: Path, files: Sequence[str]) -> ImageSizes:
    """Read the headers of up to 64 files, evenly spread.

    Raises:
        DataError: one of them is damaged.
    """
    count = min(MEASURED, len(files))
    sample = [files[index * len(files) // count] for index in range(count)]
    modes, sizes = set(), set()
    for name in sample:
        with opened(folder / name) as image:
            modes.add(image.mode)
            sizes.add((image.height, image.width))
    gray = all(mode in ("1", "L") or mode.startswith("I") for mode in modes)
    common = next(iter(sizes)) if len(sizes) == 1 else None
    return ImageSizes(1 if gray else 3, common, max(max(size) for size in sizes))


def hold(stream: FileStream, shape: Shape) -> Tensor:
    """Decode all files at the served size: uint8 [N, C, H, W].

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    images = torch.empty((len(stream), *shape), dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = stream.read(index, shape, None, 0)[0]

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for _ in pool.map(read, range(len(stream))):
            pass
    return images


def opened(path: Path) -> Image.Image:
    """Read the header of an image file. Raises DataError naming it if it is missing or damaged."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, though the data set lists it") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is damaged, or no image that PIL knows") from error
    # PIL's decoders may raise any exception on damaged files.
    except Exception as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def decode(path: Path, channels: int) -> Image.Image:
    """Read an image file as gray (1 channel) or RGB (3). Raises DataError naming it if it is damaged."""
    if channels not in PIL_MODES:
        raise DataError(f"image files are served with 1 or 3 channels, not {channels}")
    with opened(path) as file:
        image: Image.Image = file
        try:
            image.load()
            if image.mode.startswith("I"):
                # 16-bit gray: PIL's `convert` would clip it to 255 instead of scaling it.
                levels = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert(PIL_MODES[channels])
        except Exception as error:
            raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _padded(image: Image.Image, x: int, y: int, mode: Padding, fill: int) -> Image.Image:
    pixels = np.asarray(image)
    widths = [(y, y), (x, x)] + [(0, 0)] * (pixels.ndim - 2)
    if mode is Padding.ZERO:
        return Image.fromarray(np.pad(pixels, widths, constant_values=fill))
    return Image.fromarray(np.pad(pixels, widths, mode="symmetric"))


def _random_part(
    size: tuple[int, int], area: tuple[float, float], draw: random.Random
) -> tuple[float, float, float, float]:
    pixels = draw.uniform(*area) * size[0] * size[1]
    ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    width = min(size[0], math.sqrt(pixels * ratio))
    height = min(size[1], math.sqrt(pixels / ratio))
    left, top = draw.uniform(0, size[0] - width), draw.uniform(0, size[1] - height)
    return left, top, left + width, top + height
