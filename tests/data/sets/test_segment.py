from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cctool.base.errors import DataError
from cctool.data.classes import by_name
from cctool.data.records import Augmentation, Crop, DataSource, Padding
from cctool.data.registry import open_data
from cctool.data.serving.batches import batches

SIZE = (20, 16)


def write_pairs(folder: Path, count: int = 10, *, mode: str = "L", seed: int = 0) -> None:
    """Images whose red is ten times the class of each pixel, so that image and mask can be compared."""
    random = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        levels = random.integers(0, 3, (SIZE[1], SIZE[0]), dtype=np.uint8)
        Image.fromarray(np.stack([levels * 10, levels, levels], axis=2)).save(
            folder / "images" / f"{index:02d}.png"
        )
        mask = Image.fromarray(levels)
        if mode == "P":
            mask = mask.convert("P")
            mask.putdata(levels.reshape(-1).tolist())
            mask.putpalette([index, 0, 0] * 256)
        mask.save(folder / "masks" / f"{index:02d}.png")


def read(source: DataSource, split: str, augmentation: Augmentation | None = None, epoch: int = 0) -> tuple:
    found = list(
        batches(
            source.split(split),
            batch_size=100,
            mean=(0.0,),
            std=(1 / 255,),
            augmentation=augmentation,
            epoch=epoch,
        )
    )
    return found[0].images.round(), found[0].labels


@pytest.mark.parametrize("mode", ["L", "P"])
def test_indices_are_levels_or_palette_entries(tmp_path: Path, mode: str) -> None:
    write_pairs(tmp_path, mode=mode)
    source = open_data(f"segment:{tmp_path}")
    assert (source.task, source.classes, source.shape) == ("segmentation", ("0", "1", "2"), (3, 16, 20))
    assert source.contents() == "3 classes; 8 training, 1 validation, 1 test images"
    images, masks = read(source, "train")
    assert masks.dtype == torch.int64
    assert masks.shape == (8, 16, 20)
    assert torch.equal(images[:, 0], masks * 10.0)


def test_masks_move_with_their_images(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    source = open_data(f"segment:{tmp_path}")
    plain, _ = read(source, "train")
    moved = source.augmentation
    assert moved.flip
    assert moved.crop is Crop.PADDED
    for epoch in range(3):
        images, masks = read(source, "train", moved, epoch)
        assert not torch.equal(images, plain)
        inside = masks != 255
        assert torch.equal(images[:, 0][inside], masks[inside] * 10.0)
        assert not images[:, 0][~inside].any()
        assert 0 < inside.float().mean() < 1


def test_turned_and_mirrored_masks_stay_classes(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    source = open_data(f"segment:{tmp_path}")
    for moved in (
        Augmentation(rotation=30),
        Augmentation(crop=Crop.RESIZED, flip=True),
        Augmentation(crop=Crop.PADDED, padding=4, padding_mode=Padding.SYMMETRIC),
    ):
        _, masks = read(source, "train", moved)
        assert set(masks.unique().tolist()) <= {0, 1, 2, 255}
        assert (255 in masks.unique().tolist()) is (moved.rotation > 0)


def test_another_size_is_resized_to_the_nearest(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    images, masks = read(open_data(f"segment:{tmp_path}", input_shape=(1, 32, 40)), "train")
    _, small = read(open_data(f"segment:{tmp_path}"), "train")
    assert images.shape == (8, 1, 32, 40)
    assert torch.equal(masks, small.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_parts_and_names(tmp_path: Path) -> None:
    for seed, (part, count) in enumerate({"train": 5, "val": 3, "test": 2}.items()):
        write_pairs(tmp_path / part, count, seed=seed)
    (tmp_path / "classes.txt").write_text("sky\nsea\n\nsand\nrock\n")
    source = open_data(f"segment:{tmp_path}")
    assert source.contents() == "4 classes; 5 training, 3 validation, 2 test images"
    assert source.classes == ("sky", "sea", "sand", "rock")


def test_masks_are_renumbered_by_name_and_255_stays(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    path = tmp_path / "masks" / "00.png"
    levels = np.asarray(Image.open(path)).copy()
    levels[0] = 255
    Image.fromarray(levels).save(path)
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\n")
    source = open_data(f"segment:{tmp_path}")
    matched = by_name(source, ("rock", "sand", "sky", "sea"))
    table = torch.arange(256)
    table[:3] = torch.tensor([2, 3, 1])
    for split in source.loaders:
        _, own = read(source, split)
        _, renumbered = read(matched, split)
        assert torch.equal(renumbered, table[own])
    with pytest.raises(DataError, match="'sea', which the network does not know"):
        by_name(source, ("sky", "sand"))


def test_the_fingerprint_has_the_masks(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    before = open_data(f"segment:{tmp_path}").fingerprint()
    Image.fromarray(np.ones((16, 20), np.uint8)).save(tmp_path / "masks" / "03.png")
    assert open_data(f"segment:{tmp_path}").fingerprint() != before


def _damaged(folder: Path, name: str) -> None:
    masks, images = folder / "masks", folder / "images"
    one = masks / "03.png"
    levels = np.ones((16, 20), np.uint8)
    match name:
        case "no mask":
            one.unlink()
        case "no image":
            (images / "03.png").unlink()
        case "size":
            Image.fromarray(levels[:5]).save(one)
        case "colour":
            Image.fromarray(np.stack([levels] * 3, axis=2)).save(one)
        case "16 bit":
            Image.fromarray(levels.astype(np.uint16)).save(one)
        case "beyond":
            (folder / "classes.txt").write_text("sky\nsea\n")
        case "jpeg":
            one.unlink()
            Image.fromarray(levels).save(masks / "03.jpg")
        case "twins":
            Image.fromarray(levels).save(images / "03.jpg")
        case "truncated":
            one.write_bytes(one.read_bytes()[:60])
        case "no folder":
            masks.rename(folder / "labels")
        case "twice":
            (folder / "classes.txt").write_text("sky\nsky\nsea\n")
        case "empty":
            (folder / "classes.txt").write_text("\n")
        case "nothing":
            for path in masks.iterdir():
                Image.fromarray(levels * 255).save(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no mask", r"images/03\.png has no mask: .*masks/03\.png is missing"),
        ("no image", r"masks/03\.png has no image"),
        ("size", r"masks/03\.png is 20x5, and its image images/03\.png is 20x16"),
        ("colour", r"masks/03\.png is a picture of mode RGB; .*palette"),
        ("16 bit", r"masks/03\.png is a picture of mode I;16"),
        ("beyond", r"masks/\d\d\.png has the class index 2; with 2 classes it must lie in 0\.\.1"),
        ("jpeg", r"masks/03\.jpg is no mask: its format changes levels"),
        ("twins", r"images/03\.(png|jpg) and .*images/03\.(png|jpg) have one name"),
        ("truncated", r"masks/03\.png is damaged"),
        ("no folder", "has no folder masks"),
        ("twice", "names the class 'sky' twice"),
        ("empty", "names 0 classes"),
        ("nothing", "all pixels of its masks are 255"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path: Path, damage: str, says: str) -> None:
    write_pairs(tmp_path)
    _damaged(tmp_path, damage)

    def use() -> None:
        source = open_data(f"segment:{tmp_path}")
        for split in source.loaders:
            read(source, split)

    with pytest.raises(DataError, match=says) as caught:
        use()
    assert "\n" not in str(caught.value)
