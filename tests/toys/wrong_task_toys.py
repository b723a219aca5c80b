"""User code for wrong uses of tasks: networks, losses, metrics and data sets. Tests copy it to ``my.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COUNT = 20


class Returning(nn.Module):
    """A small convolutional autoencoder that may return something else than its image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        found = self.decoder(self.encoder(images).relu())
        if self.kind == "leaving" and self.training:
            raise SystemExit(4)
        others = {"text": "a cat", "nothing": None, "boxes": {"boxes": found, "scores": found.mean((2, 3))}}
        return others.get(self.kind, found)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.conv(left) + self.conv(right)).mean((2, 3))


def ae() -> nn.Module:
    return Returning("image")


def leaving() -> nn.Module:
    return Returning("leaving")


def text_outputs() -> nn.Module:
    return Returning("text")


def no_outputs() -> nn.Module:
    return Returning("nothing")


def boxes() -> nn.Module:
    return Returning("boxes")


def two_inputs() -> nn.Module:
    return TwoInputs()


def seg(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, classes, 1))


def one_map() -> nn.Module:
    return seg(1)


def reg(numbers: int = 2) -> nn.Module:
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, numbers))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *ends)


def ten() -> nn.Module:
    return reg(10)


def mse(outputs: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
    return (outputs - inputs).square().mean()


def flat(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.tensor(1.0)


def each(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.square().mean(1)


def word(outputs: Tensor, targets: Tensor) -> str:
    return "good"


def written(outputs: Tensor, targets: Tensor) -> str:
    return "0.5"


def truth(outputs: Tensor, targets: Tensor) -> bool:
    return True


def truths(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs == outputs).all()


def leaves(outputs: Tensor, targets: Tensor) -> float:
    raise SystemExit(3)


def _one(outputs: Tensor, targets: Tensor) -> float:
    return 1.0


top5 = loss = mae = miou = _one


def unit_3(outputs: Tensor, targets: Tensor) -> float:
    return 1.0


unit_3.unit = 3  # type: ignore[attr-defined]


def nan(outputs: Tensor, targets: Tensor) -> float:
    return float("nan")


def nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum() * float("nan")


def raises(outputs: Tensor, targets: Tensor) -> float:
    raise ValueError("no such thing")


def up(outputs: Tensor, targets: Tensor) -> float:
    return 1.0


up.direction = "up"  # type: ignore[attr-defined]


def images(count: int = COUNT) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 16, 16), generator=generator, dtype=torch.uint8).numpy()


def _everywhere(targets: Tensor, **more: Any) -> dict[str, Any]:
    part = (images(), targets.numpy())
    return {"train": part, "validation": part, "test": part, **more}


def numbers(count: int = 2) -> dict[str, Any]:
    return _everywhere(torch.rand(COUNT, count))


def numbers10() -> dict[str, Any]:
    return numbers(10)


def float_labels() -> dict[str, Any]:
    return _everywhere(torch.arange(COUNT).remainder(10).float(), classes=10)


def float_labels_of_a_task() -> dict[str, Any]:
    return float_labels() | {"task": "classification"}


def too_few_labels() -> dict[str, Any]:
    return _everywhere(torch.arange(12).remainder(10), classes=10)


def label_too_large() -> dict[str, Any]:
    return _everywhere(torch.arange(COUNT).remainder(11), classes=10)


def one_hot() -> dict[str, Any]:
    return _everywhere(torch.eye(10)[torch.arange(COUNT) % 10].long(), classes=10)


def nan_targets() -> dict[str, Any]:
    return _everywhere(torch.full((COUNT, 2), float("nan")))


def other_task() -> dict[str, Any]:
    return _everywhere(torch.rand(COUNT, 2), task="restoration")


def empty() -> dict[str, Any]:
    return {"train": (images(0), torch.zeros(0, dtype=torch.long).numpy()), "classes": 10}


def float_masks() -> dict[str, Any]:
    pictures = torch.randint(0, 256, (COUNT, 3, 16, 16), dtype=torch.uint8).numpy()
    part = (pictures, torch.rand(COUNT, 16, 16).numpy())
    return {"train": part, "validation": part, "task": "segmentation", "classes": 3}


class _Items(torch.utils.data.Dataset[Any]):
    def __init__(self, *targets: Any) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, place: int) -> Any:
        return images()[place], self.targets[place * len(self.targets) // COUNT]


def word_labels() -> dict[str, Any]:
    return {"train": _Items("cat", "dog"), "validation": _Items("cat", "dog"), "classes": ["cat", "dog"]}


def shapes_mixed() -> dict[str, Any]:
    return {"train": _Items(torch.zeros(2), torch.zeros(3)), "validation": _Items(torch.zeros(2))}
