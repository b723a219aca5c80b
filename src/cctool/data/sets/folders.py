"""Folders of images: one folder per class (also ImageNet's layout), or the label in each file's name."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cctool.base.errors import DataError
from cctool.data.image_files import EXTENSIONS, Resize, measure_images
from cctool.data.places import named_folder
from cctool.data.records import Augmentation, Crop, DataSource, Padding, Shape
from cctool.data.sets.file_source import FileSet, Presentation, file_source, load_files, statistics

ROLES = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
# Pixels up to which images are served as they are, held in memory, and cropped with padding like CIFAR.
SMALL = 96
PHOTO_SIZE = 224
LABELLED_SIZE = 256
IMAGENET_GEOMETRY = Resize(margin=256 / 224)
PHOTO_AUGMENTATION = Augmentation(crop=Crop.RESIZED, flip=True)


def open_folder(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open class folders: ``DIR/CLASS/*.jpg``, or these under train, val and test.

    Images of one size up to 96 pixels are served as they are; others at 224x224, the shorter side resized to
    256 and the centre cropped; all at ``input_shape`` (C, H, W) if it is given. A folder that holds images
    but no folders is unlabelled.

    Raises:
        DataError: the folder does not exist, or holds no images or a damaged one.
    """
    root = named_folder("folder", folder)
    parts = parts_of(root, by_class_folder)
    presentation = presented(root, first_files(reference, parts), input_shape)
    return file_source("folder", reference, root, parts, presentation)


def open_images(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open pictures without labels: all image files below a folder, which are its training split.

    They are served as `open_folder` serves them.

    Raises:
        DataError: the folder does not exist, or holds no images or a damaged one.
    """
    root = named_folder("images", folder)
    files = FileSet(tuple(image_files(root, root)))
    presentation = presented(root, first_files(reference, {"train": files}), input_shape)
    mean, std = statistics(presentation.shape[0])
    load = partial(load_files, root, presentation, {}, files=files)
    return DataSource(
        name="images",
        reference=reference,
        classes=(),
        shape=presentation.shape,
        mean=mean,
        std=std,
        augmentation=presentation.augmentation,
        loaders={"train": partial(load, "train")},
        whole=partial(load, "whole"),
        task=None,
        labelled=False,
        sizes={"train": len(files.files)},
    )


def presented(root: Path, files: tuple[str, ...], input_shape: Shape | None) -> Presentation:
    """How image files are served: small ones of one size as they are, others as photographs.

    Raises:
        DataError: one of them is damaged.
    """
    sizes = measure_images(root, files)
    own = (PHOTO_SIZE, PHOTO_SIZE)
    if sizes.common is not None and max(sizes.common) <= SMALL:
        own = sizes.common
    shape = input_shape or (sizes.channels, *own)
    if max(shape[1:]) <= SMALL:
        padding = max(1, max(shape[1:]) // 8)
        augmentation = Augmentation(crop=Crop.PADDED, padding=padding, flip=True)
        return Presentation(shape, Resize(), augmentation, may_hold=True)
    return Presentation(shape, IMAGENET_GEOMETRY, PHOTO_AUGMENTATION)


def open_labelled(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open files named ``<label>_<id>.jpg``, perhaps under training, validation and testing.

    Served at 256x256, or smaller if all images are smaller. Training images are cropped at random (padded
    symmetrically if needed), flipped, and rotated by up to 15 degrees; others are cropped at the centre. For
    another ``input_shape`` (C, H, W), images are first scaled by its ratio to that size. If all labels are
    numbers, the classes are 0..largest; otherwise they are sorted. A split without any label is unlabelled.

    Raises:
        DataError: the folder does not exist or holds no images, or an image is damaged or alone has no label.
    """
    root = named_folder("labelled", folder)
    parts = parts_of(root, _by_name)
    sizes = measure_images(root, first_files(reference, parts))
    size = min(LABELLED_SIZE, sizes.longest)
    augmentation = Augmentation(crop=Crop.PADDED, padding_mode=Padding.SYMMETRIC, flip=True, rotation=15.0)
    shape = input_shape or (sizes.channels, size, size)
    presentation = Presentation(shape, Resize(native=size), augmentation)
    names = {name for part in parts.values() for name in part.names or ()}
    classes = None
    if names and all(name.isdecimal() for name in names):
        classes = tuple(str(label) for label in range(max(int(name) for name in names) + 1))
        for role, part in parts.items():
            if part.names is not None:
                # 007 and 7 are one class.
                parts[role] = FileSet(part.files, tuple(str(int(name)) for name in part.names))
    return file_source("labelled", reference, root, parts, presentation, classes)


def parts_of(root: Path, find: Callable[[Path, Path], FileSet]) -> dict[str, FileSet]:
    """The files in the folders train, val and test, under any of their names; ``whole`` if there are none.

    ``find`` lists the files of a part from (data set's folder, the part's).

    Raises:
        DataError: a part is there under two names.
    """
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    found: dict[str, FileSet] = {}
    for role, names in ROLES.items():
        present = [folders[name] for name in names if name in folders]
        if len(present) > 1:
            raise DataError(f"{root} has both {present[0].name} and {present[1].name}; keep one of them")
        if present:
            found[role] = find(root, present[0])
    return found or {"whole": find(root, root)}


def by_class_folder(root: Path, part: Path) -> FileSet:
    """The images in the folders of ``part``, a class each; without folders the unlabelled images in it."""
    classes = sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {name: image_files(root, part / name) for name in classes}
    labelled = [(file, name) for name, held in found.items() for file in held]
    if labelled:
        empty = tuple((part / name).relative_to(root).as_posix() for name, held in found.items() if not held)
        files, names = zip(*labelled, strict=True)
        return FileSet(files, names, empty=empty)
    return FileSet(tuple(image_files(root, part)))


def _by_name(root: Path, part: Path) -> FileSet:
    files = tuple(image_files(root, part))
    names = tuple(Path(file).stem.rpartition("_")[0] for file in files)
    if not any(names):
        return FileSet(files)
    if not all(names):
        bad = files[names.index("")]
        raise DataError(f"{root / bad} has no label in its name, <label>_<id>, though other files have one")
    return FileSet(files, names)


def image_files(root: Path, folder: Path) -> list[str]:
    """All files below ``folder`` whose names end like images, as sorted POSIX paths relative to ``root``.

    Links are followed, except to a folder above themselves, which would never end.
    """
    found = []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        above = {os.path.realpath(parent) for parent in (Path(place), *Path(place).parents)}
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(place, name)) not in above
        ]
        found += [
            (Path(place) / name).relative_to(root).as_posix()
            for name in files
            if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def first_files(reference: str, parts: dict[str, FileSet]) -> tuple[str, ...]:
    """The files of the first part that has any. Raises DataError if none has."""
    for part in parts.values():
        if part.files:
            return part.files
    kinds = ", ".join(sorted(EXTENSIONS))
    raise DataError(f"{reference}: there are no images in it (files that end in {kinds})")
