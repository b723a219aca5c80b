"""Read and augment images one by one in worker processes, for splits that do not fit in memory."""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cctool.base.errors import CctoolError, DataError
from cctool.data.records import Augmentation, Split, Target
from cctool.data.serving.augment import derive, generator

Read = tuple[Tensor, Tensor | None, Tensor]
MakeTargets = Callable[[Sequence[Target]], Tensor]
"""Makes the targets of a batch, [B, ...], of those of its images."""


def stacked(targets: Sequence[Target]) -> Tensor:
    """Targets of equal shape as one tensor: int64 [B] of class indices, else [B, ...] of their own type.

    Raises:
        DataError: their shapes or types differ.
    """
    tensors = [target if isinstance(target, Tensor) else torch.tensor(target) for target in targets]
    kinds = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
    if len(kinds) > 1:
        shown = " and ".join(sorted(f"{dtype} {list(shape)}" for shape, dtype in kinds)[:2])
        raise DataError(f"the targets of one batch differ ({shown}), so they cannot be stacked")
    return torch.stack(tensors)


@dataclass(frozen=True)
class _ImageDataset(Dataset[Any]):
    """What a worker does: read the images of one batch and stack them.

    Errors are returned, not raised: DataLoader would put the worker's traceback into the message.
    """

    split: Split
    augmentation: Augmentation | None
    seed: int
    epoch: int
    make_targets: MakeTargets

    def __getitems__(self, indices: Sequence[int]) -> Read | CctoolError:
        try:
            return self._read(indices)
        except CctoolError as error:
            return error

    def _read(self, indices: Sequence[int]) -> Read:
        stream = self.split.stream
        if stream is None:
            raise DataError(f"the {self.split.name} split has neither images nor files")
        found = [
            stream.read(index, self.split.shape, self.augmentation, derive(self.seed, self.epoch, index))
            for index in indices
        ]
        images = torch.stack([image for image, _ in found])
        return images, self._labels(indices, [label for _, label in found]), torch.tensor(indices)

    def _labels(self, indices: Sequence[int], read: Sequence[Target | None]) -> Tensor | None:
        if self.split.labels is not None:
            return self.split.labels[torch.tensor(indices)]
        targets = [target for target in read if target is not None]
        return self.make_targets(targets) if len(targets) == len(read) else None


def stream_batches(
    split: Split,
    parts: Sequence[Tensor],
    augmentation: Augmentation | None,
    seed: int,
    epoch: int,
    workers: int,
    *,
    make_targets: MakeTargets = stacked,
    pinned: bool,
) -> Iterator[Read]:
    """Yield (images uint8 [B, C, H, W], targets [B, ...] or None, indices int64 [B]) of each part, in order.

    Raises:
        DataError: an image is missing or damaged, the message names it; or targets differ in shape.
        UserCodeError: the user's data set failed.
    """
    reader = _ImageDataset(split, augmentation, seed, epoch, make_targets)
    loader: DataLoader[Any] = DataLoader(
        reader,
        batch_sampler=[part.tolist() for part in parts],
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pinned,
        # Without a generator the loader would draw from the global one.
        generator=generator(seed, epoch, "workers"),
        multiprocessing_context=_context(workers),
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork while threads run; workers only decode, in a single thread each.
        warnings.filterwarnings(
            "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
        )
        running = iter(loader)
    for found in running:
        if isinstance(found, CctoolError):
            raise found
        yield found


def _context(workers: int) -> str | None:
    # Forked, because a user's data set may be defined in a module that only this process has imported.
    return "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None


def _as_it_is(found: Any) -> Any:
    return found
