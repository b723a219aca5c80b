"""Small networks and images that the criteria are tried on, what the formulas need in plain sight."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cctool.data.serving.batches import Batch


class Chain(nn.Module):
    """conv1 (3 -> 6) - relu - conv2 (6 -> 5) - relu - mean - fc: two families, no coupling."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(5) if batch_norm else nn.Identity()
        self.fc = nn.Linear(5, 4)
        if batch_norm:
            for norm in (self.bn1, self.bn2):
                nn.init.uniform_(norm.weight, -1, 1)
                nn.init.uniform_(norm.running_mean, -0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """stem (3 -> 4) and the block's conv (4 -> 4) add up; two layers read the sum, a flattening one last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 4, 3)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]


def images(n: int = 10, classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(0, classes, (n,), generator=generator),
    )


def batches(x: Tensor, y: Tensor | None, size: int = 4) -> Iterator[Batch]:
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield Batch(x[part], None if y is None else y[part], torch.arange(len(x))[part])


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean loss by the plainest way."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
