"""Images with masks of equal names: ``images/`` and ``masks/``, perhaps under train, val and test."""

from pathlib import Path, PurePosixPath

from cctool.base.errors import DataError
from cctool.data.classes import IGNORED
from cctool.data.mask_files import largest_index
from cctool.data.places import named_folder
from cctool.data.records import DataSource, Shape
from cctool.data.sets.file_source import FileSet, file_source
from cctool.data.sets.folders import first_files, image_files, parts_of, presented

NAMES_FILE = "classes.txt"
_NAMES_BYTES = 2**20
# Formats that change levels would change classes.
_LOSSY = frozenset({".jpeg", ".jpg", ".webp"})


def open_segment(reference: str, folder: str, input_shape: Shape | None = None) -> DataSource:
    """Open images and their masks, whose levels or palette entries are class indices; 255 is no class.

    ``DIR/images`` and ``DIR/masks`` are divided as a folder without splits; under train, val and test they
    are the splits. Images are served as `open_folder` serves them. ``classes.txt`` names the classes, one a
    line; without it they are numbered up to the largest index in 256 of the masks.

    Raises:
        DataError: the folder does not exist or holds no images, an image or a mask has no partner, or a file
            is damaged or no mask; the message names it.
    """
    root = named_folder("segment", folder)
    parts = parts_of(root, _pairs)
    presentation = presented(root, first_files(reference, parts), input_shape)
    masks = [mask for part in parts.values() for mask in part.masks or ()]
    classes = _named_classes(root / NAMES_FILE)
    if classes is None:
        classes = tuple(map(str, range(largest_index(root, masks) + 1)))
    if not classes:
        raise DataError(f"{reference}: all pixels of its masks are {IGNORED}, which is no class")
    if len(classes) == 1:
        raise DataError(
            f"{reference} has one class only ({classes[0]}), and {IGNORED} is no class: masks of two levels "
            "need 0 and 1"
        )
    return file_source("segment", reference, root, parts, presentation, classes, task="segmentation")


def _pairs(root: Path, part: Path) -> FileSet:
    folders = part / "images", part / "masks"
    for place in folders:
        if not place.is_dir():
            raise DataError(
                f"{part} has no folder {place.name}; images/ and masks/ of equal names belong there"
            )
    images, masks = (_by_stem(root, place) for place in folders)
    for stem, file in images.items():
        if stem not in masks:
            raise DataError(f"{root / file} has no mask: {folders[1] / stem}.png is missing")
    for stem, file in masks.items():
        if stem not in images:
            raise DataError(f"{root / file} has no image: there is no {stem} in {folders[0]}")
        if PurePosixPath(file).suffix.lower() in _LOSSY:
            raise DataError(f"{root / file} is no mask: its format changes levels; PNG keeps class indices")
    return FileSet(tuple(images.values()), masks=tuple(masks[stem] for stem in images))


def _by_stem(root: Path, place: Path) -> dict[str, str]:
    """Paths relative to ``root`` by their path below ``place`` without suffix."""
    found: dict[str, str] = {}
    for file in image_files(root, place):
        stem = (root / file).relative_to(place).with_suffix("").as_posix()
        if stem in found:
            raise DataError(
                f"{root / found[stem]} and {root / file} have one name: which belongs to it is not clear"
            )
        found[stem] = file
    return found


def _named_classes(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _NAMES_BYTES:
            raise DataError(f"{path} is too large for a list of classes, one name a line")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} names the class {twice!r} twice")
    if not 0 < len(names) <= IGNORED:
        raise DataError(f"{path} names {len(names)} classes; 1 to {IGNORED} fit into a mask")
    return names
