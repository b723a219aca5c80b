import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from cctool.base.errors import DataError
from cctool.data.registry import DATASETS, listing, open_data
from layouts import idx, write_cifar10, write_cifar100, write_mnist


@pytest.mark.parametrize("inner", ["cifar-10-batches-bin", "."])
def test_cifar10_images_and_labels_are_the_files(tmp_path: Path, inner: str) -> None:
    written = write_cifar10(tmp_path / inner)
    source = open_data(f"cifar10:{tmp_path}")
    labels, images = written["test_batch.bin"]
    test = source.split("test")
    assert np.array_equal(test.images.numpy(), images)
    assert test.labels.tolist() == labels.tolist()
    assert source.classes == tuple("abcdefghij")


def test_cifar10_validation_is_held_out_of_training(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path)
    source = open_data(f"cifar10:{tmp_path}")
    train, validation = source.split("train"), source.split("validation")
    assert (len(train), len(validation)) == (90, 10)
    every = {
        image.tobytes()
        for name, (_, images) in written.items()
        if name != "test_batch.bin"
        for image in images
    }
    found = [image.numpy().tobytes() for split in (train, validation) for image in split.images]
    assert len(found) == len(set(found)) == 100
    assert set(found) == every


def test_the_default_folder_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    monkeypatch.setenv("CCTOOL_DATA", str(tmp_path))
    assert len(open_data("cifar10").split("test")) == 20


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "cifar-100-binary")
    test = open_data(f"cifar100:{tmp_path}").split("test")
    assert test.labels.tolist() == list(range(30))
    assert test.images[7].unique().tolist() == [7]


@pytest.mark.parametrize("keep", [0, 1, 3072, 3073 * 3 + 100])
def test_truncated_cifar_is_refused(tmp_path: Path, keep: int) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"data_batch_3\.bin is damaged.*3073"):
        open_data(f"cifar10:{tmp_path}").split("train")


def test_a_label_outside_the_classes_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"label 10, allowed are 0\.\.9"):
        open_data(f"cifar10:{tmp_path}").split("test")


def test_a_missing_file_of_cifar_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4\.bin cannot be read"):
        open_data(f"cifar10:{tmp_path}").split("validation")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_missing_data_says_where_to_put_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CCTOOL_DOWNLOAD", raising=False)
    with pytest.raises(DataError) as caught:
        open_data(f"{name}:{tmp_path / 'nowhere'}")
    for part in (str(tmp_path / "nowhere"), f"{name}:DIR", "CCTOOL_DOWNLOAD=1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [
        ("cifar10", "CIFAR10", {}),
        ("cifar100", "CIFAR100", {}),
        ("mnist", "MNIST", {}),
        ("fashion-mnist", "FashionMNIST", {}),
    ],
)
def test_download_is_torchvisions_and_only_when_asked(
    name: str, kind: str, extra: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def refuse(root: str, **named: object) -> None:
        raise RuntimeError(f"{kind} asked for {root} with download={named['download']}")

    monkeypatch.setattr(datasets, kind, refuse)
    monkeypatch.setenv("CCTOOL_DOWNLOAD", "0")
    with pytest.raises(DataError, match="did not find"):
        open_data(f"{name}:{tmp_path}").split("test")
    monkeypatch.setenv("CCTOOL_DOWNLOAD", "1")
    with pytest.raises(DataError, match=f"{kind} asked for .* with download=True"):
        open_data(f"{name}:{tmp_path}").split("test")


def test_torchvisions_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(5 * 3072, dtype=np.int64).astype(np.uint8).reshape(5, 3072)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3, 4]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(DataError, match="torchvision could not read"):  # the MD5 is not the official one
        open_data(f"cifar10:{tmp_path}").split("test")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *arguments: True)
    test = open_data(f"cifar10:{tmp_path}").split("test")
    assert np.array_equal(test.images.numpy().reshape(5, 3072), pixels)
    assert test.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "inner"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "raw"), ("mnist", ".")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_from_each_place(tmp_path: Path, name: str, inner: str, packed: bool) -> None:
    written = write_mnist(tmp_path / inner)
    if packed:
        for file in written:
            path = tmp_path / inner / file
            (tmp_path / inner / f"{file}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    source = open_data(f"{name}:{tmp_path}")
    test = source.split("test")
    assert np.array_equal(test.images.numpy()[:, 0], written["t10k-images-idx3-ubyte"])
    assert test.labels.tolist() == written["t10k-labels-idx1-ubyte"].tolist()
    assert (len(source.split("train")), len(source.split("validation"))) == (36, 4)


def test_mnist_and_fashion_mnist_do_not_meet(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", 40)
    write_mnist(tmp_path / "FashionMNIST" / "raw", 50)
    assert len(open_data(f"mnist:{tmp_path}").split("test")) == 40
    assert len(open_data(f"fashion-mnist:{tmp_path}").split("test")) == 50


def _damage(name: str, content: bytes) -> bytes:
    return {
        "short": content[:-1],
        "long": content + b"x",
        "empty": b"",
        "header": content[:7],
        "magic": b"\x00\x00\x08\x02" + content[4:],
        "other": idx(np.full(39, 3, np.uint8)),
        "label": content[:-1] + b"\x0b",
    }[name]


@pytest.mark.parametrize("damage", ["short", "long", "empty", "header", "magic", "other", "label"])
def test_damaged_mnist_is_refused(tmp_path: Path, damage: str) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(_damage(damage, path.read_bytes()))
    with pytest.raises(DataError, match="is damaged"):
        open_data(f"mnist:{tmp_path}")


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_damaged_gzip_is_refused(tmp_path: Path, keep: int) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(path.read_bytes())[:keep])
    path.unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz"):
        open_data(f"mnist:{tmp_path}")


def test_unknown_data_sets() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'cifar11'.*did you mean cifar10"):
        open_data("cifar11")
    with pytest.raises(DataError, match="inside the package"):
        open_data("digits:/somewhere")
    with pytest.raises(DataError, match="has no holdout split"):
        open_data("digits").split("holdout")


def test_a_bare_folder_is_asked_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"folder:{tmp_path}"):
        open_data(str(tmp_path))


def test_the_page_names_every_data_set() -> None:
    page = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
    told = [line.split("`")[1] for line in page.split("## Splits")[0].splitlines() if line.startswith("| `")]
    assert told == [record.form for record in listing()]


def test_listing_covers_the_table() -> None:
    assert [record.name for record in listing()] == [*DATASETS, "my.py:factory"]


def test_limit_spreads_over_the_split(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    whole, some = (
        open_data(f"mnist:{tmp_path}").split("test"),
        open_data(f"mnist:{tmp_path}", limit=4).split("test"),
    )
    assert torch.equal(some.images, whole.images[[0, 10, 20, 30]])
    assert torch.equal(some.labels, whole.labels[[0, 10, 20, 30]])
    with pytest.raises(DataError, match="limit=0"):
        open_data("digits", limit=0)


def test_fingerprints_tell_data_sets_apart(tmp_path: Path) -> None:
    written = write_cifar10(tmp_path / "a")
    write_cifar10(tmp_path / "b")
    first = open_data(f"cifar10:{tmp_path / 'a'}")
    same = open_data(f"cifar10:{tmp_path / 'b'}", input_shape=(1, 8, 8), limit=3)
    assert first.fingerprint() == same.fingerprint() != open_data("digits").fingerprint()
    content = bytearray((tmp_path / "b" / "test_batch.bin").read_bytes())
    content[1] ^= 1
    (tmp_path / "b" / "test_batch.bin").write_bytes(bytes(content))
    assert written
    assert open_data(f"cifar10:{tmp_path / 'b'}").fingerprint() != first.fingerprint()
