"""Convert images to the channels and size that a network takes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.records import Shape

# ITU-R BT.601: the weights of red, green and blue that PIL uses for mode "L".
LUMA = (0.299, 0.587, 0.114)


def convert(images: Tensor, shape: Shape) -> Tensor:
    """Give images the channels and size of ``shape``: gray repeated, RGB weighted, H and W resized.

    Args:
        images: [N, c, h, w], uint8 or floating point in 0..255.
        shape: (C, H, W); C equals c, or one of them is 1 and the other 3.

    Returns:
        The images themselves if nothing changes, else float32 [N, C, H, W] in 0..255 (or uint8 if gray was
        repeated only). Resizing is bilinear with antialiasing.

    Raises:
        DataError: other numbers of channels.
    """
    channels, height, width = shape
    check_channels(images.shape[1], channels)
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
        images = (images.float() * weights).sum(dim=1, keepdim=True)
    if tuple(images.shape[2:]) != (height, width):
        images = F.interpolate(
            images.float(), size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    # Last, so that gray images are resized once and not three times.
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    return images


def convert_statistics(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Means or standard deviations per channel of images that `convert` has given ``channels`` channels.

    >>> convert_statistics((0.5,), 3)
    (0.5, 0.5, 0.5)
    """
    if channels == 3:
        return values * 3
    return (sum(weight * value for weight, value in zip(LUMA, values, strict=True)),)


def check_channels(found: int, wanted: int) -> None:
    """Raise DataError for any change of channels but that between gray (1) and RGB (3)."""
    if found != wanted and {found, wanted} != {1, 3}:
        raise DataError(
            f"the images have {found} channels and the network takes {wanted}: only gray (1) and RGB (3) are "
            "converted into each other; build the network for the data (--arg in_channels=...)"
        )


def describe(found: Shape, wanted: Shape) -> str:
    """A sentence that says what `convert` does.

    >>> describe((1, 28, 28), (3, 32, 32))
    'gray images are repeated to RGB and resized from 28x28 to 32x32'
    """
    done = []
    if found[0] != wanted[0]:
        done.append("repeated to RGB" if wanted[0] == 3 else "weighted to gray")
    if found[1:] != wanted[1:]:
        done.append(f"resized from {found[1]}x{found[2]} to {wanted[1]}x{wanted[2]}")
    kind = {1: "gray images", 3: "RGB images"}.get(found[0], "images")
    return f"{kind} are {' and '.join(done)}"
