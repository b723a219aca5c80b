"""The picture of kept widths."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cctool.analysis.widths import WidthBar, draw_widths, write_widths
from cctool.base.errors import CheckpointError, UsageError

WIDTHS = [
    WidthBar("conv1", 16, 8),
    WidthBar("layer1.0.conv1", 32, 32, "excluded"),
    WidthBar("odd $name_{x}", 64, 5),
]


def blue(path: Path) -> int:
    """Pixels in the colour of kept channels of families that were cut."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(image - np.array([0x1F, 0x6F, 0xB2])).max(axis=2) < 8).sum())


def test_the_more_is_kept_the_longer_the_bars(tmp_path: Path) -> None:
    write_widths(WIDTHS, tmp_path / "a.png", "a")
    more = [WidthBar("conv1", 16, 15), WIDTHS[1], WidthBar("odd $name_{x}", 64, 60)]
    write_widths(more, tmp_path / "b.png", "b")
    assert 0 < blue(tmp_path / "a.png") < 0.7 * blue(tmp_path / "b.png")


def test_equal_widths_give_equal_pictures_of_each_kind() -> None:
    for kind, head in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        picture = draw_widths(WIDTHS, "title", kind)
        assert picture.startswith(head)
        assert draw_widths(WIDTHS, "title", kind) == picture


def test_many_families_and_none_can_be_drawn() -> None:
    assert draw_widths([WidthBar(f"layer{n}", 2048, 8 + n) for n in range(200)], "many")
    assert draw_widths([], "none")


def test_existing_files_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    write_widths(WIDTHS, tmp_path / "a.png", "a")
    with pytest.raises(CheckpointError, match="exists"):
        write_widths(WIDTHS, tmp_path / "a.png", "a")
    write_widths(WIDTHS, tmp_path / "a.png", "a", overwrite=True)
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        write_widths(WIDTHS, tmp_path / "a.jpg", "a")
