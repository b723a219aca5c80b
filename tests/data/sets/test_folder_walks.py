"""Folders that lead in circles, or that the system refuses to list."""

import os
from pathlib import Path

import pytest

from cctool.base.errors import DataError
from cctool.data.registry import open_data
from cctool.data.sets import folders
from layouts import write_image


def test_links_in_circles_end(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        real = tmp_path / "elsewhere" / name
        real.mkdir(parents=True)
        (tmp_path / "data" / name).symlink_to(real)
        for index in range(4):
            write_image(real / f"{index}.png", (8, 8), seed=index)
        for link in ("again", "once_more"):
            (real / link).symlink_to(real)
    found = open_data(f"folder:{tmp_path / 'data'}")
    assert sum(len(found.split(name)) for name in ("train", "validation", "test")) == 8


def test_what_the_system_refuses_is_an_error_and_not_a_smaller_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cat" / "closed").mkdir(parents=True)
    write_image(tmp_path / "cat" / "a.png", (8, 8))
    real = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        folders.image_files(tmp_path, tmp_path / "cat")
