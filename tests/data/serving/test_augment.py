import math

import numpy as np
import pytest
import torch
from PIL import Image

from cctool.data.records import Augmentation, Crop, Padding
from cctool.data.serving import augment


def images(count: int = 12, height: int = 9, width: int = 7, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("mode", list(Padding))
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_and_flip_equal_the_plain_loop(mode: Padding, flip: bool, padding: int) -> None:
    batch = images()
    chosen = Augmentation(crop=Crop.PADDED, padding=padding, padding_mode=mode, flip=flip)
    draws = augment.draw(len(batch), (9, 7), chosen, seed=5, epoch=1)
    numpy_mode = {"zero": "constant", "symmetric": "symmetric"}[mode.value]
    expected = []
    for image, (top, left), mirrored in zip(batch, draws.offsets.tolist(), draws.flips.tolist(), strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), mode=numpy_mode)
        cut = padded[:, top : top + 9, left : left + 7]
        expected.append(cut[:, :, ::-1] if mirrored else cut)
    assert np.array_equal(augment.apply(batch, draws, chosen).numpy(), np.stack(expected))


def test_draws_cover_their_range() -> None:
    chosen = Augmentation(crop=Crop.PADDED, padding=4, flip=True)
    draws = augment.draw(3000, (32, 32), chosen, seed=0, epoch=0)
    for axis in (0, 1):
        counts = torch.bincount(draws.offsets[:, axis], minlength=9)
        assert len(counts) == 9
        assert int(counts.min()) > 260  # 333 expected, four standard deviations are 69
    assert abs(float(draws.flips.float().mean()) - 0.5) < 0.04
    assert draws.matrices is None


def test_switches_switch() -> None:
    assert not augment.draw(100, (8, 8), Augmentation(), 0, 0).flips.any()
    assert int(augment.draw(100, (8, 8), Augmentation(padding=3), 0, 0).offsets.max()) == 0
    batch = images()
    assert augment.apply(batch, augment.draw(12, (9, 7), Augmentation(), 0, 0), Augmentation()) is batch


def test_one_kind_leaves_the_draws_of_the_others() -> None:
    plain = augment.draw(50, (8, 8), Augmentation(crop=Crop.PADDED, padding=2, flip=True), 1, 1)
    turned = augment.draw(50, (8, 8), Augmentation(crop=Crop.PADDED, padding=2, flip=True, rotation=9), 1, 1)
    assert torch.equal(plain.offsets, turned.offsets)
    assert torch.equal(plain.flips, turned.flips)


@pytest.mark.parametrize("other", [(5, 2), (6, 1)])
def test_draws_depend_on_seed_and_epoch_alone(other: tuple[int, int]) -> None:
    chosen = Augmentation(crop=Crop.PADDED, padding=4, flip=True, rotation=10)
    torch.manual_seed(1)
    first = augment.draw(40, (8, 8), chosen, 5, 1)
    torch.manual_seed(2)
    again = augment.draw(40, (8, 8), chosen, 5, 1)
    different = augment.draw(40, (8, 8), chosen, *other)
    for name in ("offsets", "flips", "matrices"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(different, name))


def matrix_of(angle: float, size: tuple[int, int]) -> torch.Tensor:
    """Found by search: the seed whose first draw is nearest to the angle."""
    return augment._rotations(torch.tensor([math.radians(angle)]), size)


@pytest.mark.parametrize("size", [(24, 24), (20, 32)])
def test_rotation_equals_pil(size: tuple[int, int]) -> None:
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    smooth = (127 + 60 * np.sin(x / 5) + 60 * np.cos(y / 4)).astype(np.uint8)
    batch = torch.from_numpy(smooth)[None, None]
    draws = augment.Draws(
        torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), matrix_of(15, size)
    )
    ours = augment.apply(batch, draws, Augmentation(rotation=15))[0, 0].numpy()
    theirs = {
        sign: np.asarray(Image.fromarray(smooth).rotate(15 * sign, Image.Resampling.BILINEAR))
        for sign in (1, -1)
    }
    inner = (slice(6, -6), slice(6, -6))
    errors = {sign: float(np.abs(ours[inner] - other[inner]).max()) for sign, other in theirs.items()}
    assert min(errors.values()) < 2.0
    assert max(errors.values()) > 20.0  # the other direction is another image


def test_rotation_by_a_quarter_turn_moves_pixels_exactly() -> None:
    batch = images(1, 8, 8)
    draws = augment.Draws(
        torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), matrix_of(90, (8, 8))
    )
    turned = augment.apply(batch, draws, Augmentation(rotation=90)).round().to(torch.uint8)
    assert any(torch.equal(turned, torch.rot90(batch, k, (2, 3))) for k in (1, 3))


def test_angles_stay_within_the_limit() -> None:
    matrices = augment.draw(1000, (16, 16), Augmentation(rotation=15), 0, 0).matrices
    angles = torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert 14 < float(angles.max()) <= 15.001
    assert -15.001 <= float(angles.min()) < -14


@pytest.mark.parametrize("area", [(0.25, 0.25), (0.08, 1.0)])
def test_resized_crops_have_the_area_and_stay_inside(area: tuple[float, float]) -> None:
    matrices = augment.draw(2000, (40, 40), Augmentation(crop=Crop.RESIZED, area=area), 0, 0).matrices
    width, height = matrices[:, 0, 0], matrices[:, 1, 1]
    assert bool((width.abs() + matrices[:, 0, 2].abs() <= 1 + 1e-5).all())
    assert bool((height.abs() + matrices[:, 1, 2].abs() <= 1 + 1e-5).all())
    if area[0] == area[1]:
        torch.testing.assert_close(width * height, torch.full((2000,), 0.25), rtol=1e-4, atol=0)
    ratio = (width / height)[(width < 1) & (height < 1)]
    assert 3 / 4 - 1e-4 <= float(ratio.min()) < 0.8
    assert 1.25 < float(ratio.max()) <= 4 / 3 + 1e-4


def test_a_resized_crop_shows_the_part_it_says() -> None:
    ramp = torch.arange(40, dtype=torch.float32).expand(40, 40)[None, None].to(torch.uint8)
    chosen = Augmentation(crop=Crop.RESIZED, area=(0.25, 0.25))
    draws = augment.draw(1, (40, 40), chosen, seed=3, epoch=0)
    shown = augment.apply(ramp, draws, chosen)[0, 0, 20]
    width, shift = float(draws.matrices[0, 0, 0]), float(draws.matrices[0, 0, 2])
    first = ((-width * (39 / 40) + shift + 1) * 40 - 1) / 2
    last = ((width * (39 / 40) + shift + 1) * 40 - 1) / 2
    assert abs(float(shown[0]) - first) < 0.6
    assert abs(float(shown[-1]) - last) < 0.6


def test_rotation_and_resized_crop_compose() -> None:
    chosen = Augmentation(crop=Crop.RESIZED, rotation=30)
    both = augment.draw(5, (16, 16), chosen, 2, 0).matrices
    turn = augment.draw(5, (16, 16), Augmentation(rotation=30), 2, 0).matrices
    part = augment.draw(5, (16, 16), Augmentation(crop=Crop.RESIZED), 2, 0).matrices
    point = torch.tensor([0.3, -0.7])
    for index in range(5):
        turned = turn[index] @ torch.cat([point, torch.ones(1)])
        torch.testing.assert_close(
            both[index] @ torch.cat([point, torch.ones(1)]), part[index] @ torch.cat([turned, torch.ones(1)])
        )
