"""Where data sets are looked for, and the error if one is not found."""

import os
from pathlib import Path

from cctool.base.downloads import DOWNLOAD_VARIABLE
from cctool.base.downloads import download_allowed as download_allowed
from cctool.base.errors import DataError

FOLDER_VARIABLE = "CCTOOL_DATA"


def root_folder(folder: str) -> Path:
    """The folder that a reference names, or the environment's CCTOOL_DATA, or ~/.cache/cctool."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/cctool").expanduser()


def named_folder(kind: str, folder: str) -> Path:
    """The folder that a reference must name if its kind of data set has no default folder.

    Raises:
        DataError: no folder is named, or it does not exist.
    """
    if not folder:
        raise DataError(f"{kind} needs the folder of the images: {kind}:DIR")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise DataError(f"{kind}:{folder}: there is no folder {path}")
    return path


def missing(reference: str, wanted: str, places: list[Path], *, downloadable: bool = False) -> DataError:
    """The error that says what was looked for, where, and what to do.

    Args:
        reference: as the user wrote it.
        wanted: the files, in words.
        places: where they were looked for, best first.
        downloadable: whether torchvision can download them.
    """
    looked = ", ".join(str(place) for place in places)
    kind = reference.partition(":")[0]
    fetch = f", or set {DOWNLOAD_VARIABLE}=1 to let torchvision download it" if downloadable else ""
    return DataError(
        f"{reference}: did not find {wanted} in {looked}; put them there, "
        f"name their folder as {kind}:DIR{fetch}"
    )
