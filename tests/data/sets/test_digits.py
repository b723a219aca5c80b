import hashlib

import numpy as np
import torch

from cctool.data.registry import open_data


def test_the_shipped_values_are_scikit_learns() -> None:
    from importlib import resources

    path = resources.files("cctool.data").joinpath("files/digits.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    # Of sklearn.datasets.load_digits() 1.9.1, as uint8; its class counts stand in the UCI description.
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert int(images.max()) == 16


def test_the_licence_lies_beside_the_file() -> None:
    from importlib import resources

    folder = resources.files("cctool.data").joinpath("files")
    text = folder.joinpath("digits.LICENSE.txt").read_text(encoding="utf-8")
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text
    assert len(folder.joinpath("digits.npz").read_bytes()) < 100_000


def test_splits_hold_every_image_once_and_every_class_evenly() -> None:
    source = open_data("digits")
    splits = [source.split(name) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [1200, 237, 360]
    images = torch.cat([split.images for split in splits])
    assert len({image.numpy().tobytes() for image in images}) > 1780  # a few are drawn alike
    counts = torch.stack([torch.bincount(split.labels, minlength=10) / len(split) for split in splits])
    assert float((counts - counts[0]).abs().max()) < 0.005


def test_images_are_the_digits_at_32x32() -> None:
    source = open_data("digits")
    split = source.split("test")
    assert split.images.shape == (360, 1, 32, 32)
    assert split.images.dtype == torch.uint8
    assert int(split.images.max()) == 255
    # Averaging each 4x4 block of the upscaled image gives the digit back up to smoothing: the ink stays.
    from importlib import resources

    path = resources.files("cctool.data").joinpath("files/digits.npz")
    with path.open("rb") as file, np.load(file) as archive:
        originals = {
            image.tobytes(): label for image, label in zip(archive["images"], archive["labels"], strict=True)
        }
    means = sorted(np.frombuffer(key, np.uint8).mean() * 255 / 16 for key in originals)
    served = (
        torch.cat([source.split(name).images for name in ("train", "validation", "test")])
        .float()
        .mean(dim=(1, 2, 3))
    )
    assert abs(float(served.mean()) - float(np.mean(means))) < 1.5


def test_recommended_preprocessing_is_the_training_images() -> None:
    source = open_data("digits")
    pixels = source.split("train").images.float() / 255
    assert abs(float(pixels.mean()) - source.mean[0]) < 1e-3
    assert abs(float(pixels.std()) - source.std[0]) < 1e-3


def test_splits_never_change() -> None:
    source = open_data("digits")
    # Recorded when the division was made: a change would let test images into older networks' training.
    assert (
        hashlib.sha256(source.split("test").labels.numpy().tobytes()).hexdigest()[:16] == "8464aae058c5b017"
    )
