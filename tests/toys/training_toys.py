"""A tiny problem that a tiny network learns in a second, for tests of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cctool.checkpoint.spec import Preprocessing
from cctool.data.records import Augmentation, Crop, DataSource, Split
from cctool.data.serving.batches import Batch
from cctool.options.train.fit import FitOptions
from cctool.training.evaluate import evaluate
from cctool.training.loop.feed import Feed
from cctool.training.loop.fit import Training
from cctool.training.objectives import Supervised
from cctool.training.processes import make_fabric

CPU = torch.device("cpu")
CLASSES = 3
SHAPE = (1, 8, 8)
PLAIN = Preprocessing(mean=(0.5,), std=(0.25,))


def split(name: str, n: int, seed: int) -> Split:
    """Images whose bright row tells their class, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    images = torch.randint(0, 120, (n, *SHAPE), generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, 0, 2 + 2 * label] += 90
    return Split(name, SHAPE, images=images.to(torch.uint8), labels=labels)


def source(n: int = 64, *, validation: bool = True) -> DataSource:
    """A data set of ``n`` training images."""
    sizes = {"train": n, "validation": 30, "test": 21} if validation else {"train": n, "test": 21}
    parts = {name: split(name, size, seed) for seed, (name, size) in enumerate(sizes.items())}
    return DataSource(
        name="rows",
        reference="rows",
        classes=tuple("abc"),
        shape=SHAPE,
        mean=PLAIN.mean,
        std=PLAIN.std,
        augmentation=Augmentation(crop=Crop.PADDED, padding=1, flip=True),
        loaders={name: (lambda part=part: part) for name, part in parts.items()},
    )


def feed(n: int = 64, *, batch_size: int = 16, seed: int = 0, validation: bool = True) -> Feed:
    """Batches of `source` on the CPU."""
    found = source(n, validation=validation)
    return Feed(found, PLAIN, batch_size=batch_size, device=torch.device("cpu"), seed=seed)


def network(seed: int = 0) -> nn.Sequential:
    """A network with batch norm and dropout, so that running statistics and random states matter."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(6 * 64, CLASSES),
    )


def batch(images: Tensor, labels: Tensor | None) -> Batch:
    """One batch, numbered from 0."""
    return Batch(images, labels, torch.arange(len(images)))


def task(model: nn.Module | None = None, n: int = 64, **changes: Any) -> Training:
    """Two epochs of training ``n`` images; ``changes`` are fields of the task."""
    options = changes.pop("options", None) or FitOptions(epochs=2, optimizer="sgd", lr=0.05)
    found = feed(n)
    return replace(
        Training(
            model=model or network(),
            batches=found.training(augment=options.augment),
            options=options,
            objective=Supervised(options.label_smoothing),
            lr=options.learning_rate(fresh=True),
            fabric=make_fabric(CPU),
            validate=lambda bare: evaluate(bare, found.plain("validation"), split="validation", device=CPU),
        ),
        **changes,
    )
