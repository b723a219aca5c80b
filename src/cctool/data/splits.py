"""Deterministic splits of a data set: the same files and labels always give the same splits."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from torch import Tensor

from cctool.data.records import Split

# The legacy generator's stream is frozen by NumPy's policy, so these permutations never change.
SEED = 20
HELD_OUT = 5000


def held_out(size: int, count: int) -> tuple[list[int], list[int]]:
    """Divide range(size) by a fixed permutation; both parts come back in ascending order.

    Args:
        size: number of images.
        count: number of images to hold out.

    Returns:
        (the others, the last ``count`` of the permutation).
    """
    order = np.random.RandomState(SEED).permutation(size)
    return sorted(order[: size - count].tolist()), sorted(order[size - count :].tolist())


def official_loaders(
    read: Callable[..., tuple[Tensor, Tensor]], shape: tuple[int, int, int]
) -> dict[str, Callable[[], Split]]:
    """The official test set, and the official training set less 5,000 images held out for validation.

    The held-out images are the last of a fixed permutation (a tenth, if there are fewer than 50,000).

    Args:
        read: (train=bool) -> images [N, C, H, W] and labels [N] of an official set; called once for training.
        shape: (C, H, W).
    """

    @cache
    def training() -> dict[str, Split]:
        whole = Split("train", shape, *read(train=True))
        kept, held = held_out(len(whole), _official_share(len(whole)))
        return {"train": whole.take(kept), "validation": whole.take(held)}

    return {
        "train": lambda: training()["train"],
        "validation": lambda: training()["validation"],
        "test": lambda: Split("test", shape, *read(train=False)),
    }


def official_sizes(train: int, test: int) -> dict[str, int]:
    """Images in each split of `official_loaders`, from those in the two official sets."""
    held = _official_share(train)
    return {"train": train - held, "validation": held, "test": test}


def _official_share(size: int) -> int:
    return HELD_OUT if size >= 10 * HELD_OUT else size // 10


def stratified(labels: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Divide the indices of ``labels`` into parts of exactly the sizes ``counts``, stratified by class.

    A fixed permutation orders each class, and shares are rounded so that the sizes, which add up to
    len(labels), are exact.
    """
    array = np.asarray(labels)
    random = np.random.RandomState(SEED)
    # Spread each class evenly over 0..1, then cut the line of all images at the parts' sizes.
    position = np.empty(len(array))
    for label in np.unique(array):
        members = random.permutation(np.flatnonzero(array == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(position, kind="stable")
    bounds = np.cumsum([0, *counts])
    return [sorted(order[start:end].tolist()) for start, end in pairwise(bounds.tolist())]


def stratified_by_name(
    names: Sequence[str], labels: Sequence[int] | None, fractions: Sequence[float]
) -> list[list[int]]:
    """Divide files by the hash of their names, class by class, so that adding a file moves few others.

    Args:
        names: the files' paths relative to the data set's folder, with ``/`` between parts.
        labels: a class for each file, or None to treat all as one class.
        fractions: the sizes of the parts, which add up to 1. Every part after the first gets at least one
            file of each class that has as many files as there are parts.
    """
    classes: dict[int, list[int]] = {}
    for index in range(len(names)):
        classes.setdefault(0 if labels is None else int(labels[index]), []).append(index)
    parts: list[list[int]] = [[] for _ in fractions]
    for members in classes.values():
        members.sort(key=lambda index: hashlib.sha256(names[index].encode()).digest())
        start = 0
        # From the last part on, so that training, the first, takes what rounding leaves.
        for part in range(len(fractions) - 1, 0, -1):
            least = 1 if len(members) >= len(fractions) else 0
            count = max(least, round(fractions[part] * len(members)))
            parts[part] += members[start : start + count]
            start += count
        parts[0] += members[start:]
    return [sorted(part) for part in parts]
