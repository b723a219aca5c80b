"""Small networks of many kinds, trained and not, whose exports are judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 16, 16)
CLASSES = 7


class Classifier(nn.Sequential):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 20, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(320, 24), nn.ReLU(), nn.Linear(24, CLASSES),
        )  # fmt: skip


class Normed(nn.Sequential):
    """Convolutions with batch norm, and a pool."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES),
        )  # fmt: skip


class Depthwise(nn.Sequential):
    """Depthwise separable blocks with ReLU6."""

    def __init__(self) -> None:
        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs), nn.ReLU6(),
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
            ]  # fmt: skip

        super().__init__(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU6(), *block(12, 24, 1), *block(24, 32, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
        )  # fmt: skip


class Residual(nn.Module):
    """Residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 1, 1)
        self.first, self.second = nn.Conv2d(12, 12, 3, 1, 1), nn.Conv2d(12, 12, 3, 1, 1)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(x + self.norm(self.first(x)))
        x = F.relu(x + self.second(x))
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


class UNet(nn.Module):
    """An encoder and decoder with a concatenation; one score a class and pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.join, self.head = nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.down(x))
        up = F.relu(self.up(F.relu(self.deep(wide))))
        return self.head(F.relu(self.join(torch.cat((wide, up), 1))))


class Autoencoder(nn.Sequential):
    """Strided convolutions and transposed ones; pictures as outputs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(8, 12, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(12, 3, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip


class Attention(nn.Module):
    """Patches, layer norm, attention written out, a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.norm, self.other = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.wide, self.narrow = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2) / 24**0.5).softmax(-1) @ v)
        x = x + self.narrow(F.gelu(self.wide(self.other(x))))
        return self.head(x.mean(1))


class TwoHeads(nn.Module):
    """A dict of scores, a map and the map's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 1, 1)
        self.scores, self.map = nn.Linear(16, CLASSES), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.leaky_relu(self.body(F.relu(self.stem(x))))
        found = self.map(x)
        return {"scores": self.scores(x.mean((2, 3))), "map": found, "classes": found.argmax(1)}


class Gated(nn.Module):
    """Squeeze and excitation with hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.body = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Conv2d(16, 16, 1),
            nn.Conv2d(16, 20, 3, 1, 1),
        )
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.hardswish(self.body(x)).mean((2, 3)))


class Offset(Classifier):
    """Outputs that are nearly the same for all inputs: an offset of 40 on a small signal."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self[-1].weight *= 1e-2
            self[-1].bias += 40


class Tiny(Classifier):
    """Outputs of the size 1e-7."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self[-1].weight *= 1e-7
            self[-1].bias *= 1e-7


class Deep(nn.Sequential):
    """Ten convolutions without norm: the signal nearly vanishes on the way."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU()]
        for _ in range(9):
            layers += [nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES))


TOYS: dict[str, Callable[[], nn.Module]] = {
    "classifier": Classifier, "normed": Normed, "depthwise": Depthwise, "residual": Residual, "unet": UNet,
    "autoencoder": Autoencoder, "attention": Attention, "two_heads": TwoHeads, "gated": Gated,
    "offset": Offset, "tiny": Tiny, "deep": Deep,
}  # fmt: skip


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures (count, 3, 16, 16) of stripes, whose direction and colour are the class; the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = labels.float() * torch.pi / CLASSES
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = torch.rand(count, generator=generator) * 6.28
    wave = torch.sin(
        0.8 * (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y) + phase[:, None, None]
    )
    colour = torch.stack((angle.cos(), angle.sin(), (2 * angle).sin()), 1)[:, :, None, None]
    noise = torch.randn(count, *SHAPE, generator=generator)
    return wave[:, None] + 0.7 * colour + 0.4 * noise, labels


def trained(model: nn.Module, steps: int, seed: int) -> nn.Module:
    """The network after some steps of Adam on such pictures: classes if it has scores, else the pictures."""
    images, labels = pictures(32 * max(steps, 1), seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for step in range(steps):
        x, wanted = images[32 * step : 32 * step + 32], labels[32 * step : 32 * step + 32]
        found = model(x)
        found = found["scores"] if isinstance(found, dict) else found
        if found.shape == x.shape:
            loss = F.mse_loss(found, x)
        elif found.dim() > 2:
            loss = F.cross_entropy(found, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())
        else:
            loss = F.cross_entropy(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
