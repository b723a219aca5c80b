"""Tiny data sets in the layouts of the real ones, written by hand for the tests."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_cifar10(
    folder: Path, per_file: int = 20, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The official binary layout; gives file name -> (labels [N], images [N, 3, 32, 32])."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        labels = np.arange(per_file, dtype=np.uint8) % 10
        images = random.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
        content = b"".join(
            bytes([label]) + image.tobytes() for label, image in zip(labels.tolist(), images, strict=True)
        )
        (folder / name).write_bytes(content)
        written[name] = (labels, images)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return written


def write_cifar100(folder: Path, count: int = 30) -> None:
    """The official binary layout: a coarse byte that must be skipped, then the fine label."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "test.bin"):
        records = b"".join(bytes([19, index % 100]) + bytes([index]) * 3072 for index in range(count))
        (folder / name).write_bytes(records)


def idx(array: np.ndarray) -> bytes:
    """An idx file's content: magic, sizes, values."""
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, count: int = 40) -> dict[str, np.ndarray]:
    """The four idx files; gives name -> array."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part in ("train", "t10k"):
        written[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        written[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in written.items():
        (folder / name).write_bytes(idx(array))
    return written


def write_image(path: Path, size: tuple[int, int] = (20, 16), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """A random image of (width, height); gives its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(path)
    return pixels


def write_class_folders(
    folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10, **image: object
) -> None:
    """``folder/CLASS/NN.png``."""
    for number, name in enumerate(classes):
        for index in range(count):
            write_image(folder / name / f"{index:02d}.png", seed=100 * number + index, **image)  # type: ignore[arg-type]


def write_cub(folder: Path, classes: int = 3, count: int = 12) -> None:
    """CUB_200_2011's lists and images; every third image is a test image."""
    lines: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    names = [f"{number + 1:03d}.Bird_{number}" for number in range(classes)]
    for number in range(classes):
        for index in range(count):
            key = number * count + index + 1
            lines["images"].append(f"{key} {names[number]}/{index}.png")
            lines["image_class_labels"].append(f"{key} {number + 1}")
            lines["train_test_split"].append(f"{key} {int(index % 3 != 0)}")
            write_image(folder / "images" / names[number] / f"{index}.png", seed=key)
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    (folder / "classes.txt").write_text("\n".join(f"{n + 1} {name}" for n, name in enumerate(names)) + "\n")
