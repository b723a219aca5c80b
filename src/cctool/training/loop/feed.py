"""Serving a data source to one network: training batches of each epoch, and splits as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cctool.checkpoint.spec import Preprocessing
from cctool.data.records import DataSource
from cctool.data.serving.batches import Batches, batches

__all__ = ["Feed"]


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
