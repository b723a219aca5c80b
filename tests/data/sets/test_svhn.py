import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from cctool.base.errors import DataError
from cctool.data.registry import open_data
from cctool.data.sets import svhn
from cctool.data.sets.matlab_file import read_variables


def write_svhn(folder: Path, *, packed: bool = True, **more: np.ndarray) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    parts = {"X": random.integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)}
    parts["y"] = (np.arange(40) % 10 + 1).astype(np.uint8)[:, None]
    parts |= more
    for name in (svhn.TRAIN, svhn.TEST):
        savemat(folder / name, parts, do_compression=packed)
    return parts


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", [".", "svhn", "SVHN"])
def test_images_and_labels_are_the_files(tmp_path: Path, packed: bool, inner: str) -> None:
    written = write_svhn(tmp_path / inner, packed=packed)
    source = open_data(f"svhn:{tmp_path}")
    assert source.contents() == "10 classes; 36 training, 4 validation, 40 test images"
    assert source.classes == tuple("0123456789")
    test = source.split("test")
    assert test.labels.tolist() == [(index + 1) % 10 for index in range(40)]
    assert np.array_equal(test.images.numpy()[7].transpose(1, 2, 0), written["X"][..., 7])
    assert [len(source.split(name)) for name in ("train", "validation")] == [36, 4]
    assert not source.augmentation.flip


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did not find train_32x32\.mat"):
        open_data(f"svhn:{tmp_path}")
    write_svhn(tmp_path)
    (tmp_path / svhn.TEST).unlink()
    with pytest.raises(DataError, match=r"test_32x32\.mat cannot be read: No such file"):
        open_data(f"svhn:{tmp_path}")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"y": np.zeros((40, 1), np.uint8)}, r"label 0, allowed are 1\.\.10"),
        ({"y": np.full((40, 1), 11, np.uint8)}, r"label 11, allowed are 1\.\.10"),
        ({"y": np.ones((39, 1), np.uint8)}, "X is 32x32x3x40 and y 39x1"),
        ({"X": np.zeros((32, 32, 40), np.uint8)}, "X is 32x32x40"),
        ({"X": np.zeros((32, 32, 3, 40))}, "pixels are bytes"),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, more: dict[str, np.ndarray], says: str) -> None:
    write_svhn(tmp_path, **more)
    with pytest.raises(DataError, match=says):
        open_data(f"svhn:{tmp_path}").split("test")


@pytest.mark.parametrize("keep", [0, 50, 130, 5000])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    write_svhn(tmp_path)
    path = tmp_path / svhn.TEST
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"test_32x32\.mat (is damaged|has no variable y)") as caught:
        open_data(f"svhn:{tmp_path}").split("test")
    assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(2**26), 9)
    content = b"MATLAB 5.0".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    path = tmp_path / "bomb.mat"
    path.write_bytes(content + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(DataError, match="unpacks to more than 1,048,576 bytes"):
        read_variables(path, ("X",), 2**20)


def test_a_missing_variable_is_named(tmp_path: Path) -> None:
    savemat(tmp_path / "other.mat", {"Z": np.zeros(3)})
    with pytest.raises(DataError, match="has no variable X"):
        read_variables(tmp_path / "other.mat", ("X",), 2**20)
