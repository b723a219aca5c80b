from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from cctool.base.errors import DataError
from cctool.data.registry import open_data
from cctool.data.sets.imagenet import FOLDERS, KITS
from layouts import write_image

# Two that torchvision names, two of one first word, and one without words; ids are not in their order.
WORDS = {
    "n01440764": (3, "tench, Tinca tinca"),
    "n02012849": (1, "crane"),
    "n90000001": (2, "jar, pot"),
    "n90000002": (5, "jar"),
    "n90000003": (4, ""),
}
NAMES = ("tench", "crane bird", "jar (n90000001)", "jar (n90000002)", "n90000003")
TRUTH = [3, 1, 2, 5, 4, 1]


def write_kit(folder: Path, words: dict[str, tuple[int, str]] = WORDS, truth: list[int] = TRUTH) -> None:
    folder.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, text, "a thing", 0) for wnid, (number, text) in words.items()]
    # A group of classes, whose id is no label.
    rows.append((1001, "n00000001", "entity", "all", 5))
    table = np.empty((len(rows), 1), dtype=kinds)
    for place, row in enumerate(rows):
        table[place, 0] = row
    savemat(folder / "meta.mat", {"synsets": table}, do_compression=True)
    lines = "".join(f"{number}\n" for number in truth)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def write_flat(folder: Path, count: int = len(TRUTH)) -> None:
    for index in range(1, count + 1):
        write_image(folder / f"ILSVRC2012_val_{index:08d}.JPEG", seed=index)


def write_train(folder: Path, wnids: tuple[str, ...] = tuple(WORDS), count: int = 3) -> None:
    for wnid in wnids:
        for index in range(count):
            write_image(folder / wnid / f"{wnid}_{index}.JPEG", seed=index)


@pytest.mark.parametrize("root", ["", "ILSVRC/Data/CLS-LOC"])
@pytest.mark.parametrize("place", [FOLDERS["validation"][0], FOLDERS["validation"][1], ""])
def test_flat_validation_images_get_the_kits_labels(tmp_path: Path, root: str, place: str) -> None:
    if root and not place:
        pytest.skip("a bare folder of images is a root of its own")
    write_flat(tmp_path / root / place)
    write_kit(tmp_path / KITS[0])
    source = open_data(f"imagenet:{tmp_path}")
    assert source.classes == NAMES
    assert source.contents() == "5 classes; 6 validation, 6 test images"
    test = source.split("test")
    # By id: 3 is the first WordNet id, 1 the second, ...
    assert test.labels.tolist() == [0, 1, 2, 3, 4, 1]
    assert [Path(file).stem[-1] for file in test.files] == list("123456")
    assert (source.shape, source.task) == ((3, 224, 224), "classification")


def test_training_and_validation_folders(tmp_path: Path) -> None:
    write_train(tmp_path / "train", count=10)
    write_train(tmp_path / "val", ("n02012849", "n90000002"))
    source = open_data(f"imagenet:{tmp_path}")
    assert source.contents() == "5 classes; 50 training, 6 validation, 6 test images"
    # Without the kit there are no words.
    assert source.classes == ("tench", "crane bird", "n90000001", "n90000002", "n90000003")
    assert source.split("test").labels.tolist() == [1] * 3 + [3] * 3


def test_all_classes_of_the_kit_count_though_few_have_folders(tmp_path: Path) -> None:
    write_train(tmp_path / "val", ("n90000003", "n02012849"))
    write_kit(tmp_path / "devkit" / "data")
    source = open_data(f"imagenet:{tmp_path}")
    assert source.classes == NAMES
    assert sorted(set(source.split("test").labels.tolist())) == [1, 4]


def test_kaggles_table_labels_them_too(tmp_path: Path) -> None:
    write_flat(tmp_path / "ILSVRC/Data/CLS-LOC/val", 2)
    rows = ["ImageId,PredictionString", "ILSVRC2012_val_00000002,n01440764 1 2 3 4 n01440764 5 6 7 8"]
    rows.append("ILSVRC2012_val_00000001,n02012849 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows))
    source = open_data(f"imagenet:{tmp_path}")
    assert source.split("test").labels.tolist() == [1, 0]


def test_an_empty_class_folder_is_a_warning(tmp_path: Path) -> None:
    write_train(tmp_path / "train", ("n01440764",), 12)
    (tmp_path / "train" / "n02012849").mkdir()
    source = open_data(f"imagenet:{tmp_path}")
    assert source.warnings == (f"imagenet:{tmp_path}: the class folder train/n02012849 has no images",)


def test_torchvisions_names_are_the_known_ones() -> None:
    from torchvision.models import ResNet18_Weights

    from cctool.data.sets.imagenet import _known_names

    known = _known_names()
    assert list(known) == sorted(known)
    assert list(known.values()) == ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


def _damaged(folder: Path, name: str) -> None:
    kit = folder / KITS[0]
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    match name:
        case "no kit":
            (kit / "meta.mat").unlink()
        case "no truth":
            truth.unlink()
        case "bad line":
            truth.write_text("3\n9\n")
        case "few lines":
            truth.write_text("3\n1\n")
        case "odd name":
            write_image(folder / "val" / "cat.JPEG")
        case "odd folder":
            write_image(folder / "train" / "cats" / "1.JPEG")
        case "unknown":
            write_train(folder / "train", ("n99999999",))
        case "no struct":
            savemat(kit / "meta.mat", {"synsets": np.zeros((3, 1))})
        case "short":
            (kit / "meta.mat").write_bytes((kit / "meta.mat").read_bytes()[:300])
        case "nothing":
            for path in (folder / "val").iterdir():
                path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no kit", "labels are in the development kit: put ILSVRC2012_devkit_t12/data"),
        ("no truth", r"ground_truth\.txt cannot be read"),
        ("bad line", "line 2: '9' is no class"),
        ("few lines", "there is no label for validation image 3"),
        ("odd name", r"cat\.JPEG is neither in a folder of its class"),
        ("odd folder", "cats: the class folders of ImageNet are named by WordNet ids"),
        ("unknown", "does not know the class n99999999"),
        ("no struct", r"meta\.mat is damaged"),
        ("short", r"meta\.mat is damaged"),
        ("nothing", "val holds no images"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path: Path, damage: str, says: str) -> None:
    write_flat(tmp_path / "val")
    write_kit(tmp_path / KITS[0])
    _damaged(tmp_path, damage)
    with pytest.raises(DataError, match=says) as caught:
        open_data(f"imagenet:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did not find train/<wnid>"):
        open_data(f"imagenet:{tmp_path}")
    with pytest.raises(DataError, match="imagenet needs the folder"):
        open_data("imagenet")
