from pathlib import Path

import numpy as np
import pytest
import torch

from cctool.base.errors import DataError, UserCodeError
from cctool.base.user_code import split_arguments, with_arguments
from cctool.data.classes import by_name
from cctool.data.records import Augmentation
from cctool.data.registry import open_data
from cctool.data.registry import with_arguments as own_arguments
from cctool.data.serving.batches import batches

CODE = """
import random
import numpy as np
import torch
from PIL import Image

class Noisy:
    def __init__(self, count, kind="pil"):
        self.count, self.kind = count, kind
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        level = index + random.randrange(20) + np.random.randint(20) + int(torch.randint(20, ()))
        pixels = np.full((6, 5, 3), level, np.uint8)
        image = {
            "pil": lambda: Image.fromarray(pixels),
            "array": lambda: pixels,
            "tensor": lambda: torch.from_numpy(pixels).permute(2, 0, 1),
            "float": lambda: torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        }[self.kind]()
        return image, index % 3

class Plain:
    def __init__(self, item): self.item = item
    def __len__(self): return 4
    def __getitem__(self, index):
        if index == 2 and isinstance(self.item, Exception):
            raise self.item
        return self.item if not isinstance(self.item, Exception) else (np.zeros((4, 4), np.uint8), 0)

IMAGES = np.arange(12 * 4 * 4 * 3, dtype=np.int64).astype(np.uint8).reshape(12, 4, 4, 3)
LABELS = np.arange(12) % 3

def arrays():
    parts = {"validation": (IMAGES[:3], LABELS[:3]), "test": (IMAGES[:2], LABELS[:2])}
    return {"train": (IMAGES, LABELS), **parts, "classes": ["a", "b", "c"]}
def named():
    class Result:
        train = validation = test = (IMAGES, LABELS)
        classes, mean, std = 3, (0.1, 0.2, 0.3), (1, 1, 1)
    return Result()
def train_only(): return {"train": (IMAGES, LABELS), "classes": 3}
def pil(): return {"train": Noisy(30), "classes": 3}
def array(): return {"train": Noisy(30, "array"), "classes": 3}
def tensor(): return {"train": Noisy(30, "tensor"), "classes": 3}
def floating(): return {"train": Noisy(30, "float"), "classes": 3}
def gray(): return {"test": (IMAGES[..., 0], LABELS), "classes": 3}

class Pairs:
    def __init__(self, targets): self.targets = targets
    def __len__(self): return len(self.targets)
    def __getitem__(self, index): return IMAGES[index], self.targets[index]

MASKS = np.arange(12 * 16).reshape(12, 4, 4) % 3
TARGETS = {
    "float": np.linspace(0, 1, 12),
    "vector": torch.linspace(0, 1, 36).reshape(12, 3),
    "image": IMAGES.astype(np.float64).transpose(0, 3, 1, 2) / 255,
    "mask": np.where(MASKS == 2, 255, MASKS).astype(np.uint8),
    "codes": torch.arange(36).reshape(12, 3),
    "truth": torch.arange(36).reshape(12, 3) % 2 == 0,
}
def targets(kind, streamed=False, **more):
    found = TARGETS[kind]
    return {"train": Pairs(list(found)) if streamed else (IMAGES, found), **more}
def pictures(mode):
    found = [Image.fromarray(image[..., 0] % 3 if mode == "L" else image) for image in IMAGES]
    return {"train": Pairs(found)}
def nothing(): return {"train": Pairs([None] * 12)}
def ragged(): return {"train": Pairs([np.zeros(1 + index // 11) for index in range(12)])}
def sometimes(): return {"train": Pairs([None] * 6 + [1] * 6)}
def nan_targets(): return {"test": Pairs([0.5, float("nan")] * 6)}
def nan_array(): return {"test": (IMAGES, np.full(12, np.nan))}
def large_mask(): return {"test": (IMAGES, MASKS), "classes": 2}
def large_item(): return {"test": Pairs(list(MASKS)), "classes": 2}
def word_task(): return {"test": (IMAGES, LABELS), "classes": 3, "task": 7}
def complex_targets(): return {"test": (IMAGES, LABELS * 1j)}

def broken(): raise KeyError("lost")
def no_classes(): return {"train": (IMAGES, LABELS)}
def zero_classes(): return {"train": (IMAGES, LABELS), "classes": 0}
def no_parts(): return {"classes": 3}
def number(): return 7
def no_dataset(): return {"train": 5, "classes": 3}
def iterator(): return {"train": iter([1]), "classes": 3}
def float_images(): return {"train": (IMAGES.astype(np.float32), LABELS), "classes": 3}
def fewer_labels(): return {"train": (IMAGES, LABELS[:5]), "classes": 3}
def float_labels(): return {"train": (IMAGES, LABELS / 2), "classes": 3}
def large_label(): return {"train": (IMAGES, LABELS + 1), "classes": 3}
def wrong_mean(): return {"train": (IMAGES, LABELS), "classes": 3, "mean": (0.5,)}
def text_mean(): return {"train": (IMAGES, LABELS), "classes": 3, "mean": "half"}
def item_raises(): return {"test": Plain(RuntimeError("bad item")), "classes": 3}
def item_single(): return {"test": Plain(np.zeros((4, 4), np.uint8)), "classes": 3}
def item_text(): return {"test": Plain(("picture", 0)), "classes": 3}
def item_label(): return {"test": Plain((np.zeros((4, 4), np.uint8), 3)), "classes": 3}
def item_word(): return {"test": Plain((np.zeros((4, 4), np.uint8), "cat")), "classes": 3}
def item_normalised(): return {"test": Plain((torch.randn(3, 4, 4), 0)), "classes": 3}
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "my.py").write_text(CODE)
    return str(tmp_path / "my.py")


def opened(reference: str, **named: object) -> object:
    code, _ = split_arguments(reference)
    return open_data(reference, user_code={code}, **named)  # type: ignore[arg-type]


def pixels(split: object, **named: object) -> torch.Tensor:
    options = {"batch_size": 4, "mean": (0.0,), "std": (1 / 255,), **named}
    return torch.cat([batch.images for batch in batches(split, **options)]).round()  # type: ignore[arg-type]


def test_arrays_are_held_in_memory(code: str) -> None:
    source = opened(f"{code}:arrays")
    assert source.classes == ("a", "b", "c")
    assert source.shape == (3, 4, 4)
    train = source.split("train")
    expected = np.arange(12 * 48).astype(np.uint8).reshape(12, 4, 4, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(train.images.numpy(), expected)
    assert train.labels.tolist() == [index % 3 for index in range(12)]
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [12, 3, 2]
    assert source.notes == ()


def test_an_object_with_attributes_and_preprocessing(code: str) -> None:
    source = opened(f"{code}:named")
    assert source.classes == ("0", "1", "2")
    assert source.mean == (0.1, 0.2, 0.3)
    assert source.std == (1.0, 1.0, 1.0)


def test_missing_parts_are_made_and_said(code: str) -> None:
    source = opened(f"{code}:train_only")
    assert [len(source.split(name)) for name in ("train", "validation", "test")] == [11, 1, 1]
    assert "held out" in source.notes[0]
    assert "--test-data" in source.notes[1]


def test_gray_arrays(code: str) -> None:
    assert opened(f"{code}:gray").shape == (1, 4, 4)
    with pytest.raises(DataError, match="has no train split"):
        opened(f"{code}:gray").split("train")


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "floating"])
def test_data_sets_give_images_of_each_kind(code: str, kind: str) -> None:
    split = opened(f"{code}:{kind}").split("train")
    reference = opened(f"{code}:pil").split("train")
    assert torch.equal(pixels(split), pixels(reference))
    assert pixels(split).shape == (27, 3, 6, 5)


def test_labels_come_from_reading(code: str) -> None:
    split = opened(f"{code}:pil").split("train")
    found = list(batches(split, batch_size=27, mean=(0.0,), std=(1.0,)))
    assert split.labels is None
    assert sorted(set(found[0].labels.tolist())) == [0, 1, 2]


def test_its_randomness_follows_seed_and_epoch_not_workers_or_global_state(code: str) -> None:
    split = opened(f"{code}:pil").split("train")
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = pixels(split, seed=1, epoch=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(2)
    assert torch.equal(pixels(split, seed=1, epoch=1), first)
    assert torch.equal(pixels(split, seed=1, epoch=1, workers=2), first)
    assert not torch.equal(pixels(split, seed=1, epoch=2), first)


def test_augmentation_and_conversion_of_streamed_items(code: str) -> None:
    split = opened(f"{code}:tensor", input_shape=(1, 12, 10)).split("train")
    plain = pixels(split)
    assert plain.shape == (27, 1, 12, 10)
    turned = pixels(split, augmentation=Augmentation(rotation=40))
    assert not torch.equal(plain, turned)


def test_code_that_was_not_named_never_runs(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef data(): pass\n")
    with pytest.raises(DataError, match=r"--data .*my\.py:data"):
        open_data(f"{tmp_path / 'my.py'}:data", user_code={"another.py:data"})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "broken raised KeyError: 'lost'.*my.py, line"),
        ("no_classes", "no_classes returned classes=None"),
        ("zero_classes", "zero_classes returned classes=0"),
        ("no_parts", "no_parts returned a dict with none of train, validation, test"),
        ("number", "number returned a int with none of train, validation, test"),
        ("no_dataset", "no_dataset: train is a int"),
        ("iterator", "iterator: train is a list_iterator"),
        ("float_images", "float_images: train has images of type torch.float32"),
        ("fewer_labels", r"fewer_labels: train has 12 images but labels of shape \(5,\)"),
        ("float_labels", "float_labels: the first target is floating point, though there are class names"),
        ("large_label", r"large_label: train has the label 3; with 3 classes it must lie in 0\.\.2"),
        ("wrong_mean", "wrong_mean returned 1 values as mean for 3 channels"),
        ("text_mean", "text_mean returned mean='half'"),
        ("item_text", "item_text: test: item 0: the image is a str"),
        ("item_normalised", r"item_normalised: test: item 0: a tensor of torch.float32 must lie in 0\.\.1"),
        ("item_single", "item_single: item 0 is a ndarray, not a pair"),
        ("item_raises", "item_raises raised RuntimeError: bad item"),
        ("item_label", r"item_label: item 0 has the label 3; with 3 classes it must lie in 0\.\.2"),
        ("item_word", "item_word: item 0 has the label 'cat'"),
        ("nan_targets", "nan_targets: item 1 has targets that are NaN"),
        ("nan_array", "nan_array: test has targets that are NaN"),
        ("large_mask", r"large_mask: test has a mask with the class index 2; .* 0\.\.1, or be 255"),
        ("large_item", r"large_item: item 0 has a mask with the class index 2"),
        ("word_task", "word_task returned task=7"),
        ("complex_targets", "complex_targets has a complex target"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_returns_name_the_function(code: str, function: str, said: str, workers: int) -> None:
    def use() -> None:
        source = opened(f"{code}:{function}")
        pixels(source.split("test"), workers=workers)

    with pytest.raises(UserCodeError, match=said) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert "my.py:" in str(caught.value)


def test_its_fingerprint(code: str) -> None:
    assert opened(f"{code}:arrays").fingerprint() == opened(f"{code}:arrays").fingerprint()
    assert opened(f"{code}:arrays").fingerprint() != opened(f"{code}:named").fingerprint()
    assert opened(f"{code}:pil").fingerprint() == opened(f"{code}:pil").fingerprint()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("kind", "task", "dtype", "shape"),
    [
        ("float", "regression", torch.float32, ()),
        ("vector", "regression", torch.float32, (3,)),
        ("image", "regression", torch.float32, (3, 4, 4)),
        ("mask", "segmentation", torch.int64, (4, 4)),
        ("codes", None, torch.int64, (3,)),
        ("truth", None, torch.bool, (3,)),
    ],
)
def test_targets_of_any_tensor(
    code: str, kind: str, task: str | None, dtype: torch.dtype, shape: tuple[int, ...], streamed: bool
) -> None:
    source = opened(with_arguments(f"{code}:targets", {"kind": kind, "streamed": streamed}))
    assert (source.task, source.classes, source.labelled) == (task, (), True)
    assert source.contents() == "11 training, 1 validation, 1 test images"
    (batch,) = batches(source.split("train"), batch_size=12, mean=(0.0,), std=(1.0,))
    assert batch.labels.dtype == dtype
    assert batch.labels.shape == (11, *shape)
    both = [
        opened(with_arguments(f"{code}:targets", {"kind": kind, "streamed": way})) for way in (False, True)
    ]
    first, second = (
        next(iter(batches(found.split("train"), batch_size=12, mean=(0.0,), std=(1.0,)))) for found in both
    )
    assert torch.equal(first.labels, second.labels)


def test_a_task_can_be_told(code: str) -> None:
    told = opened(with_arguments(f"{code}:targets", {"kind": "codes", "task": "detection"}))
    assert told.task == "detection"
    named = opened(with_arguments(f"{code}:targets", {"kind": "vector", "task": "regression", "classes": 3}))
    assert (named.task, named.classes) == ("regression", ("0", "1", "2"))


def test_masks_may_have_names(code: str) -> None:
    source = opened(with_arguments(f"{code}:targets", {"kind": "mask", "classes": ["sky", "sea"]}))
    matched = by_name(source, ("sea", "rock", "sky"))
    own, renumbered = source.split("train").labels, matched.split("train").labels
    expected = torch.full_like(own, 255)
    expected[own == 0], expected[own == 1] = 2, 0
    assert torch.equal(renumbered, expected)


def test_other_targets_are_not_renumbered(code: str) -> None:
    arguments = {"kind": "vector", "task": "regression", "classes": ["a", "b"]}
    source = opened(with_arguments(f"{code}:targets", arguments))
    assert by_name(source, ("b", "a")) is source


def test_pictures_as_targets(code: str) -> None:
    masks = opened(with_arguments(f"{code}:pictures", {"mode": "L"}))
    colour = opened(with_arguments(f"{code}:pictures", {"mode": "RGB"}))
    assert (masks.task, colour.task) == ("segmentation", "regression")
    for source in (masks, colour):
        (batch,) = batches(source.split("train"), batch_size=12, mean=(0.0,), std=(1.0,))
        pixels = batch.images if source is colour else (batch.images[:, 0] * 255).round().long() % 3
        assert torch.allclose(batch.labels, pixels)


def test_images_alone_are_unlabelled(code: str) -> None:
    source = opened(f"{code}:nothing")
    assert (source.task, source.labelled) == (None, False)
    (batch,) = batches(source.split("train"), batch_size=12, mean=(0.0,), std=(1.0,))
    assert batch.labels is None
    with pytest.raises(UserCodeError, match="has a target, though the first item has none"):
        pixels(opened(f"{code}:sometimes").split("train"))


@pytest.mark.parametrize("workers", [0, 1])
def test_targets_of_one_batch_have_one_shape_unless_a_task_makes_the_batch(code: str, workers: int) -> None:
    split = opened(f"{code}:ragged").split("train")
    with pytest.raises(DataError, match=r"\[1\] and torch.float32 \[2\]\), so they cannot be stacked"):
        pixels(split, batch_size=12, workers=workers)
    served = batches(
        split,
        batch_size=12,
        mean=(0.0,),
        std=(1.0,),
        workers=workers,
        make_targets=lambda targets: torch.tensor([len(target) for target in targets]),
    )
    assert next(iter(served)).labels.tolist() == [1] * 10 + [2]


def test_arguments_stand_in_the_reference(code: str) -> None:
    reference = with_arguments(f"{code}:targets", {"kind": "float", "classes": None})
    assert opened(reference).reference == reference
    assert split_arguments(reference) == (f"{code}:targets", {"kind": "float", "classes": None})
    with pytest.raises(UserCodeError, match="targets raised TypeError"):
        opened(f"{code}:targets")
    for text in ("digits", "folder:a {", 'folder {"a": 1}', "my.py:data {1}"):
        assert split_arguments(text) == (text, {})


def test_arguments_are_for_the_users_own_data() -> None:
    with pytest.raises(DataError, match=r"folder:x takes no arguments \(size=3\)"):
        own_arguments("folder:x", {"size": 3})


def test_a_set_for_another_task_is_no_validation_part(code: str) -> None:
    with pytest.raises(DataError, match=r"is for regression, the training data .* for classification"):
        open_data(
            f"{code}:arrays",
            val_data=with_arguments(f"{code}:targets", {"kind": "float"}),
            user_code={f"{code}:arrays", f"{code}:targets"},
        )
