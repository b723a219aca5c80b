"""Folders of images: one folder per class (also ImageNet's layout), or the label in each file's name."""

import os
from collections.abc import Callable
from pathlib import Path

from cctool.base.errors import DataError
from cctool.data.image_files import EXTENSIONS, Resize, measure_images
from cctool.data.places import named_folder
from cctool.data.records import Augmentation, Crop, DataSource, Padding, Shape
from cctool.data.sets.file_source import FileSet, Presentation, file_source

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
    parts = _parts(root, _by_folder)
    sizes = measure_images(root, _first_files(reference, parts))
    own = (PHOTO_SIZE, PHOTO_SIZE)
    if sizes.common is not None and max(sizes.common) <= SMALL:
        own = sizes.common
    shape = input_shape or (sizes.channels, *own)
    if max(shape[1:]) <= SMALL:
        padding = max(1, max(shape[1:]) // 8)
        augmentation = Augmentation(crop=Crop.PADDED, padding=padding, flip=True)
        presentation = Presentation(shape, Resize(), augmentation, may_hold=True)
    else:
        presentation = Presentation(shape, IMAGENET_GEOMETRY, PHOTO_AUGMENTATION)
    return file_source("folder", reference, root, parts, presentation)


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
    parts = _parts(root, _by_name)
    sizes = measure_images(root, _first_files(reference, parts))
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


def _parts(root: Path, find: Callable[[Path, Path], FileSet]) -> dict[str, FileSet]:
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    found: dict[str, FileSet] = {}
    for role, names in ROLES.items():
        present = [folders[name] for name in names if name in folders]
        if len(present) > 1:
            raise DataError(f"{root} has both {present[0].name} and {present[1].name}; keep one of them")
        if present:
            found[role] = find(root, present[0])
    return found or {"whole": find(root, root)}


def _by_folder(root: Path, part: Path) -> FileSet:
    classes = sorted(path.name for path in part.iterdir() if path.is_dir() and not path.name.startswith("."))
    labelled = [(file, name) for name in classes for file in _images(root, part / name)]
    if labelled:
        files, names = zip(*labelled, strict=True)
        return FileSet(files, names)
    return FileSet(tuple(_images(root, part)), None)


def _by_name(root: Path, part: Path) -> FileSet:
    files = tuple(_images(root, part))
    names = tuple(Path(file).stem.rpartition("_")[0] for file in files)
    if not any(names):
        return FileSet(files, None)
    if not all(names):
        bad = files[names.index("")]
        raise DataError(f"{root / bad} has no label in its name, <label>_<id>, though other files have one")
    return FileSet(files, names)


def _images(root: Path, folder: Path) -> list[str]:
    """All image files below ``folder``, as sorted POSIX paths relative to ``root``.

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


def _first_files(reference: str, parts: dict[str, FileSet]) -> tuple[str, ...]:
    for part in parts.values():
        if part.files:
            return part.files
    kinds = ", ".join(sorted(EXTENSIONS))
    raise DataError(f"{reference}: there are no images in it (files that end in {kinds})")
