from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cctool.base.errors import DataError
from cctool.data.records import Augmentation, Crop, DataSource, Padding, Split
from cctool.data.registry import open_data
from cctool.data.serving.batches import batches
from cctool.data.sets import file_source
from layouts import write_class_folders, write_cub, write_image

NONE = (0.0,)
ONE = (1 / 255,)  # with mean 0, batches give the pixels themselves


def pixels(split: Split, augmentation: Augmentation | None = None, **named: int) -> torch.Tensor:
    found = batches(split, batch_size=4, mean=NONE, std=ONE, augmentation=augmentation, **named)
    return torch.cat([batch.images for batch in found]).round()


def names(source: DataSource) -> dict[str, set[str]]:
    return {name: set(source.split(name).files or ()) for name in ("train", "validation", "test")}


def test_small_class_folders_are_held_as_they_are(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    source = open_data(f"folder:{tmp_path}")
    assert source.classes == ("cat", "dog")
    assert source.shape == (3, 16, 20)
    split = source.split("train")
    for image, file, label in zip(split.images, split.files, split.labels.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / file)))
        assert file.startswith(source.classes[label])


def test_an_undivided_folder_is_divided_for_ever(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=20)
    first = names(open_data(f"folder:{tmp_path}"))
    assert [len(first[name]) for name in ("train", "validation", "test")] == [32, 4, 4]
    assert len(set.union(*first.values())) == 40
    for name in ("validation", "test"):
        assert sum(file.startswith("cat") for file in first[name]) == 2
    # One file more moves no file from a part to another, but for the rounding of the counts.
    write_image(tmp_path / "cat" / "new.png")
    second = names(open_data(f"folder:{tmp_path}"))
    assert len(first["train"] & second["train"]) >= 31


@pytest.mark.parametrize(
    "roles", [("train", "val", "test"), ("training", "validation", "testing"), ("Train", "Valid", "Test")]
)
def test_named_parts_are_understood(tmp_path: Path, roles: tuple[str, str, str]) -> None:
    for count, role in zip((6, 3, 2), roles, strict=True):
        write_class_folders(tmp_path / role, count=count)
    source = open_data(f"folder:{tmp_path}")
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [12, 6, 4]
    assert source.notes == ()


def test_missing_parts_are_made_and_said(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", count=20)
    write_class_folders(tmp_path / "test", count=2)
    source = open_data(f"folder:{tmp_path}")
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [36, 4, 4]
    assert "held out" in source.notes[0]
    (tmp_path / "test").rename(tmp_path / "val")
    imagenet = open_data(f"folder:{tmp_path}")
    assert imagenet.split("test").files == imagenet.split("validation").files
    assert "--test-data" in imagenet.notes[0]


def test_two_names_of_one_part_are_refused(tmp_path: Path) -> None:
    for role in ("val", "validation"):
        write_class_folders(tmp_path / role, count=1)
    with pytest.raises(DataError, match="has both val and validation"):
        open_data(f"folder:{tmp_path}")


def test_a_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "test", classes=("cat", "emu"))
    with pytest.raises(DataError, match="test images have classes that training lacks: emu"):
        open_data(f"folder:{tmp_path}")


def test_a_class_missing_from_test_keeps_the_numbers(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "test", classes=("dog",))
    assert set(open_data(f"folder:{tmp_path}").split("test").labels.tolist()) == {1}


def test_unlabelled_images(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / f"{index}.png", seed=index)
    source = open_data(f"folder:{tmp_path}")
    assert source.classes == ()
    split = source.split("test")
    assert split.labels is None
    assert split.files == ("0.png", "1.png", "2.png")
    assert all(batch.labels is None for batch in batches(split, batch_size=2, mean=NONE, std=ONE))
    with pytest.raises(DataError, match="has no train split"):
        source.split("train")


@pytest.mark.parametrize("what", ["nothing", "absent", "unnamed"])
def test_a_folder_without_images(tmp_path: Path, what: str) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    reference = {"nothing": f"folder:{tmp_path}", "absent": f"folder:{tmp_path / 'x'}", "unnamed": "folder"}[
        what
    ]
    said = {"nothing": "there are no images in it", "absent": "there is no folder", "unnamed": "folder:DIR"}[
        what
    ]
    with pytest.raises(DataError, match=said):
        open_data(reference)


def test_gray_folders_are_gray(tmp_path: Path) -> None:
    write_class_folders(tmp_path, mode="L")
    assert open_data(f"folder:{tmp_path}").shape == (1, 16, 20)
    as_rgb = open_data(f"folder:{tmp_path}", input_shape=(3, 16, 20)).split("test")
    assert torch.equal(as_rgb.images[:, 0], as_rgb.images[:, 2])


def test_large_images_are_streamed_at_224(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=4, size=(300, 260))
    source = open_data(f"folder:{tmp_path}")
    split = source.split("validation")
    assert source.shape == (3, 224, 224)
    assert split.images is None
    assert source.augmentation.crop is Crop.RESIZED
    # ImageNet's evaluation, by hand: shorter side to 256, centre 224.
    image = Image.open(tmp_path / split.files[0])
    resized = image.resize((round(300 * 256 / 260), 256), Image.Resampling.BILINEAR)
    left, top = (resized.width - 224) // 2, 16
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    assert np.array_equal(pixels(split)[0].permute(1, 2, 0).numpy(), expected)


def test_what_would_not_fit_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path)
    held = open_data(f"folder:{tmp_path}").split("train")
    monkeypatch.setattr(file_source, "HELD_BYTES", 1000)
    streamed = open_data(f"folder:{tmp_path}").split("train")
    assert streamed.images is None
    assert torch.equal(pixels(streamed), held.images.float())


@pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path: Path, damage: str, workers: int) -> None:
    write_class_folders(tmp_path, count=4, size=(120, 120))
    source = open_data(f"folder:{tmp_path}")
    split = source.split("train")
    path = tmp_path / split.files[1]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:3000] if damage == "truncated" else b"hello")
    with pytest.raises(DataError, match=str(path)) as caught:
        pixels(split, workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_damaged_image_of_a_held_folder_is_named(tmp_path: Path, name: str) -> None:
    write_class_folders(tmp_path)
    source = open_data(f"folder:{tmp_path}")
    path = tmp_path / source.loaders[name]().files[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"{path} is damaged"):
        source.split(name)


def test_sixteen_bit_and_palette_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "a" / "deep.png")
    for index in range(2):
        image = Image.fromarray(np.full((8, 8, 3), 40, np.uint8)).quantize(4)
        image.save(tmp_path / "a" / f"palette{index}.png", transparency=b"\x80\x00")
    source = open_data(f"folder:{tmp_path}", input_shape=(3, 8, 8))
    found = {
        file: image
        for name in ("train", "validation", "test")
        for file, image in zip(source.split(name).files, source.split(name).images, strict=True)
    }
    assert set(found["a/deep.png"].unique().tolist()) == {0x80}
    assert set(found["a/palette0.png"].unique().tolist()) == {40}


def test_labelled_files(tmp_path: Path) -> None:
    for role, count in (("training", 6), ("validation", 3)):
        for label in (0, 2, 10):
            for index in range(count):
                write_image(tmp_path / role / f"{label}_{index}.png", seed=label * 10 + index)
    for index in range(2):
        write_image(tmp_path / "testing" / f"{index:04d}.png")
    source = open_data(f"labelled:{tmp_path}")
    # Numbers keep their meaning although not all of them occur.
    assert source.classes == tuple(str(label) for label in range(11))
    assert sorted(set(source.split("train").labels.tolist())) == [0, 2, 10]
    assert source.split("test").labels is None
    assert source.shape == (3, 20, 20)
    for file, label in zip(
        source.split("validation").files, source.split("validation").labels.tolist(), strict=True
    ):
        assert Path(file).name.startswith(f"{label}_")


def test_labelled_words_and_flat_folders(tmp_path: Path) -> None:
    for name in ("ice_cream", "bread"):
        for index in range(10):
            write_image(tmp_path / f"{name}_{index}.png", seed=index)
    source = open_data(f"labelled:{tmp_path}")
    assert source.classes == ("bread", "ice_cream")
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [16, 2, 2]


def test_a_file_without_a_label_among_others_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "0_1.png")
    write_image(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png has no label"):
        open_data(f"labelled:{tmp_path}")


def test_labelled_evaluation_is_the_centre(tmp_path: Path) -> None:
    for index in range(10):
        write_image(tmp_path / f"0_{index}.png", size=(300, 270), seed=index)
    source = open_data(f"labelled:{tmp_path}")
    assert source.shape == (3, 256, 256)
    split = source.split("test")
    whole = np.asarray(Image.open(tmp_path / split.files[0]))
    assert np.array_equal(pixels(split)[0].permute(1, 2, 0).numpy(), whole[7:263, 22:278])


def test_labelled_training_crops_are_windows_of_the_image(tmp_path: Path) -> None:
    for index in range(10):
        write_image(tmp_path / f"0_{index}.png", size=(270, 264), seed=index)
    split = open_data(f"labelled:{tmp_path}").split("train")
    crop = Augmentation(crop=Crop.PADDED, padding_mode=Padding.SYMMETRIC)
    found = pixels(split, crop)
    places = set()
    for image, file in zip(found[:5], split.files, strict=False):
        whole = torch.from_numpy(np.asarray(Image.open(tmp_path / file)).copy()).permute(2, 0, 1).float()
        shifts = [(y, x) for y in range(9) for x in range(15)]
        found_at = [(y, x) for y, x in shifts if torch.equal(whole[:, y : y + 256, x : x + 256], image)]
        assert len(found_at) == 1
        places.add(found_at[0])
    assert len(places) > 2


def test_images_smaller_than_the_crop_are_mirrored(tmp_path: Path) -> None:
    for index in range(10):
        write_image(tmp_path / f"0_{index}.png", size=(20, 14), seed=index)
    split = open_data(f"labelled:{tmp_path}").split("test")
    whole = np.asarray(Image.open(tmp_path / split.files[0]))
    expected = np.pad(whole, ((3, 3), (0, 0), (0, 0)), mode="symmetric")
    assert np.array_equal(pixels(split)[0].permute(1, 2, 0).numpy(), expected)


def test_streamed_flip_and_rotation(tmp_path: Path) -> None:
    for index in range(20):
        write_image(tmp_path / f"0_{index}.png", size=(24, 24), seed=index)
    split = open_data(f"labelled:{tmp_path}").split("train")
    plain, flipped = pixels(split), pixels(split, Augmentation(flip=True))
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(one or other for one, other in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)
    rotated = pixels(split, Augmentation(rotation=15.0))
    assert float((rotated - plain).abs().mean()) > 5
    assert float(rotated[:, :, 11:13, 11:13].mean() - plain[:, :, 11:13, 11:13].mean()) < 40


def test_streaming_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    for index in range(20):
        write_image(tmp_path / f"0_{index}.png", size=(40, 30), seed=index)
    source = open_data(f"labelled:{tmp_path}")
    split = source.split("train")
    everything = Augmentation(crop=Crop.RESIZED, flip=True, rotation=10)
    here = pixels(split, everything, shuffle=True, seed=3, epoch=2)
    state = torch.get_rng_state()
    there = pixels(split, everything, shuffle=True, seed=3, epoch=2, workers=2)
    assert torch.equal(here, there)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(here, pixels(split, everything, shuffle=True, seed=3, epoch=3))


def test_cub_follows_its_own_lists(tmp_path: Path) -> None:
    write_cub(tmp_path / "CUB_200_2011")
    source = open_data(f"cub200:{tmp_path}", input_shape=(3, 32, 32))
    assert source.classes == ("001.Bird_0", "002.Bird_1", "003.Bird_2")
    parts = names(source)
    assert {Path(file).name for file in parts["test"]} == {f"{index}.png" for index in (0, 3, 6, 9)}
    assert len(parts["test"]) == 12
    assert len(parts["train"] | parts["validation"]) == 24
    assert not parts["train"] & parts["validation"]
    for file, label in zip(source.split("train").files, source.split("train").labels.tolist(), strict=True):
        assert source.classes[label] in file
    assert pixels(source.split("validation")).shape == (3, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("images.txt", None, "did not find images.txt"),
        ("classes.txt", None, "classes.txt cannot be read"),
        ("classes.txt", "", "is empty"),
        ("image_class_labels.txt", "1 1\n", "lists other images"),
        ("train_test_split.txt", "rubbish\n", "line 1: 'rubbish'"),
    ],
)
def test_damaged_cub_lists(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    write_cub(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        open_data(f"cub200:{tmp_path}")


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt"])
def test_cub_values_out_of_range(tmp_path: Path, name: str) -> None:
    write_cub(tmp_path)
    lines = (tmp_path / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join(["1 9", *lines[1:]]))
    with pytest.raises(DataError, match=f"{name}: image 1 has '9'"):
        open_data(f"cub200:{tmp_path}")
    assert len(lines) == 36


def test_validation_and_test_data_from_elsewhere(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "main", count=20)
    write_class_folders(tmp_path / "other", classes=("dog",), count=5)
    write_class_folders(tmp_path / "strange", classes=("emu",), count=5)
    main, other = f"folder:{tmp_path / 'main'}", f"folder:{tmp_path / 'other'}"
    source = open_data(main, val_data=other, test_data=other)
    # Nobody divided the other folder, so all of it serves, its one class numbered as in the main one.
    for name in ("validation", "test"):
        assert source.split(name).labels.tolist() == [1] * 5
        assert source.split(name).name == name
    assert len(source.split("train")) == 32
    assert source.fingerprint() != open_data(main).fingerprint()
    with pytest.raises(DataError, match=r"strange has the class 'emu', which the training data"):
        open_data(main, test_data=f"folder:{tmp_path / 'strange'}")


def test_a_divided_source_gives_its_own_part(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "main", count=20)
    for role, count in (("train", 4), ("val", 3), ("test", 2)):
        write_class_folders(tmp_path / "other" / role, count=count)
    source = open_data(f"folder:{tmp_path / 'main'}", val_data=f"folder:{tmp_path / 'other'}")
    assert len(source.split("validation")) == 6
    assert len(source.split("test")) == 4


def test_fingerprint_of_files_sees_content_and_names_only(tmp_path: Path) -> None:
    write_class_folders(tmp_path, count=4)
    first = open_data(f"folder:{tmp_path}").fingerprint()
    assert open_data(f"folder:{tmp_path}", input_shape=(1, 40, 40)).fingerprint() == first
    write_image(tmp_path / "cat" / "00.png", seed=77)
    assert open_data(f"folder:{tmp_path}").fingerprint() != first


def test_pictures_without_labels_are_all_training_images(tmp_path: Path) -> None:
    for index, place in enumerate(("a.png", "x/b.jpg", "x/y/c.bmp", "train/d.webp", "test/e.tif")):
        write_image(tmp_path / place, seed=index)
    (tmp_path / "x" / "notes.txt").write_text("no image")
    source = open_data(f"images:{tmp_path}")
    assert source.contents() == "5 training images"
    assert (source.task, source.classes, source.labelled) == (None, (), False)
    split = source.split("train")
    assert split.files == ("a.png", "test/e.tif", "train/d.webp", "x/b.jpg", "x/y/c.bmp")
    found = list(batches(split, batch_size=5, mean=NONE, std=ONE))
    assert found[0].images.shape == (5, 3, 16, 20)
    assert found[0].labels is None
    assert open_data(f"images:{tmp_path}", limit=2).contents() == "2 training images"
    assert open_data(f"images:{tmp_path}", input_shape=(1, 8, 8)).split("train").shape == (1, 8, 8)
    with pytest.raises(DataError, match="has no test split and no labels"):
        source.split("test")


def test_pictures_can_be_another_sets_validation_images(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "labelled")
    write_class_folders(tmp_path / "pictures", count=3)
    source = open_data(f"folder:{tmp_path / 'labelled'}", val_data=f"images:{tmp_path / 'pictures'}")
    assert source.contents() == "2 classes; 16 training, 6 validation, 2 test images"
    assert source.split("validation").labels is None


def test_no_pictures_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no images in it"):
        open_data(f"images:{tmp_path}")


def test_an_empty_class_folder_is_a_warning_with_its_name(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val", ("cat",))
    (tmp_path / "train" / "cow").mkdir()
    (tmp_path / "val" / "dog" / "old").mkdir(parents=True)
    source = open_data(f"folder:{tmp_path}")
    assert source.classes == ("cat", "dog")
    assert source.warnings == tuple(
        f"folder:{tmp_path}: the class folder {name} has no images" for name in ("train/cow", "val/dog")
    )
