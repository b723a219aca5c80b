"""Serving a data source to a network: augmented training batches of each epoch, and unchanged splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from cctool.checkpoint.spec import Preprocessing
from cctool.data.records import DataSource
from cctool.data.serving.batches import Batches, batches
from cctool.data.serving.streaming import MakeTargets, stacked


@dataclass(frozen=True)
class Feed:
    """The batches that a network gets from a data source, in the network's preprocessing.

    Attributes:
        source: an opened data set.
        preprocessing: the network's mean and std.
        batch_size: of all processes together.
        device: where the batches are served.
        seed: decides order and augmentation.
        workers: processes that read files.
        rank: this process.
        world_size: number of processes.
        make_targets: makes the targets of a batch, for a task that does not stack them.
    """

    source: DataSource
    preprocessing: Preprocessing
    _: KW_ONLY
    batch_size: int
    device: torch.device
    seed: int = 0
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    make_targets: MakeTargets = stacked

    def has(self, split: str) -> bool:
        """Whether the data set has this split."""
        return split in self.source.loaders

    def training(self, *, augment: bool = True) -> Callable[[int], Batches]:
        """A function from an epoch, from 0, to its shuffled training batches."""
        augmentation = self.source.augmentation if augment else None
        return lambda epoch: self._batches("train", augmentation=augmentation, epoch=epoch, shuffle=True)

    def plain(self, split: str, *, shuffle: bool = False) -> Batches:
        """The batches of a split without augmentation, every image once unless shuffled."""
        return self._batches(split, shuffle=shuffle)

    def _batches(self, split: str, **order: Any) -> Batches:
        return batches(
            self.source.split(split),
            batch_size=self.batch_size,
            device=self.device,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            seed=self.seed,
            workers=self.workers,
            rank=self.rank,
            world_size=self.world_size,
            make_targets=self.make_targets,
            **order,
        )
