"""A short training of a network as it stands now, as after a cut."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from cctool.checkpoint.spec import Metrics, Preprocessing
from cctool.data.batches import Batches, batches
from cctool.data.records import DataSource
from cctool.options.common import Precision
from cctool.options.fit import FitOptions
from cctool.runtime import Reporter, Silent
from cctool.training.evaluate import evaluate
from cctool.training.fit import FitResult, Task, fit
from cctool.training.group import make_fabric
from cctool.training.objectives import Objective, Supervised

__all__ = ["Feed", "finetune"]


class Feed:
    """The batches that a network gets from a data source, in its own preprocessing.

    Args:
        source: an opened data set.
        preprocessing: the network's mean and std.
        batch_size: of all processes together.
        device: where the batches come to lie.
        seed: decides order and augmentation.
        workers: processes that read files.
        rank: this process.
        world_size: how many there are.
    """

    def __init__(
        self,
        source: DataSource,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source = source
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world_size = world_size

    def has(self, split: str) -> bool:
        """Whether the data set has this split."""
        return split in self.source.loaders

    def training(self, *, augment: bool = True) -> Callable[[int], Batches]:
        """Give a function from an epoch to its shuffled training batches."""
        return lambda epoch: batches(
            self.source.split("train"),
            batch_size=self.batch_size,
            device=self.device,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            augmentation=self.source.augmentation if augment else None,
            seed=self.seed,
            epoch=epoch,
            shuffle=True,
            workers=self.workers,
            rank=self.rank,
            world_size=self.world_size,
        )

    def plain(self, split: str, *, shuffle: bool = False) -> Batches:
        """Give the batches of a split as they are, every image once unless shuffled."""
        return batches(
            self.source.split(split),
            batch_size=self.batch_size,
            device=self.device,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            seed=self.seed,
            shuffle=shuffle,
            workers=self.workers,
            rank=self.rank,
            world_size=self.world_size,
        )


def finetune(
    model: nn.Module,
    feed: Feed,
    options: FitOptions,
    *,
    precision: Precision = Precision.FULL,
    objective: Objective | None = None,
    user_code: Collection[str] = frozenset(),
    reporter: Reporter | None = None,
) -> FitResult:
    """Train with a new optimizer over the parameters that the network has now.

    Args:
        model: changed in place; holds the weights of the best epoch by validation top-1 afterwards (the last
            epoch where there is no validation split), in eval mode.
        feed: its data.
        options: epochs, optimizer and so on; the learning rate defaults to that of a trained network.
        precision: arithmetic of forward and backward passes.
        objective: what is minimised; cross-entropy where None.
        user_code: references that stand on this command line.
        reporter: where to speak.

    Raises:
        DivergedError: if the loss becomes NaN or infinite.
    """

    def validate(bare: nn.Module) -> Metrics:
        return evaluate(
            bare,
            feed.plain("validation"),
            split="validation",
            device=feed.device,
            precision=str(precision),
        )

    result = fit(
        Task(
            model=model,
            batches=feed.training(augment=options.augment),
            options=options,
            objective=objective or Supervised(options.label_smoothing),
            lr=options.learning_rate(fresh=False),
            fabric=make_fabric(feed.device, precision),
            validate=validate if feed.has("validation") else None,
            user_code=user_code,
            reporter=reporter or Silent(),
        )
    )
    model.eval()
    return result
