"""ImageNet's classification set of 2012 (ILSVRC2012; Russakovsky et al. 2015), as people keep it.

Training images lie in folders named by WordNet ids. Validation images do, too, or lie in one folder, as they
were published; then the development kit (or Kaggle's table) tells their labels.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cctool.base.errors import DataError
from cctool.data.places import named_folder
from cctool.data.records import DataSource, Shape
from cctool.data.sets.file_source import FileSet, Presentation, file_source
from cctool.data.sets.folders import IMAGENET_GEOMETRY, PHOTO_AUGMENTATION, by_class_folder, image_files
from cctool.data.sets.matlab_file import read_variables

DEFAULT_SHAPE = (3, 224, 224)
ROOTS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
FOLDERS = {
    "train": ("train", "ILSVRC2012_img_train", "training"),
    "validation": ("val", "ILSVRC2012_img_val", "validation", "valid"),
}
KITS = ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "data", ".")
META, TRUTH, TABLE = "meta.mat", "ILSVRC2012_validation_ground_truth.txt", "LOC_val_solution.csv"
_WNID = re.compile(r"n\d{8}")
_FLAT = re.compile(r"ILSVRC2012_val_(\d{8})")
# The published files have 0.3 and 2 MB.
_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class _Synsets:
    """What meta.mat says: WordNet id by ILSVRC2012 id of the classes, and the words of each WordNet id."""

    wnids: Mapping[int, str]
    words: Mapping[str, str]


def open_imagenet(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open ILSVRC2012: ``train/<wnid>/*.JPEG`` if it is there, and ``val`` in such folders or flat.

    The classes are those of the development kit, without it those that have folders, sorted by WordNet id as
    torchvision's networks have them. They are called as torchvision calls them, others by the first of their
    words in the kit, or by their id. A tenth of each training class is held out; the validation images are
    the test images. Served at 3x224x224 or ``input_shape`` (C, H, W), as `open_folder` serves photographs.

    Raises:
        DataError: the folder holds no such files, a label or a list is missing, damaged or contradictory.
    """
    top = named_folder("imagenet", folder)
    root, places = _places(reference, top)
    kit = next((top / name for name in KITS if (top / name / META).is_file()), None)
    synsets = None if kit is None else _synsets(kit / META)
    parts = {role: _part(root, place, top, kit, synsets) for role, place in places.items()}
    found = {wnid for part in parts.values() for wnid in part.names or ()}
    wnids = sorted(found if synsets is None else set(synsets.wnids.values()))
    if not found <= set(wnids):
        raise DataError(f"{reference}: {META} does not know the class {min(found - set(wnids))}")
    names = _names(wnids, {} if synsets is None else synsets.words)
    by_wnid = dict(zip(wnids, names, strict=True))
    named = {
        role: FileSet(part.files, tuple(by_wnid[wnid] for wnid in part.names or ()), empty=part.empty)
        for role, part in parts.items()
    }
    presentation = Presentation(input_shape or DEFAULT_SHAPE, IMAGENET_GEOMETRY, PHOTO_AUGMENTATION)
    return file_source("imagenet", reference, root, named, presentation, names)


def _places(reference: str, top: Path) -> tuple[Path, dict[str, Path]]:
    """The folder that holds the images, and those of its training and validation images."""
    for root in (top / name for name in ROOTS):
        found = {
            role: root / name
            for role, names in FOLDERS.items()
            for name in reversed(names)
            if (root / name).is_dir()
        }
        if found:
            return root, found
    if any(_FLAT.match(file) for file in image_files(top, top)):
        return top, {"validation": top}
    raise DataError(
        f"{reference}: did not find train/<wnid>/*.JPEG, val/<wnid>/*.JPEG or val/ILSVRC2012_val_*.JPEG in "
        f"{top}"
    )


def _part(root: Path, place: Path, top: Path, kit: Path | None, synsets: _Synsets | None) -> FileSet:
    """The images of a part, with the WordNet id of each."""
    found = by_class_folder(root, place)
    if not found.files:
        raise DataError(f"{place} holds no images")
    if found.names is None:
        return _flat(root, found.files, _labels_of(top, kit, synsets))
    for wnid in sorted(set(found.names)):
        if not _WNID.fullmatch(wnid):
            raise DataError(
                f"{place / wnid}: the class folders of ImageNet are named by WordNet ids, as in n01440764; "
                "folder:DIR reads others"
            )
    return found


def _flat(root: Path, files: tuple[str, ...], labels: Mapping[int, str]) -> FileSet:
    names = []
    for file in files:
        match = _FLAT.fullmatch(Path(file).stem)
        if match is None:
            raise DataError(
                f"{root / file} is neither in a folder of its class nor named ILSVRC2012_val_<number>"
            )
        number = int(match[1])
        if number not in labels:
            raise DataError(f"{root / file}: there is no label for validation image {number}")
        names.append(labels[number])
    return FileSet(files, tuple(names))


def _labels_of(top: Path, kit: Path | None, synsets: _Synsets | None) -> dict[int, str]:
    """WordNet ids by the numbers of validation images, from the development kit or Kaggle's table."""
    if synsets is None and (top / TABLE).is_file():
        return _kaggle(top / TABLE)
    if kit is None or synsets is None:
        raise DataError(
            f"{top} has validation images in one folder, whose labels are in the development kit: put "
            f"{KITS[0]} with {META} and {TRUTH} there (or Kaggle's {TABLE})"
        )
    labels = {}
    for number, line in enumerate(_lines(kit / TRUTH), start=1):
        if not line.strip().isdecimal() or int(line) not in synsets.wnids:
            raise DataError(f"{kit / TRUTH}, line {number}: {line[:40]!r} is no class of {META}")
        labels[number] = synsets.wnids[int(line)]
    return labels


def _kaggle(path: Path) -> dict[int, str]:
    labels = {}
    for number, row in enumerate(csv.reader(_lines(path)[1:]), start=2):
        match = _FLAT.fullmatch(row[0]) if len(row) == 2 else None
        wnid = _WNID.match(row[1]) if match else None
        if match is None or wnid is None:
            raise DataError(f"{path}, line {number}: an image and its WordNet id are expected")
        labels[int(match[1])] = wnid[0]
    return labels


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > _LIMIT:
            raise DataError(f"{path} is too large for a list of labels; fetch it again")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch the development kit again") from error


def _synsets(path: Path) -> _Synsets:
    table = read_variables(path, ("synsets",), _LIMIT)["synsets"]
    wnids, words = {}, {}
    try:
        for row in table.reshape(-1):
            wnid, leaf = _scalar(row["WNID"]), int(_scalar(row["num_children"])) == 0
            words[str(wnid)] = str(_scalar(row["words"])) if row["words"].size else ""
            # Synsets with children are groups of classes.
            if leaf:
                wnids[int(_scalar(row["ILSVRC2012_ID"]))] = str(wnid)
    # What is in a damaged file's struct may be anything.
    except (ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path} is damaged: its synsets have no id, WordNet id, words and children"
        ) from error
    if not wnids or not all(_WNID.fullmatch(wnid) for wnid in wnids.values()):
        raise DataError(f"{path} is damaged: it names no classes by WordNet ids")
    if len(set(wnids.values())) < len(wnids):
        raise DataError(f"{path} is damaged: two classes have one WordNet id")
    return _Synsets(wnids, words)


def _scalar(value: Any) -> Any:
    """The only item of what loadmat gives for a field."""
    return value.reshape(-1)[0]


def _names(wnids: Iterable[str], words: Mapping[str, str]) -> tuple[str, ...]:
    """A name for each class: torchvision's, else its first word, else its id; twins get their id as well."""
    known = _known_names()
    first = {wnid: known.get(wnid) or words.get(wnid, wnid).split(",")[0].strip() or wnid for wnid in wnids}
    counts = Counter(first.values())
    return tuple(name if counts[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items())


def _known_names() -> dict[str, str]:
    """The 1,000 classes by WordNet id, as torchvision's weights name them."""
    text = resources.files("cctool.data").joinpath("files/imagenet_classes.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())
