"""Folders that take their name when they are whole."""

from pathlib import Path

import pytest

from cctool.base.errors import CheckpointError
from cctool.checkpoint.file.atomic_folder import folder_atomically


def ours(name: str) -> bool:
    return name.endswith(".seg")


def fill(path: Path, content: str, *, overwrite: bool = False) -> None:
    with folder_atomically(path, overwrite=overwrite, ours=ours) as folder:
        (folder / "a.seg").write_text(content)


def fill_halfway(path: Path, *, overwrite: bool = False) -> None:
    with folder_atomically(path, overwrite=overwrite, ours=ours) as folder:
        (folder / "a.seg").write_text("two")
        raise ValueError("midway")


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with folder_atomically(tmp_path / "maps", overwrite=False, ours=ours) as folder:
        (folder / "a.seg").write_text("one")
        assert not (tmp_path / "maps").exists()
    assert entries(tmp_path) == ["maps"]
    assert entries(tmp_path / "maps") == ["a.seg"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="midway"):
        fill_halfway(tmp_path / "maps")
    assert entries(tmp_path) == []


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    fill(tmp_path / "maps", "one")
    with pytest.raises(CheckpointError, match="--force replaces it"):
        fill(tmp_path / "maps", "two")
    assert (tmp_path / "maps" / "a.seg").read_text() == "one"
    fill(tmp_path / "maps", "two", overwrite=True)
    assert (tmp_path / "maps" / "a.seg").read_text() == "two"
    assert entries(tmp_path) == ["maps"]


def test_somebody_elses_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex"):
        fill(tmp_path / "maps", "two", overwrite=True)
    assert (tmp_path / "maps" / "thesis.tex").read_text() == "mine"


def test_an_error_keeps_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "maps", "one")
    with pytest.raises(ValueError, match="midway"):
        fill_halfway(tmp_path / "maps", overwrite=True)
    assert (tmp_path / "maps" / "a.seg").read_text() == "one"
    assert entries(tmp_path) == ["maps"]


def test_a_file_or_a_missing_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        fill(tmp_path / "file", "one", overwrite=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        fill(tmp_path / "no" / "maps", "one")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".0123456789abcdef.cctool-tmp-folder"
    dead.mkdir()
    (dead / ".lock").touch()
    fill(tmp_path / "maps", "one")
    assert entries(tmp_path) == ["maps"]


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with folder_atomically(tmp_path / "first", overwrite=False, ours=ours) as folder:
        fill(tmp_path / "second", "two")
        (folder / "a.seg").write_text("one")
    assert entries(tmp_path) == ["first", "second"]
