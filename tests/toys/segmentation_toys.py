"""Pictures with masks, and networks that are no classifiers, as files for the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def segmentation_set(folder: Path, side: int = 24, counts: tuple[int, int, int] = (12, 6, 6)) -> None:
    """Write pictures of a bright square (class 2) and a dark one (class 1), as ``segment:`` reads them."""
    generator = np.random.default_rng(0)
    third = side // 3
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            image = generator.normal(120, 12, (side, side, 3))
            mask = np.zeros((side, side), dtype=np.uint8)
            for label, brightness in ((1, 30), (2, 220)):
                top, left = generator.integers(0, side - third, 2)
                square = (slice(top, top + third), slice(left, left + third))
                image[square] = brightness + generator.normal(0, 12, (third, third, 3))
                mask[square] = label
            mask[0, 0] = 255
            pixels = image.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("ground\ndark\nbright\n")


YOLO = """
import torch
from torch import nn


def block(inputs, outputs, kernel=3, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class C2f(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        half = outputs // 2
        self.split, self.join = block(inputs, 2 * half, 1), block(3 * half, outputs, 1)
        self.inner = nn.Sequential(block(half, half), block(half, half))

    def forward(self, x):
        parts = list(self.split(x).chunk(2, 1))
        parts.append(parts[-1] + self.inner(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Yolo(nn.Module):
    def __init__(self, width):
        super().__init__()
        w = width
        self.stem = block(3, w, stride=2)
        self.small = nn.Sequential(block(w, 2 * w, stride=2), C2f(2 * w, 2 * w))
        self.middle = nn.Sequential(block(2 * w, 4 * w, stride=2), C2f(4 * w, 4 * w))
        self.large = nn.Sequential(block(4 * w, 8 * w, stride=2), C2f(8 * w, 8 * w))
        self.up = nn.Upsample(scale_factor=2)
        self.neck_middle, self.neck_small = C2f(12 * w, 4 * w), C2f(6 * w, 2 * w)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 15, 1) for channels in (2 * w, 4 * w, 8 * w))

    def forward(self, x):
        small = self.small(self.stem(x))
        middle = self.middle(small)
        large = self.large(middle)
        middle = self.neck_middle(torch.cat([self.up(large), middle], 1))
        small = self.neck_small(torch.cat([self.up(middle), small], 1))
        return {"small": self.heads[0](small), "middle": self.heads[1](middle), "large": self.heads[2](large)}


def make(width=4):
    return Yolo(width)
"""
