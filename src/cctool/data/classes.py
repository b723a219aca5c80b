"""Labels go with names: a data set is numbered by the class names of the network that it is shown to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cctool.base.errors import DataError
from cctool.base.networks import some
from cctool.data.records import Augmentation, DataSource, Shape, Split, Stream, Target

IGNORED = 255
"""The label of pixels that belong to no class, as in Pascal VOC and Cityscapes."""

_NUMBERED = ("classification", "segmentation")
"""Tasks whose targets are class indices."""

NEW_HEAD = "; `cctool train --new-head` trains a fresh last layer for its classes"


def numbers_of(
    classes: Sequence[str], known: Sequence[str], whose: str, *, owner: str, way_out: str = ""
) -> list[int]:
    """For each class, its place among those that are known.

    Args:
        classes: to be numbered.
        known: names in the order of the numbers.
        whose: how an error names what has ``classes``.
        owner: how an error names what has ``known``.
        way_out: what the error on a class that is not known says in the end.

    Raises:
        DataError: if one is not known, or its name is there more than once.
    """
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise DataError(
            f"{whose} has the class {unknown[0]!r}, which {owner} does not know"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + way_out
        )
    repeated = [name for name, count in Counter(known).items() if count > 1 and name in classes]
    if repeated or len(set(classes)) < len(classes):
        name = repeated[0] if repeated else Counter(classes).most_common(1)[0][0]
        raise DataError(f"{whose}: the name {name!r} stands for two classes, so it numbers neither")
    return [known.index(name) for name in classes]


def by_name(source: DataSource, known: tuple[str, ...] | None) -> DataSource:
    """A data set with the labels of a network, whose classes are ``known``; a note says what was matched.

    A data set without classes and a network without names stay as they are, and so do targets that are no
    class indices. In masks, 255 stays the label of pixels that belong to no class.

    Raises:
        DataError: if the data set has a class that the network does not know.
    """
    if not source.classes or source.classes == known or source.task not in _NUMBERED:
        return source
    if known is None:
        note = f"the network has no class names, so those of {source.reference} are taken in order"
        return dataclasses.replace(source, notes=(*source.notes, note))
    numbers = numbers_of(source.classes, known, source.reference, owner="the network", way_out=NEW_HEAD)
    what = "all" if len(numbers) == len(known) else f"{len(numbers)} of {len(known)}"
    note = f"{what} classes of the network, matched by name: {some(source.classes)}"
    return dataclasses.replace(
        source,
        classes=known,
        notes=(*source.notes, note),
        loaders={name: renumbered(load, numbers) for name, load in source.loaders.items()},
        whole=None if source.whole is None else renumbered(source.whole, numbers),
        _loaded={},
        _served={},
    )


def renumbered(load: Callable[[], Split], numbers: Sequence[int]) -> Callable[[], Split]:
    """The function that reads a split, with label i replaced by ``numbers[i]``; in masks 255 stays."""
    return partial(_renumbered, load, list(numbers))


def _renumbered(load: Callable[[], Split], numbers: list[int]) -> Split:
    split = load()
    labels = None if split.labels is None else _replaced(split.labels, numbers, masks=split.labels.dim() > 1)
    stream = None if split.stream is None else _Renumbered(split.stream, numbers)
    return dataclasses.replace(split, labels=labels, stream=stream, _on_device={})


def _replaced(labels: Tensor, numbers: list[int], *, masks: bool) -> Tensor:
    """Labels, or masks, with each index i replaced by ``numbers[i]``.

    Raises:
        DataError: if a mask has an index that no class has.
    """
    table = torch.tensor(numbers)
    if not masks:
        return table[labels]
    whole = labels.to(torch.int64)
    counted = whole != IGNORED
    inside = whole[counted]
    if inside.numel() and not 0 <= int(inside.min()) <= int(inside.max()) < len(numbers):
        odd = int(inside.min()) if int(inside.min()) < 0 else int(inside.max())
        raise DataError(f"a mask has the class index {odd}; the data set has {len(numbers)} classes")
    return whole.masked_scatter(counted, table[inside])


@dataclasses.dataclass(frozen=True)
class _Renumbered:
    """A stream whose labels are replaced by other numbers."""

    stream: Stream
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.stream)

    def read(
        self, index: int, shape: Shape, augmentation: Augmentation | None, seed: int
    ) -> tuple[Tensor, Target | None]:
        """Image ``index`` and its label; see `Stream`."""
        image, label = self.stream.read(index, shape, augmentation, seed)
        if isinstance(label, Tensor):
            return image, _replaced(label, self.numbers, masks=label.dim() > 0)
        return image, None if label is None else self.numbers[label]

    def take(self, indices: Sequence[int]) -> _Renumbered:
        """A stream of these images only, in this order."""
        return _Renumbered(self.stream.take(indices), self.numbers)
