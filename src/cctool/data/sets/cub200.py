"""Caltech-UCSD Birds-200-2011 by its own lists (Wah et al. 2011): images, labels, classes and splits."""

from pathlib import Path

from cctool.base.errors import DataError
from cctool.data.places import missing, root_folder
from cctool.data.records import DataSource, Shape
from cctool.data.sets.file_source import FileSet, Presentation, file_source
from cctool.data.sets.folders import IMAGENET_GEOMETRY, PHOTO_AUGMENTATION

FOLDER = "CUB_200_2011"
DEFAULT_SHAPE = (3, 224, 224)


def open_cub200(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open CUB-200-2011: its own test images, and its training images less a tenth of each class held out.

    ``folder`` is or holds ``CUB_200_2011``; ``input_shape`` (C, H, W) is served instead of 3x224x224.

    Raises:
        DataError: a list is missing, damaged, or does not fit the others.
    """
    top = root_folder(folder)
    places = [top / FOLDER, top]
    root = next((place for place in places if (place / "images.txt").is_file()), None)
    if root is None:
        raise missing(reference, "images.txt and the rest of CUB_200_2011", places)
    images = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    training = _table(root / "train_test_split.txt")
    names = _table(root / "classes.txt")
    for other, values in (("image_class_labels.txt", labels), ("train_test_split.txt", training)):
        if values.keys() != images.keys():
            raise DataError(f"{root / other} lists other images than images.txt; fetch the data set again")
    _check_values(root / "image_class_labels.txt", labels, set(names))
    _check_values(root / "train_test_split.txt", training, {"0", "1"})
    parts = {}
    for role, flag in (("train", "1"), ("test", "0")):
        chosen = [key for key in images if training[key] == flag]
        files = tuple(f"images/{images[key]}" for key in chosen)
        parts[role] = FileSet(files, tuple(names[labels[key]] for key in chosen))
    presentation = Presentation(input_shape or DEFAULT_SHAPE, IMAGENET_GEOMETRY, PHOTO_AUGMENTATION)
    return file_source("cub200", reference, root, parts, presentation, tuple(names.values()))


def _table(path: Path) -> dict[str, str]:
    """The values of a list of ``<number> <value>`` lines, by number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch the data set again") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or not value:
            raise DataError(f"{path}, line {number}: {line!r} is not '<number> <value>'")
        found[key] = value
    if not found:
        raise DataError(f"{path} is empty; fetch the data set again")
    return found


def _check_values(path: Path, values: dict[str, str], allowed: set[str]) -> None:
    for key, value in values.items():
        if value not in allowed:
            raise DataError(
                f"{path}: image {key} has {value!r}, which is not one of the {len(allowed)} allowed values"
            )
