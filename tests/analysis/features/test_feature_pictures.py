"""Pictures of coded maps: what they draw."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cctool.analysis.features.bands import Band
from cctool.analysis.features.pictures import CurvePoint, draw_curve, draw_histograms
from cctool.base.errors import CheckpointError
from cctool.checkpoint.file.atomic import write_bytes

LAPLACE = Band("DC", tuple(range(-3, 4)), (1, 4, 16, 400, 16, 4, 1))


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def blue(picture: bytes) -> int:
    return int((np.abs(pixels(picture) - (0x1F, 0x6F, 0xB2)).sum(2) < 12).sum())


def gray(picture: bytes) -> int:
    return int((np.abs(pixels(picture) - (0x8A, 0x97, 0xA6)).sum(2) < 12).sum())


def test_the_bar_of_zeros_is_drawn_only_where_asked_for() -> None:
    hidden, shown = (draw_histograms("tap", [LAPLACE], zero_bar=zero_bar) for zero_bar in (False, True))
    assert gray(hidden) == 0
    assert gray(shown) > 1000
    # It dwarfs the others.
    assert blue(shown) < blue(hidden) / 3


def test_each_band_has_a_panel() -> None:
    one, five = (draw_histograms("tap", [LAPLACE] * count) for count in (1, 5))
    assert blue(five) > 2 * blue(one)
    assert pixels(five).shape[0] > 1.5 * pixels(one).shape[0]


@pytest.mark.parametrize(
    "band",
    [
        Band("all zero", (0,), (50,)),
        Band("empty", (), ()),
        Band("one value", (7,), (3,)),
        Band("wide", tuple(range(-40_000, 40_000, 13)), (2,) * len(range(-40_000, 40_000, 13))),
        Band("$ _name^", (-1, 1), (2, 3)),
    ],
    ids=lambda band: band.name,
)
def test_odd_bands_are_drawn(band: Band) -> None:
    assert pixels(draw_histograms("tap", [band])).size


def test_outliers_do_not_stretch_the_axis() -> None:
    far = Band("DC", (-1, 1, 100_000), (10_000, 10_000, 1))
    near = Band("DC", (-1, 1), (10_000, 10_000))
    assert blue(draw_histograms("tap", [far])) == pytest.approx(blue(draw_histograms("tap", [near])), rel=0.1)


def test_equal_figures_give_equal_pictures() -> None:
    assert draw_histograms("tap", [LAPLACE]) == draw_histograms("tap", [LAPLACE])


def test_the_curve_has_a_line_a_split_and_the_uncoded_accuracy() -> None:
    points = [CurvePoint("test", quality, 10 - quality / 12, 60 + quality / 4) for quality in (10, 50, 90)]
    other = [CurvePoint("validation", p.quality, p.ratio, p.value - 5) for p in points]
    single = draw_curve("net", points, [("test", 84.0)], "top-1, %")
    assert blue(single) > blue(draw_curve("net", points, [], "top-1, %"))
    orange = (
        np.abs(pixels(draw_curve("net", points + other, [], "top-1, %")) - (0xC8, 0x64, 0x1E)).sum(2) < 12
    ).sum()
    assert orange > 300


def test_a_picture_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.png", b"one", overwrite=False)
    with pytest.raises(CheckpointError, match="exists already"):
        write_bytes(tmp_path / "a.png", b"two", overwrite=False)
    write_bytes(tmp_path / "a.png", b"two")
    assert (tmp_path / "a.png").read_bytes() == b"two"
