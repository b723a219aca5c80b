"""Networks whose outputs are no single tensor: dicts, tuples, detections of any number, whole numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 16, 16)


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


class Heads(nn.Module):
    """A network with two convolutions, and heads that are put together by `form`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body = _conv(3, 8, 2), _conv(8, 12)
        self.main, self.side = nn.Conv2d(12, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        low = self.stem(x)
        out = self.main(self.body(low))
        return self.form(F.interpolate(out, x.shape[-2:]), F.interpolate(self.side(low), x.shape[-2:]))

    def form(self, out: Tensor, aux: Tensor) -> Any:
        return out


class Dict(Heads):
    """As torchvision's segmentation networks; classes of pixels besides."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        return {"out": out, "aux": aux, "classes": out.argmax(1), "size": 16, "nothing": None}


class Nested(Heads):
    """A list in a dict, and a name that is taken in the graph: that of the input."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        return {"boxes": [out, aux], "input": out, "relu": aux.mean((2, 3))}


class Pair(Heads):
    """A tuple."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        return out.mean((2, 3)), aux


class Classes(Heads):
    """Whole numbers alone."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        return out.argmax(1)


class Detections(Heads):
    """A dict for each image, with as many rows as there are scores above zero."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        rows = out.permute(0, 2, 3, 1).flatten(1, 2)
        return [{"boxes": image[image[:, 0] > 0], "labels": image.argmax(1)[:5]} for image in rows]


class Nowhere(Heads):
    """Nothing but NaN."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        return out * torch.nan


class Partly(Heads):
    """NaN in one output, always in the same places."""

    def form(self, out: Tensor, aux: Tensor) -> Any:
        holes = torch.where(torch.arange(16) < 3, torch.nan, 0.0)
        return {"out": out, "depth": aux + holes}


class TwoInputs(Heads):
    """A forward that needs more than an image."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * mask)


class C2f(nn.Module):
    """Split, bottlenecks and concatenation, as in YOLOv8."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.half = outside // 2
        self.enter = _conv(inside, outside)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(self.half, self.half), _conv(self.half, self.half)) for _ in range(2)
        )
        self.leave = _conv(outside + 2 * self.half, outside)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class YoloLike(nn.Module):
    """A backbone of three scales, upsampling, and three heads in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p3, self.p4, self.p5 = (
            nn.Sequential(_conv(i, o, 2), C2f(o, o)) for i, o in ((3, 8), (8, 16), (16, 24))
        )
        self.up = nn.Upsample(scale_factor=2)
        self.n4, self.n3 = C2f(40, 16), C2f(24, 8)
        self.heads = nn.ModuleList(nn.Conv2d(width, 7, 1) for width in (8, 16, 24))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p3 = self.p3(x)
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        return {
            name: head(value)
            for name, head, value in zip(("small", "medium", "large"), self.heads, (n3, n4, p5), strict=True)
        }
