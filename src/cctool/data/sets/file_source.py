"""Make a data source from lists of image files: class names, splits, and whether they are held in memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cctool.base.errors import DataError
from cctool.data.image_files import FileStream, Resize, hold
from cctool.data.mask_files import MaskStream
from cctool.data.records import IMAGENET_MEAN, IMAGENET_STD, Augmentation, DataSource, Shape, Split
from cctool.data.splits import stratified_by_name

# Shares of training, validation and test in files that have no splits.
FRACTIONS = (0.8, 0.1, 0.1)
VALIDATION_FRACTION = 0.1
HELD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class FileSet:
    """Image files, and the class name or the file of the mask of each, if they have labels of that kind.

    Attributes:
        files: paths relative to the data set's folder.
        names: class names; None if there are none.
        masks: paths; None if there are none.
        empty: paths of class folders without images.
    """

    files: tuple[str, ...]
    names: tuple[str, ...] | None = None
    masks: tuple[str, ...] | None = None
    empty: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether the files have labels of any kind."""
        return self.names is not None or self.masks is not None

    def take(self, indices: list[int]) -> "FileSet":
        """These files only."""
        names = None if self.names is None else tuple(self.names[index] for index in indices)
        masks = None if self.masks is None else tuple(self.masks[index] for index in indices)
        return FileSet(tuple(self.files[index] for index in indices), names, masks)


@dataclass(frozen=True)
class Presentation:
    """How the files are served: size, scaling, augmentation, and whether they may be held in memory."""

    shape: Shape
    geometry: Resize
    augmentation: Augmentation
    may_hold: bool = False


def file_source(
    kind: str,
    reference: str,
    folder: Path,
    parts: Mapping[str, FileSet],
    presentation: Presentation,
    classes: tuple[str, ...] | None = None,
    *,
    task: str = "classification",
) -> DataSource:
    """Make a data source from image files.

    Args:
        kind: the data source's name.
        reference: as the user wrote it.
        folder: what the files' paths are relative to.
        parts: split name -> files, or ``whole`` alone for files without splits. A missing validation split is
            held out of the training files (a tenth of each class, by the hash of the names). The validation
            images replace a missing test split, and a note says so.
        presentation: how the files are served.
        classes: in the order of the labels; None takes the sorted class names of the training files.
        task: that the labels are for.

    Raises:
        DataError: there are no images, or a class that the training files do not have.
    """
    divided, notes = _complete(reference, dict(parts))
    names = _class_names(parts) if classes is None else classes
    labels = {name: index for index, name in enumerate(names)}
    for name, files in divided.items():
        _check_names(reference, name, files, labels)
    load = partial(load_files, folder, presentation, labels)
    mean, std = statistics(presentation.shape[0])
    labelled = any(files.labelled for files in divided.values())
    return DataSource(
        name=kind,
        reference=reference,
        classes=names,
        shape=presentation.shape,
        mean=mean,
        std=std,
        augmentation=presentation.augmentation,
        loaders={name: partial(load, name, files) for name, files in divided.items()},
        notes=notes,
        whole=partial(load, "whole", parts["whole"]) if "whole" in parts else None,
        task=task if labelled else None,
        labelled=labelled,
        sizes={name: len(files.files) for name, files in divided.items()},
        warnings=tuple(
            f"{reference}: the class folder {name} has no images"
            for part in parts.values()
            for name in part.empty
        ),
    )


def statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation for RGB (3 channels) or gray images (1)."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)


def _complete(reference: str, parts: dict[str, FileSet]) -> tuple[dict[str, FileSet], tuple[str, ...]]:
    if not any(part.files for part in parts.values()):
        raise DataError(f"{reference}: there are no images in it")
    whole = parts.pop("train" if set(parts) == {"train"} else "whole", None)
    if whole is not None:
        if not whole.labelled:
            return {"test": whole}, (
                f"{reference} has no labels: all {len(whole.files)} images are its test split",
            )
        train, validation, test = (whole.take(part) for part in _divide(whole, FRACTIONS))
        sizes = f"{len(train.files)}/{len(validation.files)}/{len(test.files)}"
        divided = {"train": train, "validation": validation, "test": test}
        return divided, (f"{reference} is divided by us: train/validation/test hold {sizes} images",)
    notes = []
    if "train" in parts and "validation" not in parts:
        kept, held = _divide(parts["train"], (1 - VALIDATION_FRACTION, VALIDATION_FRACTION))
        parts["validation"] = parts["train"].take(held)
        parts["train"] = parts["train"].take(kept)
        notes.append(f"{reference} has no validation images: {len(held)} are held out of the training images")
    elif "validation" in parts and "test" not in parts:
        parts["test"] = parts["validation"]
        notes.append(f"{reference} has no test images: its validation images stand in; see --test-data")
    return parts, tuple(notes)


def _divide(files: FileSet, fractions: tuple[float, ...]) -> list[list[int]]:
    order = {name: index for index, name in enumerate(sorted(set(files.names or ())))}
    labels = None if files.names is None else [order[name] for name in files.names]
    return stratified_by_name(files.files, labels, fractions)


def _class_names(parts: Mapping[str, FileSet]) -> tuple[str, ...]:
    first = parts.get("whole") or parts.get("train")
    found = [first] if first is not None else list(parts.values())
    return tuple(sorted({name for part in found for name in part.names or ()}))


def _check_names(reference: str, split: str, files: FileSet, labels: Mapping[str, int]) -> None:
    if split == "train" and not files.labelled:
        raise DataError(f"{reference}: the training images have no labels")
    unknown = sorted(set(files.names or ()) - set(labels))
    if unknown:
        raise DataError(
            f"{reference}: the {split} images have classes that training lacks: {', '.join(unknown[:5])}"
        )


def load_files(
    folder: Path, presentation: Presentation, labels: Mapping[str, int], name: str, files: FileSet
) -> Split:
    """The split of image files, held in memory if that is allowed and they fit; ``labels`` number names.

    Raises:
        DataError: a file that is held is missing or damaged.
    """
    pictures = FileStream(folder, files.files, presentation.geometry)
    if files.masks is not None:
        stream = MaskStream(pictures, files.masks, tuple(labels))
        return Split(name, presentation.shape, None, None, stream, files.files, files.masks, folder)
    known = None
    if files.names is not None:
        known = torch.tensor([labels[label] for label in files.names], dtype=torch.int64)
    shape = presentation.shape
    if presentation.may_hold and len(pictures) * math.prod(shape) <= HELD_BYTES:
        return Split(name, shape, hold(pictures, shape), known, files=files.files, folder=folder)
    return Split(name, shape, None, known, pictures, files.files, folder=folder)
