"""All data sets by reference, such as ``digits``, ``cifar10:DIR`` or the user's ``my.py:factory``."""

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cctool.base import user_code as user
from cctool.base.errors import DataError
from cctool.data.classes import numbers_of, renumbered
from cctool.data.records import DataSource, Shape, Split
from cctool.data.serving.convert import check_channels, convert_statistics, describe
from cctool.data.sets.cifar import CIFAR10, CIFAR100, open_cifar
from cctool.data.sets.cub200 import open_cub200
from cctool.data.sets.digits import open_digits
from cctool.data.sets.folders import open_folder, open_images, open_labelled
from cctool.data.sets.imagenet import open_imagenet
from cctool.data.sets.mnist import FASHION_MNIST, MNIST, open_mnist
from cctool.data.sets.segment import open_segment
from cctool.data.sets.svhn import open_svhn
from cctool.data.sets.user_data import open_user_data


@dataclass(frozen=True)
class Dataset:
    """A kind of data set.

    Attributes:
        form: how references to it are written.
        summary: one line for the list of data sets.
        open: (reference, folder, input shape or None) -> source; the folder is "" if none is named.
    """

    form: str
    summary: str
    open: Callable[[str, str, Shape | None], DataSource]


@dataclass(frozen=True)
class DatasetRecord:
    """A line in the list of data sets."""

    name: str
    form: str
    summary: str


DATASETS: dict[str, Dataset] = {
    "digits": Dataset("digits", "1,797 handwritten digits inside the package, 1x32x32", open_digits),
    "cifar10": Dataset("cifar10[:DIR]", "CIFAR-10, 3x32x32", partial(open_cifar, CIFAR10)),
    "cifar100": Dataset("cifar100[:DIR]", "CIFAR-100, 3x32x32", partial(open_cifar, CIFAR100)),
    "mnist": Dataset("mnist[:DIR]", "MNIST, 1x28x28", partial(open_mnist, MNIST)),
    "fashion-mnist": Dataset(
        "fashion-mnist[:DIR]", "Fashion-MNIST, 1x28x28", partial(open_mnist, FASHION_MNIST)
    ),
    "svhn": Dataset("svhn[:DIR]", "SVHN, digits of house numbers, 3x32x32", open_svhn),
    "folder": Dataset("folder:DIR", "a folder of images a class; train, val, test", open_folder),
    "labelled": Dataset("labelled:DIR", "files named <label>_<id>.jpg", open_labelled),
    "cub200": Dataset("cub200[:DIR]", "Caltech-UCSD Birds 200 (2011), by its own lists", open_cub200),
    "imagenet": Dataset("imagenet:DIR", "ILSVRC2012: train, and val in folders or flat", open_imagenet),
    "segment": Dataset("segment:DIR", "images/ with masks/ of class indices", open_segment),
    "images": Dataset("images:DIR", "pictures without labels, in any subfolders", open_images),
}


def open_data(
    reference: str,
    *,
    val_data: str | None = None,
    test_data: str | None = None,
    user_code: Collection[str] = frozenset(),
    input_shape: Shape | None = None,
    limit: int | None = None,
) -> DataSource:
    """Find a data set; its images are read when a split is first used.

    Args:
        reference: ``KIND``, ``KIND:DIR``, ``my.py:factory`` or ``package.module:factory``; the last two
            perhaps `with_arguments`.
        val_data: another reference, whose validation split is used (or all of it, if it has no splits).
        test_data: likewise, for the test split.
        user_code: references that the command line names, the only ones whose code may run.
        input_shape: (C, H, W) that the network takes; other images are converted, and a note says so.
        limit: largest number of images of each split, evenly spread.

    Raises:
        DataError: the data set is unknown, missing or damaged, or is user code that was not named.
        UserCodeError: the user's function failed or returned the wrong thing.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} must be at least 1")
    source = _open(reference, user_code, input_shape)
    others = {
        role: _open(other, user_code, input_shape)
        for role, other in (("validation", val_data), ("test", test_data))
        if other is not None
    }
    return _serve(dataclasses.replace(_replaced(source, others), limit=limit), input_shape)


def _replaced(source: DataSource, others: Mapping[str, DataSource]) -> DataSource:
    """A data set with splits of others."""
    loaders, sizes = dict(source.loaders), dict(source.sizes)
    for role, other in others.items():
        loaders[role] = _override(source, other, role)
        sizes.pop(role, None)
        if other.whole is not None:
            sizes[role] = sum(other.sizes.values())
        elif role in other.sizes:
            sizes[role] = other.sizes[role]
    return dataclasses.replace(
        source,
        loaders=loaders,
        sizes=sizes,
        others={role: other.reference for role, other in others.items()},
        task=source.task or next((other.task for other in others.values() if other.task), None),
        labelled=source.labelled or any(other.labelled for other in others.values()),
        warnings=(*source.warnings, *(text for other in others.values() for text in other.warnings)),
        _loaded={},
        _served={},
    )


def listing() -> list[DatasetRecord]:
    """All data sets in the order of the table, and a line for the user's own."""
    own = DatasetRecord("my.py:factory", "my.py:factory", "your own, see docs/datasets.md")
    return [DatasetRecord(name, entry.form, entry.summary) for name, entry in DATASETS.items()] + [own]


def is_own(reference: str) -> bool:
    """Whether a reference names data of the user's own, my.py:factory."""
    return reference.partition(":")[0] not in DATASETS and user.looks_like_user_code(reference)


def with_arguments(reference: str, arguments: Mapping[str, Any]) -> str:
    """A reference to the user's data with the arguments of its function.

    Raises:
        DataError: there are arguments, and the data are not the user's own.
    """
    if arguments and not is_own(reference):
        given = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise DataError(f"{reference} takes no arguments ({given}): only data of your own, my.py:factory, do")
    return user.with_arguments(reference, arguments)


def _open(reference: str, named: Collection[str], input_shape: Shape | None) -> DataSource:
    kind, _, folder = reference.partition(":")
    code, arguments = user.split_arguments(reference)
    if is_own(code):
        return open_user_data(code, named, arguments)
    if kind in DATASETS:
        return DATASETS[kind].open(reference, folder, input_shape)
    if Path(reference).expanduser().is_dir():
        raise DataError(f"{reference} is a folder: say what it holds, such as folder:{reference}")
    near = difflib.get_close_matches(kind.lower(), DATASETS, n=2, cutoff=0.6)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    forms = ", ".join(entry.form for entry in DATASETS.values())
    raise DataError(f"unknown data set {reference!r}{hint}; allowed: {forms}, path/to/file.py:function")


def _override(source: DataSource, other: DataSource, role: str) -> Callable[[], Split]:
    """A function that reads the ``role`` split of another source, with labels numbered as in ``source``."""
    if source.task is not None and other.task is not None and source.task != other.task:
        raise DataError(
            f"{other.reference} is for {other.task}, the training data {source.reference} for {source.task}"
        )
    numbers = numbers_of(
        other.classes, source.classes, other.reference, owner=f"the training data {source.reference}"
    )
    load = other.whole or other.loaders.get(role)
    if load is None:
        raise DataError(f"{other.reference} has no {role} split (it has: {', '.join(other.loaders)})")
    return load if numbers == list(range(len(numbers))) else renumbered(load, numbers)


def _serve(source: DataSource, input_shape: Shape | None) -> DataSource:
    if input_shape is None or input_shape == source.shape:
        return source
    check_channels(source.shape[0], input_shape[0])
    mean, std = source.mean, source.std
    if input_shape[0] != source.shape[0]:
        mean, std = (convert_statistics(values, input_shape[0]) for values in (mean, std))
    note = f"{source.reference}: {describe(source.shape, input_shape)}"
    return dataclasses.replace(
        source, shape=input_shape, mean=mean, std=std, notes=(*source.notes, note), _loaded={}, _served={}
    )
