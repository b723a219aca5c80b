"""Batches of normalised images on a device, in an order that depends on (seed, epoch) only.

In-memory splits are kept on the device as uint8 and augmented there, whole batches at a time; streamed ones
are read and augmented in worker processes. No global random state is read or changed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cctool.base.errors import DataError
from cctool.data.records import Augmentation, Loaded, Split
from cctool.data.serving import augment
from cctool.data.serving.augment import generator
from cctool.data.serving.convert import convert
from cctool.data.serving.streaming import MakeTargets, stacked, stream_batches

MINIMUM_TRAINING_SAMPLES = 2


@dataclass(frozen=True)
class Batch:
    """Images of one batch, on the device.

    Attributes:
        images: floating point [B, C, H, W], normalised.
        labels: the targets, [B, ...]: int64 [B] for classes, else of any shape and type; None if there are
            none.
        indices: int64 [B] into the split, on the CPU.
    """

    images: Tensor
    labels: Tensor | None
    indices: Tensor


@dataclass(frozen=True)
class Batches:
    """One process's batches of one epoch; iterating twice gives the same batches twice."""

    split: Split
    parts: tuple[Tensor, ...]
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    augmentation: Augmentation | None
    seed: int
    epoch: int
    workers: int
    make_targets: MakeTargets = stacked

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def samples(self) -> int:
        """Number of images in all these batches."""
        return sum(len(part) for part in self.parts)

    def __iter__(self) -> Iterator[Batch]:
        if self.split.loaded is not None:
            yield from self._loaded(self.split.loaded)
            return
        scale, shift = self._affine()
        found = self._streamed() if self.split.images is None else self._in_memory()
        for images, labels, indices in found:
            if self.split.as_given:
                yield Batch(images.to(self.dtype), labels, indices)
                continue
            # (x / 255 - mean) / std as one multiplication and one addition.
            normalised = (convert(images, self.split.shape) * scale).add_(shift)
            yield Batch(normalised.to(self.dtype), labels, indices)

    def _loaded(self, loaded: Loaded) -> Iterator[Batch]:
        start = 0
        for item in loaded.batches:
            images, labels = item if isinstance(item, (tuple, list)) else (item, None)
            if tuple(images.shape[1:]) != tuple(self.split.shape) or not images.is_floating_point():
                raise DataError(
                    f"the loader gave {images.dtype} images of shape {tuple(images.shape)}; floating point "
                    f"[batch, {', '.join(map(str, self.split.shape))}] is expected, as the network takes them"
                )
            indices = torch.arange(start, start + len(images))
            start += len(images)
            if labels is not None and (not isinstance(labels, Tensor) or len(labels) != len(images)):
                kind = f"{len(labels)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
                raise DataError(
                    f"the loader gave {len(images)} images with {kind} as targets: a tensor with one for "
                    "each image is expected"
                )
            moved = None if labels is None else labels.to(self.device)
            yield Batch(images.to(self.device, self.dtype), moved, indices)

    def _affine(self) -> tuple[Tensor, Tensor]:
        # Computed in float64, so that the two factors are rounded only once, to float32.
        mean = torch.tensor(self.mean, dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        scale = (1 / (255 * std)).to(self.device, torch.float32)
        shift = (-mean / std).to(self.device, torch.float32)
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    def _in_memory(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        images = self.split.images_on(self.device)
        labels = None if self.split.labels is None else self.split.labels.to(self.device)
        draws: augment.Draws | None = None
        if self.augmentation is not None:
            size = (images.shape[2], images.shape[3])
            draws = augment.draw(len(images), size, self.augmentation, self.seed, self.epoch).to(self.device)
        if not self.parts:
            return
        # All indices in one copy: one for each batch would make the GPU wait for each.
        order, start = torch.cat(self.parts).to(self.device), 0
        for indices in self.parts:
            chosen = order[start : start + len(indices)]
            start += len(indices)
            batch = images[chosen]
            if draws is not None and self.augmentation is not None:
                batch = augment.apply(batch, draws.take(chosen), self.augmentation)
            yield batch, None if labels is None else labels[chosen], indices

    def _streamed(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        pinned = self.device.type == "cuda"
        found = stream_batches(
            self.split,
            self.parts,
            self.augmentation,
            self.seed,
            self.epoch,
            self.workers,
            make_targets=self.make_targets,
            pinned=pinned,
        )
        for images, labels, indices in found:
            moved = None if labels is None else labels.to(self.device, non_blocking=pinned)
            yield images.to(self.device, non_blocking=pinned), moved, indices


def batches(
    split: Split,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    make_targets: MakeTargets = stacked,
) -> Batches:
    """Divide a split into batches, and each batch among processes.

    Args:
        split: what to serve.
        batch_size: images in a batch of all processes together.
        device: where the batches are served.
        mean: per channel, of images in 0..1.
        std: likewise.
        dtype: of the served images.
        augmentation: None for evaluation.
        seed: decides, with ``epoch``, the order and all augmentation.
        epoch: counted by the caller.
        shuffle: for training. A last batch with fewer than two images per process is then left out, unless it
            is the only one, because batch norm cannot normalise a single image.
        workers: processes that read a streamed split; 0 reads in this one.
        rank: this process.
        world_size: number of processes. Each image goes to exactly one process, and the processes' parts of a
            batch differ by at most one image.
        drop_last: leave out a last batch that is not full, unless it is the only one.
        make_targets: makes the targets of a batch of those that a stream reads one by one.

    Raises:
        DataError: the split is empty, or mean and std do not fit its channels.
    """
    if len(split) == 0:
        raise DataError(f"the {split.name} split has no images")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, split.shape[0]):
            raise DataError(
                f"{name} has {len(values)} values, but the images have {split.shape[0]} channels; "
                "give one value or one a channel"
            )
    if not all(math.isfinite(value) and value > 0 for value in std):
        raise DataError(f"std={tuple(std)} must be greater than 0")
    if split.loaded is not None:
        if world_size > 1:
            raise DataError("a loader cannot be shared by several processes: name a data set instead")
        parts = torch.split(torch.arange(len(split)), list(split.loaded.sizes))
        normalisation = tuple(mean), tuple(std)
        return Batches(split, parts, torch.device(device), *normalisation, dtype, None, seed, epoch, workers)
    if split.as_given:
        augmentation = None
    order = torch.arange(len(split))
    if shuffle:
        order = torch.randperm(len(split), generator=generator(seed, epoch, "order"))
    smallest = batch_size if drop_last else MINIMUM_TRAINING_SAMPLES * world_size if shuffle else 1
    mine = (part.tensor_split(world_size)[rank] for part in _parts(order, batch_size, smallest))
    parts = tuple(part for part in mine if len(part))
    place, normalisation = torch.device(device), (tuple(mean), tuple(std))
    return Batches(
        split, parts, place, *normalisation, dtype, augmentation, seed, epoch, workers, make_targets
    )


def _parts(order: Tensor, batch_size: int, smallest: int) -> tuple[Tensor, ...]:
    """Cut ``order`` into batches; a last one of fewer than ``smallest`` images is dropped, unless alone."""
    whole = tuple(order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return whole[:-1] if len(whole) > 1 and len(whole[-1]) < smallest else whole
