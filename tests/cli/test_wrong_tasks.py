"""Wrong uses of tasks: one clear line that says what is wrong and what is allowed, and nothing written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import wrong_task_toys
from cctool.cli.main import app

Mask = Callable[[int], Image.Image | None]
RANDOM = np.random.default_rng(0)

DIGITS = "--data digits --limit 16"
MADE = (
    f"train --arch lenet {DIGITS} --epochs 0 -o lenet.pt",
    f"train --arch my.py:ae {DIGITS} --loss my.py:mse --epochs 0 -o ae.pt",
    f"train --arch my.py:boxes {DIGITS} --epochs 0 --task unknown -o boxes.pt",
    "train --arch my.py:seg --data segment:masks --epochs 0 -o seg.pt",
    "train --arch my.py:reg --data my.py:numbers --epochs 0 -o reg.pt",
    "train --arch my.py:ten --data my.py:numbers10 --epochs 0 -o ten.pt",
)

# Made up from docs/ and --help alone.
FROM_DOCS = [
    (f"train --arch my.py:ae {DIGITS}", 1, "--loss FILE.py:FN names a loss of yours"),
    ("train --arch lenet --data images:pictures", 1, "images:pictures has no labels, and train needs them"),
    ("evaluate lenet.pt --data images:pictures", 1, "has no labels: give --predictions FILE.csv"),
    ("prune lenet.pt --method l1 --max-drop 1 --data images:pictures", 2, "--val-data names one"),
    (f"evaluate lenet.pt {DIGITS} --task detection", 2, "classification, segmentation, regression, custom"),
    (f"evaluate lenet.pt {DIGITS} --task segmentation", 1, "returned shape [2, 10]; segmentation needs"),
    (f"evaluate lenet.pt {DIGITS} --task custom", 1, "--metric FILE.py:FN names a metric of yours"),
    (
        f"prune ae.pt --arch my.py:ae --method l1 --max-drop 1.5 --loss my.py:mse {DIGITS}",
        1,
        "give a part of its value, as in --max-drop 2%",
    ),
    (f"prune lenet.pt --method l1 --max-drop 120% {DIGITS}", 1, "less than 100% is allowed"),
    (
        "evaluate reg.pt --arch my.py:reg --data my.py:numbers --per-class",
        1,
        "--per-class needs classes, and the task regression has none",
    ),
    (
        f"evaluate ae.pt --arch my.py:ae {DIGITS} --loss my.py:mse --confusion c.png",
        1,
        "--confusion needs classes, and the task custom has none",
    ),
    (
        "train reg.pt --arch my.py:reg --new-head --data my.py:numbers -o new.pt",
        1,
        "--new-head needs a data set with classes",
    ),
    (
        f"distill lenet.pt --teacher ae.pt --teacher-arch my.py:ae {DIGITS}",
        1,
        "a teacher's outputs must have the student's shape",
    ),
    (
        "train --arch my.py:seg --data segment:missing",
        1,
        "missing/train/images/3.png has no mask: missing/train/masks/3.png is missing",
    ),
    ("train --arch my.py:seg --data segment:colour", 1, "a mask holds a class index for each pixel"),
    (
        "train --arch my.py:seg --data segment:beyond",
        1,
        "class index 3; with 3 classes it must lie in",
    ),
    ("evaluate lenet.pt --data digits --data-arg size=64", 1, "only data of your own, my.py:factory, do"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:up", 1, "is 'up'; 'max' or 'min' is allowed"),
    (f"train lenet.pt {DIGITS} --loss mse -o new.pt", 1, "--loss mse: my.py:function or package.module"),
    (f"train --arch my.py:two_inputs {DIGITS}", 1, "networks of several inputs are not supported"),
    (f"quantize ae.pt --arch my.py:ae --method qat {DIGITS}", 1, "name it with --loss my.py:mse"),
    (f"prune ae.pt --arch my.py:ae --method taylor {DIGITS}", 1, "name it with --loss my.py:mse"),
    (f"prune ae.pt --arch my.py:ae --method l1 --finetune-epochs 1 {DIGITS}", 1, "--loss my.py:mse"),
    ("compare net.onnx --data digits", 2, "name a checkpoint, too, whose data and preprocessing"),
    ("evaluate net.onnx --data digits", 1, "only `cctool compare` runs such files"),
    (f"compare lenet.pt ae.pt {DIGITS}", 1, "name it with --arch my.py:ae"),
    (
        f"compare lenet.pt seg.pt --arch my.py:seg {DIGITS}",
        1,
        "seg.pt: targets of shape [16] and torch.int64 do not fit",
    ),
    (
        "evaluate lenet.pt --data my.py:float_labels",
        1,
        "give whole numbers, leave 'classes' out",
    ),
    ("evaluate lenet.pt --data my.py:too_few_labels", 1, "20 images but labels of shape (12,)"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:nan", 1, "returned nan; a metric is a finite number"),
]

# Made up from the code.
FROM_CODE = [
    (f"evaluate lenet.pt {DIGITS} --metric my.py:word", 1, "returned a str; a metric is one number"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:written", 1, "returned a str; a metric is one number"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:truth", 1, "returned a bool; a metric is one number"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:truths", 1, "returned a torch.bool; a metric is one number"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:leaves", 1, "my.py:leaves raised SystemExit: 3"),
    (f"train --arch my.py:leaving {DIGITS} --loss my.py:mse", 1, "ended the program (SystemExit: 4)"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:unit_3", 1, "its unit is 3; a text such as 'dB'"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:top5", 1, "top5 is the name of a measure of cctool's own"),
    (f"train --arch lenet {DIGITS} --metric my.py:loss", 1, "loss is the name of a measure of cctool's own"),
    ("evaluate reg.pt --arch my.py:reg --data my.py:numbers --metric my.py:mae", 1, "(mean absolute error)"),
    (f"evaluate ae.pt --arch my.py:ae {DIGITS} --metric my.py:miou", 1, "(mean IoU)"),
    (
        "train seg.pt --arch my.py:seg --data folder:classes4 -o new.pt",
        1,
        "segmentation needs whole-number masks",
    ),
    ("evaluate boxes.pt --arch my.py:boxes --data images:pictures", 1, "--task the kind of outputs"),
    (f"evaluate lenet.pt {DIGITS} --metric my.py:each", 1, "returned shape [16]; a metric is one number"),
    (f"prune lenet.pt --method l1 {DIGITS} --metric my.py:raises", 1, "raised ValueError: no such thing"),
    (f"train lenet.pt {DIGITS} --loss my.py:flat -o new.pt", 1, "a loss without a gradient"),
    (f"train lenet.pt {DIGITS} --loss my.py:each -o new.pt", 1, "a loss is one number: take its mean"),
    (f"train --arch lenet {DIGITS} --loss my.py:nan_loss", 1, "my.py:nan_loss computes became nan"),
    (f"evaluate lenet.pt {DIGITS} --loss my.py:nan_loss", 1, "returned nan; a loss is a finite number"),
    (f"evaluate lenet.pt {DIGITS} --metric=", 1, "--metric : my.py:function or package.module"),
    (f"train --arch my.py:no_outputs {DIGITS} --task classification", 1, "returned a NoneType; a tensor of"),
    (f"train --arch my.py:text_outputs {DIGITS} --task regression", 1, "a str; regression needs a tensor"),
    (f"train --arch my.py:boxes {DIGITS} --loss my.py:mse", 1, "my.py:mse raised TypeError"),
    (
        "train --arch my.py:one_map --data segment:masks --task segmentation",
        1,
        "shape [2, 1, 16, 16] of torch.float32); these tasks do: regression, custom, unknown",
    ),
    ("train --arch my.py:reg --data my.py:numbers10", 1, "[20, 2] for targets of shape [20, 10]: regression"),
    ("train --arch my.py:reg --data my.py:shapes_mixed", 1, "the targets of one batch differ"),
    ("train --arch lenet --data my.py:word_labels", 1, "label 'cat'; it must be a whole number"),
    ("train --arch my.py:reg --data my.py:nan_targets", 1, "train has targets that are NaN or infinite"),
    ("train --arch my.py:reg --data my.py:other_task", 1, "'restoration'; classification, segmentation"),
    ("train --arch lenet --data my.py:empty", 1, "my.py:empty: train has no images"),
    ("train --arch my.py:seg --data my.py:float_masks", 1, "segmentation needs whole-number masks"),
    ("train --arch my.py:seg --data segment:black_and_white", 1, "masks of two levels need 0 and 1"),
    ("evaluate seg.pt --arch my.py:seg --data segment:small", 1, "both must have one size"),
    ("evaluate lenet.pt --data my.py:float_labels_of_a_task", 1, "needs a whole number as its label"),
    ("evaluate lenet.pt --data my.py:label_too_large", 1, "label 10; with 10 classes it must lie in 0..9"),
    ("evaluate lenet.pt --data my.py:one_hot", 1, "classification needs a whole number as the label"),
    (
        f"distill lenet.pt --teacher ten.pt --teacher-arch my.py:ten {DIGITS}",
        1,
        "trained for regression, the student is for classification",
    ),
    (
        f"distill lenet.pt --teacher boxes.pt --teacher-arch my.py:boxes {DIGITS}",
        1,
        "boxes.pt: the network returned a dict; a tensor of logits (N, classes) is expected",
    ),
    (
        "train reg.pt --arch my.py:reg --data my.py:numbers --label-smoothing 0.1 -o new.pt",
        1,
        "--label-smoothing 0.1 is for classes, and the task regression has none",
    ),
    (
        "distill reg.pt --arch my.py:reg --teacher reg.pt --teacher-arch my.py:reg --data my.py:numbers "
        "--temperature 8",
        1,
        "--temperature 8 softens classes, and the task regression has none",
    ),
    (
        f"quantize ae.pt --arch my.py:ae --method int4 --max-drop 1% {DIGITS}",
        1,
        "--max-drop needs a metric: this network's loss is my.py:mse; name it with --loss my.py:mse",
    ),
    (
        "prune lenet.pt --method l1 --finetune-epochs 1 --data images:pictures",
        1,
        "images:pictures has no labels, and --finetune-epochs needs them",
    ),
    (f"evaluate lenet.pt {DIGITS} --test-data images:pictures", 1, "images:pictures has no labels: give"),
    (f"evaluate lenet.pt {DIGITS} --test-data my.py:numbers", 1, "my.py:numbers is for regression, the"),
    ("prune lenet.pt --method taylor --data images:pictures", 1, "no labels, and --method taylor needs them"),
    ("quantize lenet.pt --method qat --data images:pictures", 1, "no labels, and fine-tuning needs them"),
    (
        f"evaluate boxes.pt --arch my.py:boxes {DIGITS} --predictions p.csv",
        1,
        "the task unknown does not say what a prediction is",
    ),
]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def levels(count: int, *shape: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, count, shape, dtype=np.uint8))


def masked(folder: str, mask: Mask, names: str = "sky\nroad\ntree\n") -> None:
    """A set that `segment:` reads, 4 images a split; ``mask`` gives None for a mask that is missing."""
    for part in ("train", "val", "test"):
        (Path(folder) / part / "masks").mkdir(parents=True)
        for number in range(4):
            picture(Path(folder) / part / "images" / f"{number}.png")
            found = mask(number)
            if found is not None:
                found.save(Path(folder) / part / "masks" / f"{number}.png")
    if names:
        (Path(folder) / "classes.txt").write_text(names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks of every task, user code and data sets."""
    place = tmp_path_factory.mktemp("wrong_tasks")
    shutil.copy(str(wrong_task_toys.__file__), place / "my.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        masked("masks", lambda number: levels(3, 16, 16))
        masked("missing", lambda number: None if number == 3 else levels(3, 16, 16))
        masked("colour", lambda number: levels(256, 16, 16, 3))
        masked("beyond", lambda number: levels(4, 16, 16))
        masked("small", lambda number: levels(3, 8, 16))
        masked("black_and_white", lambda number: levels(2, 16, 16).point(lambda level: level * 255), "")
        for number in range(4):
            picture(Path("pictures") / f"{number}.png")
            for name in range(20):
                picture(Path("classes4") / f"class{number}" / f"{name}.png")
        Path("net.onnx").write_bytes(b"not opened")
        for command in MADE:
            assert CliRunner().invoke(app, command.split()).exit_code == 0, command
    return place


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file and folder, but for what Python itself compiles."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [pytest.param(*case, id=case[0]) for case in (*FROM_DOCS, *FROM_CODE)],
)
def test_a_wrong_use_is_one_line_of_error_and_writes_nothing(
    command: str, status: int, says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Torch makes this folder when an optimizer is first used.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder.parent))
    before = contents(folder)
    arguments = command.split()
    if arguments[0] in ("train", "distill") and "--epochs" not in arguments:
        arguments += ["--epochs", "1"]
    result = CliRunner().invoke(app, arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert says in errors[0]
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in result.stderr
    assert "fault of cctool" not in result.stderr
    assert contents(folder) == before
    assert not contents(tmp_path)
