"""`cctool train` from options to files: the run folder, resuming, and how it breaks off."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cctool.base.errors import (
    ArchitectureError,
    CctoolError,
    CheckpointError,
    DataError,
    DivergedError,
    TrainingError,
    UsageError,
    UserCodeError,
)
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.operations import pipeline
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.operations.train.resume import find_resumed
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.train.fit import FitOptions, Schedule, Warmup
from cctool.options.train.run import RunOptions, TrainOptions
from cctool.quantization.encodings.uint8 import AFFINE_U8
from cctool.training.averaging import average_in

NET = """
import torch
from torch import nn

def make_net(num_classes=10, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, num_classes),
    )

def loss(outputs, labels):
    return nn.functional.multi_margin_loss(outputs, labels)

def shapeless(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none")

def nan_later(outputs, labels):
    nan_later.calls += outputs.requires_grad
    value = nn.functional.cross_entropy(outputs, labels)
    return value * float("nan") if nan_later.calls > 5 else value
nan_later.calls = 0

def errors(outputs, labels):
    return int((outputs.argmax(1) != labels).sum())

def faulty(outputs, labels):
    return outputs

def interrupt_later(outputs, labels):
    interrupt_later.calls += outputs.requires_grad
    if interrupt_later.calls > 5:
        raise KeyboardInterrupt
    return nn.functional.cross_entropy(outputs, labels)
interrupt_later.calls = 0
"""


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note

    def progress(self, items: Any, description: str, total: int | None = None) -> Iterator[Any]:
        yield from items


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:make_net"


@pytest.fixture(autouse=True)
def _undo_determinism() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def request(net: str | None, output: Path, *, source: Path | None = None, **changes: Any) -> pipeline.Request:
    base = pipeline.Request(
        verb="train",
        source=str(source) if source else None,
        output=str(output),
        model=ModelOptions(arch=net),
        runtime=RuntimeOptions(device="cpu", deterministic=True),
    )
    return replace(base, **changes)


def options(epochs: int = 4, run: RunOptions = RunOptions(), **fit: Any) -> TrainOptions:  # noqa: B008
    settings = FitOptions(**{"epochs": epochs, "optimizer": "sgd", "lr": 0.05, **fit})
    return TrainOptions(settings, DataOptions(data="digits", limit=64, batch_size=32), run)


def products(asked: TrainOptions, wanted: pipeline.Request) -> list[pipeline.Product]:
    return list(pipeline.write(train.run, asked, wanted))


def opened(path: Path, net: str) -> Checkpoint:
    return load(path, tables((net,)))


SCHEDULES: list[dict[str, Any]] = [
    {"schedule": Schedule.CONSTANT},
    {"schedule": Schedule.MULTISTEP, "milestones": (1, 3)},
    {"schedule": Schedule.COSINE, "optimizer": "adamw"},
    {"schedule": Schedule.ONECYCLE, "optimizer": "adam"},
    {"schedule": Schedule.POLY, "warmup_epochs": 1, "clip_norm": 1.0},
    {"schedule": Schedule.COSINE, "warmup": Warmup.EXPONENTIAL, "warmup_epochs": 3, "nesterov": True},
    {"schedule": Schedule.CONSTANT, "gamma_l1": 0.01, "label_smoothing": 0.1, "eval_from": 3},
    {"schedule": Schedule.CONSTANT, "ema": 0.8},
]


@pytest.mark.parametrize("fit", SCHEDULES, ids=lambda fit: "-".join(str(value) for value in fit.values()))
def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, net: str, fit: dict[str, Any]
) -> None:
    (whole,) = products(options(**fit), request(net, tmp_path / "whole.pt"))
    halved = request(net, tmp_path / "halved.pt")
    (early,) = products(options(**fit, run=RunOptions(stop_after=2)), halved)
    assert any("stopped after epoch 2 of" in note for note in early.step.notes)
    assert early.step.parent == whole.step.parent
    (resumed,) = products(options(**fit, run=RunOptions(resume=True)), replace(halved, resumes=True))
    assert Path(resumed.path).read_bytes() == Path(whole.path).read_bytes()
    assert resumed.step == whole.step
    ours, theirs = (opened(tmp_path / f"{name}.run/last.pt", net) for name in ("halved", "whole"))
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name
    assert ours.resume is not None
    assert theirs.resume is not None
    for name, value in theirs.resume.tensors.items():
        assert torch.equal(ours.resume.tensors[name], value), name


def test_a_stop_before_anything_was_validated_hands_out_the_average(tmp_path: Path, net: str) -> None:
    late = {"schedule": Schedule.CONSTANT, "eval_from": 3, "run": RunOptions(stop_after=2)}
    (plain,) = products(options(**late), request(net, tmp_path / "plain.pt"))
    (averaged,) = products(options(**late, ema=0.8), request(net, tmp_path / "averaged.pt"))
    last = opened(tmp_path / "averaged.run/last.pt", net)
    raw, found = (opened(Path(product.path), net).model.state_dict() for product in (plain, averaged))
    assert last.resume is not None
    for name, value in average_in(last.resume.tensors).items():
        assert torch.equal(found[name], value), name
        # What goes on training is what would have trained without an average.
        assert torch.equal(last.model.state_dict()[name], raw[name]), name
    assert any(not torch.equal(found[name], value) for name, value in raw.items())


def test_every_epoch_can_be_resumed_from(tmp_path: Path, net: str) -> None:
    (whole,) = products(options(), request(net, tmp_path / "whole.pt"))
    single = request(net, tmp_path / "single.pt", resumes=True)
    products(options(run=RunOptions(stop_after=1)), single)
    for _ in range(2):
        (early,) = products(options(run=RunOptions(stop_after=1, resume=True)), single)
        assert early.file != whole.file
    (last,) = products(options(run=RunOptions(resume=True)), single)
    assert last.file == whole.file


def test_a_last_checkpoint_can_be_named_itself(tmp_path: Path, net: str) -> None:
    (whole,) = products(options(), request(net, tmp_path / "whole.pt"))
    products(options(run=RunOptions(stop_after=2)), request(net, tmp_path / "a.pt"))
    source, output = find_resumed(str(tmp_path / "a.run/last.pt"), None, "train")
    assert output == str(tmp_path / "a.pt")
    asked = request(net, Path(output), source=Path(str(source)), resumes=True)
    (resumed,) = products(options(run=RunOptions(resume=True)), asked)
    assert resumed.file == whole.file
    elsewhere = request(net, tmp_path / "b.pt", source=tmp_path / "a.run/last.pt", resumes=True)
    with pytest.raises(TrainingError, match=r"nothing to resume: .*b\.run.last\.pt .* by -o .*a\.pt$"):
        products(options(run=RunOptions(resume=True)), elsewhere)


def test_resume_finds_the_run_folder_beside_a_product(tmp_path: Path) -> None:
    (tmp_path / "x.run").mkdir()
    (tmp_path / "x.run/last.pt").touch()
    product = str(tmp_path / "x.pt")
    assert find_resumed(product, None, "train") == (str(tmp_path / "x.run/last.pt"), product)
    (tmp_path / "x.train.run").mkdir()
    (tmp_path / "x.train.run/last.pt").touch()
    assert find_resumed(product, None, "train") == (product, None)
    assert find_resumed(None, None, "train") == (None, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.1}, "lr was 0.05, now 0.1"),
        ({"momentum": 0.8}, "momentum was not given, now 0.8"),
        ({"augment": False}, "augment was True, now False"),
        ({"epochs": 6}, "epochs was 4, now 6"),
    ],
)
def test_other_options_are_refused_on_resuming(
    tmp_path: Path, net: str, changed: dict[str, Any], message: str
) -> None:
    asked = request(net, tmp_path / "a.pt", resumes=True)
    products(options(run=RunOptions(stop_after=1)), asked)
    with pytest.raises(TrainingError, match=message):
        products(options(**{"epochs": 4, **changed}, run=RunOptions(resume=True)), asked)
    other_seed = replace(asked, runtime=replace(asked.runtime, seed=5))
    with pytest.raises(TrainingError, match="seed was 0, now 5"):
        products(options(run=RunOptions(resume=True)), other_seed)
    smaller = replace(options(run=RunOptions(resume=True)), data=DataOptions("digits", None, None, 16, 0, 64))
    with pytest.raises(TrainingError, match="batch_size was 32, now 16"):
        products(smaller, asked)


def test_a_constant_rate_can_be_prolonged(tmp_path: Path, net: str) -> None:
    constant = {"schedule": Schedule.CONSTANT}
    asked = request(net, tmp_path / "a.pt", resumes=True)
    products(options(2, **constant), asked)
    (longer,) = products(options(4, **constant, run=RunOptions(resume=True)), asked)
    (whole,) = products(options(4, **constant), request(net, tmp_path / "whole.pt"))
    assert longer.file == whole.file


def test_there_must_be_something_to_resume(tmp_path: Path, net: str) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        products(options(run=RunOptions(resume=True)), request(net, tmp_path / "a.pt"))


def test_the_run_folder_tells_the_run(tmp_path: Path, net: str) -> None:
    run = RunOptions(save_every=2, tensorboard=True, mlflow=True, mlflow_dir=str(tmp_path / "store"))
    (product,) = products(options(run=run), request(net, tmp_path / "a.pt"))
    folder = tmp_path / "a.run"
    found = {item.name for item in folder.iterdir()}
    assert found == {
        "command.txt", "environment.json", "epoch-0002.pt", "epoch-0004.pt", "last.pt", "log.txt",
        "metrics.csv", "mlflow-run.txt", "product.txt", "tensorboard",
    }  # fmt: skip
    assert json.loads((folder / "environment.json").read_text())["torch"] == str(torch.__version__)
    assert (folder / "command.txt").read_text().strip()
    assert "epoch 4/4: loss" in (folder / "log.txt").read_text()
    with (folder / "metrics.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["epoch"] for line in lines] == ["1", "2", "3", "4"]
    assert float(lines[0]["learning_rate"]) > float(lines[3]["learning_rate"]) > 0
    assert list((tmp_path / "store").rglob("final/test/top1"))
    assert list((folder / "tensorboard").iterdir())
    second = opened(folder / "epoch-0002.pt", net)
    assert second.resume is not None
    assert second.resume.state["epoch"] == 2
    assert product.report.run_folder == str(folder)


def test_an_earlier_run_is_not_overwritten(tmp_path: Path, net: str) -> None:
    asked = request(net, tmp_path / "a.pt")
    products(options(2, run=RunOptions(stop_after=1)), asked)
    (tmp_path / "a.run/mine.txt").write_text("keep me")
    (tmp_path / "a.pt").unlink()
    with pytest.raises(CheckpointError, match="--resume goes on with it, --force starts anew"):
        products(options(2), asked)
    (product,) = products(options(2), replace(asked, force=True))
    assert (tmp_path / "a.run/mine.txt").exists()
    assert len(product.report.rows) == 2


def test_history_tells_metrics_by_split(tmp_path: Path, net: str) -> None:
    (product,) = products(options(2), request(net, tmp_path / "a.pt"))
    assert product.step.metrics_before == ()
    assert [(found.split, found.n) for found in product.step.metrics_after] == [
        ("validation", 64),
        ("test", 64),
    ]
    assert {"loss", "top1", "top5"} == set(product.step.metrics_after[1].values)
    recorded = product.step.options
    assert "resume" not in recorded["run"]
    assert "stop_after" not in recorded["run"]
    found = opened(tmp_path / "a.pt", net)
    assert found.resume is None
    assert found.spec.data == "digits"
    assert len(found.history) == 1


def test_training_goes_on_from_a_checkpoint(tmp_path: Path, net: str) -> None:
    (first,) = products(options(2), request(net, tmp_path / "a.pt"))
    asked = request(net, tmp_path / "b.pt", source=tmp_path / "a.pt")
    (second,) = products(options(1), asked)
    assert second.step.metrics_before == first.step.metrics_after
    assert second.step.parent is not None
    assert second.step.parent.file == first.file
    assert len(opened(tmp_path / "b.pt", net).history) == 2


def test_resuming_a_fine_tuning_keeps_parent_and_metrics_before(tmp_path: Path, net: str) -> None:
    products(options(1), request(net, tmp_path / "a.pt"))
    whole = request(net, tmp_path / "whole.pt", source=tmp_path / "a.pt")
    (expected,) = products(options(3, lr=None), whole)
    halved = replace(whole, output=str(tmp_path / "b.pt"), resumes=True)
    products(options(3, lr=None, run=RunOptions(stop_after=1)), halved)
    (found,) = products(options(3, lr=None, run=RunOptions(resume=True)), halved)
    assert found.file == expected.file


def test_no_epoch_writes_the_network_as_it_was_built(tmp_path: Path, net: str) -> None:
    (product,) = products(options(0), request(net, tmp_path / "a.pt"))
    assert not (tmp_path / "a.run").exists()
    assert [found.split for found in product.step.metrics_after] == ["validation", "test"]
    bare = TrainOptions(FitOptions(epochs=0))
    model = ModelOptions(arch=net, input_shape=(1, 32, 32))
    (without,) = products(bare, request(net, tmp_path / "b.pt", model=model))
    assert without.step.metrics_after == ()
    ours, theirs = (opened(tmp_path / name, net).model.state_dict() for name in ("a.pt", "b.pt"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_network_that_was_only_built_trains_as_a_fresh_one(tmp_path: Path, net: str) -> None:
    asked = TrainOptions(FitOptions(epochs=1), options(1).data)
    (direct,) = products(asked, request(net, tmp_path / "direct.pt"))
    products(options(0), request(net, tmp_path / "built.pt"))
    (after,) = products(asked, request(net, tmp_path / "after.pt", source=tmp_path / "built.pt"))
    rates = [product.report.rows[0].lr for product in (direct, after)]
    assert rates[0] == rates[1]
    (further,) = products(asked, request(net, tmp_path / "further.pt", source=tmp_path / "after.pt"))
    assert further.report.rows[0].lr < rates[0]
    halved = request(net, tmp_path / "halved.pt", source=tmp_path / "built.pt", resumes=True)
    two = replace(asked, fit=FitOptions(epochs=2))
    products(replace(two, run=RunOptions(stop_after=1)), halved)
    (resumed,) = products(replace(two, run=RunOptions(resume=True)), halved)
    (whole,) = products(two, request(net, tmp_path / "whole.pt", source=tmp_path / "built.pt"))
    assert resumed.content == whole.content


def test_the_seed_decides_the_fresh_network(tmp_path: Path, net: str) -> None:
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        asked = request(net, tmp_path / f"{index}.pt", runtime=RuntimeOptions(device="cpu", seed=seed))
        products(options(0), asked)
        weights.append(opened(tmp_path / f"{index}.pt", net).model.state_dict()["0.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_network_that_does_not_run_on_its_input_says_which_size(tmp_path: Path) -> None:
    wanted = request("vgg11", tmp_path / "a.pt")
    model = ModelOptions(arch="vgg11", input_shape=(1, 8, 8))
    with pytest.raises(ArchitectureError, match=r"does not run on inputs of 1x8x8 .*--input"):
        products(options(1), replace(wanted, model=model))


UNUSUAL = """
import torch
from torch import nn

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.LazyLinear(10)
    def forward(self, x):
        return self.fc(x.flatten(1))

class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1024, 10)
    def forward(self, x):
        return self.fc(x.flatten(1))
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass
"""


@pytest.mark.parametrize(
    ("name", "message"), [("Lazy", r"lazy layers \(fc\.weight"), ("Extra", "_extra_state .* not a tensor")]
)
def test_what_no_file_can_hold_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "unusual.py").write_text(UNUSUAL)
    with pytest.raises(CheckpointError, match=message):
        products(options(0), request(f"{tmp_path / 'unusual.py'}:{name}", tmp_path / "a.pt"))
    assert not (tmp_path / "a.pt").exists()


def test_unlabelled_images_train_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(tmp_path / "photos" / "a.png")
    asked = replace(options(1), data=DataOptions(data=f"folder:{tmp_path / 'photos'}"))
    with pytest.raises(DataError, match="has no train split"):
        products(asked, request("resnet20", tmp_path / "a.pt"))


def test_data_are_needed(tmp_path: Path, net: str) -> None:
    model = ModelOptions(arch=net, input_shape=(1, 32, 32))
    with pytest.raises(UsageError, match="needs data"):
        products(TrainOptions(), request(net, tmp_path / "a.pt", model=model))


def test_more_classes_than_the_network_has_are_refused(tmp_path: Path, net: str) -> None:
    model = ModelOptions(arch=net, arguments=("num_classes=4",))
    with pytest.raises(DataError, match="10 classes, the network tells 4 apart"):
        products(options(), request(net, tmp_path / "a.pt", model=model))
    assert not (tmp_path / "a.run").exists()


def test_classes_are_those_that_the_network_was_trained_on(tmp_path: Path, net: str) -> None:
    products(options(1), request(net, tmp_path / "a.pt"))
    digits = opened(tmp_path / "a.pt", net)
    assert digits.spec.classes == tuple("0123456789")
    named = digits.spec.model_copy(update={"classes": tuple("abcdefghij")})
    save(replace(digits, spec=named), tmp_path / "letters.pt", tables((net,)))
    said = Notes()
    products(options(1), request(net, tmp_path / "b.pt", source=tmp_path / "letters.pt", reporter=said))
    assert opened(tmp_path / "b.pt", net).spec.classes == tuple("0123456789")
    assert any("classes of digits take the place" in text for text in said.said)
    wide = ModelOptions(arch=net, arguments=("num_classes=12",))
    torch.manual_seed(0)
    bare = tables((net,)).build(net, {"num_classes": 12}).state_dict()
    torch.save(bare, tmp_path / "wide.pth")
    asked = request(net, tmp_path / "c.pt", source=tmp_path / "wide.pth")
    products(options(1), replace(asked, model=replace(wide, input_shape=(1, 32, 32))))
    assert opened(tmp_path / "c.pt", net).spec.classes is None


def user(net: str, name: str) -> str:
    return net.replace("make_net", name)


def test_loss_and_metric_can_be_the_users(tmp_path: Path, net: str) -> None:
    loss, metric = user(net, "loss"), user(net, "errors")
    asked = request(net, tmp_path / "a.pt", user_code=(loss, metric))
    from cctool.options.train.fit import MetricMode

    (product,) = products(options(3, loss=loss, metric=metric, metric_mode=MetricMode.MIN), asked)
    validation, test = product.step.metrics_after
    assert test.values["errors"] == pytest.approx((100 - test.values["top1"]) / 100 * 64)
    errors = [row.validation["errors"] for row in product.report.rows]
    assert product.report.best_epoch == errors.index(min(errors)) + 1
    assert validation.values["errors"] == min(errors)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("loss", "shapeless", r"shape \[32\]"),
        ("loss", "absent", "no function"),
        ("metric", "faulty", "a metric is one number"),
        ("optimizer", "errors", "raised TypeError"),
    ],
)
def test_faulty_user_functions_are_named(
    tmp_path: Path, net: str, kind: str, name: str, message: str
) -> None:
    reference = user(net, name)
    asked = request(net, tmp_path / "a.pt", user_code=(reference,))
    with pytest.raises(UserCodeError, match=message) as caught:
        products(options(2, **{kind: reference}), asked)
    assert name in str(caught.value)
    assert not (tmp_path / "a.pt").exists()


def test_user_functions_run_only_when_named(tmp_path: Path, net: str) -> None:
    with pytest.raises(UserCodeError, match="runs only when it is named"):
        products(options(loss=user(net, "loss")), request(net, tmp_path / "a.pt"))


@pytest.mark.parametrize("mine", [False, True])
def test_a_failure_in_the_first_epoch_leaves_only_the_users_files(
    tmp_path: Path, net: str, mine: bool
) -> None:
    reference, folder = user(net, "shapeless"), tmp_path / "a.run"
    if mine:
        folder.mkdir()
        (folder / "mine.txt").write_text("keep me")
    with pytest.raises(UserCodeError, match="no epoch was completed"):
        products(options(loss=reference), request(net, tmp_path / "a.pt", user_code=(reference,)))
    assert [path.name for path in folder.glob("*")] == (["mine.txt"] if mine else [])
    assert folder.exists() == mine


def test_a_diverged_training_keeps_the_best_so_far(tmp_path: Path, net: str) -> None:
    reference = user(net, "nan_later")
    asked = request(net, tmp_path / "a.pt", user_code=(reference,))
    with pytest.raises(
        UserCodeError, match=r"nan_later.*became nan in epoch 3, step 2.*best so far \(epoch"
    ) as caught:
        products(options(loss=reference), asked)
    assert str(tmp_path / "a.run/best.pt") in str(caught.value)
    best = opened(tmp_path / "a.run/best.pt", net)
    assert best.resume is None
    assert all(torch.isfinite(value).all() for value in best.model.state_dict().values())
    assert not (tmp_path / "a.pt").exists()


def test_a_rate_that_is_too_large_says_so(tmp_path: Path, net: str) -> None:
    with pytest.raises(DivergedError, match=r"epoch 1.*no epoch was completed"):
        products(options(lr=1e30, schedule=Schedule.CONSTANT), request(net, tmp_path / "a.pt"))
    # Nothing worth keeping is left, so the next try needs no --force.
    products(options(1), request(net, tmp_path / "a.pt"))


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path, net: str) -> None:
    reference = user(net, "interrupt_later")
    said = Notes()
    asked = request(net, tmp_path / "a.pt", user_code=(reference,), reporter=said)
    with pytest.raises(KeyboardInterrupt):
        products(options(loss=reference), asked)
    assert any("epoch 2 is complete" in text and "--resume goes on" in text for text in said.said)
    assert opened(tmp_path / "a.run/last.pt", net).resume is not None


def stored(tmp_path: Path, net: str) -> Path:
    products(options(1), request(net, tmp_path / "dense.pt"))
    dense = opened(tmp_path / "dense.pt", net)
    weight = dense.model.state_dict()["6.weight"]
    encoded = AFFINE_U8.encode(weight, {"axis": None})
    weight.copy_(AFFINE_U8.decode(encoded))
    save(replace(dense, stored={"6.weight": encoded}), tmp_path / "small.pt", tables((net,)))
    return tmp_path / "small.pt"


def test_stored_tensors_train_as_float32_and_say_so(tmp_path: Path, net: str) -> None:
    said = Notes()
    asked = request(net, tmp_path / "a.pt", source=stored(tmp_path, net), reporter=said)
    (product,) = products(options(2), asked)
    assert any("decoded float32" in text for text in said.said)
    assert "left dense" in product.step.notes[0]
    assert opened(tmp_path / "a.pt", net).stored == {}


def test_storage_can_be_kept(tmp_path: Path, net: str) -> None:
    source = stored(tmp_path, net)
    keeping = replace(options(2), keep_storage=True)
    (product,) = products(keeping, request(net, tmp_path / "a.pt", source=source))
    found = opened(tmp_path / "a.pt", net)
    assert set(found.stored) == {"6.weight"}
    assert len(found.model.state_dict()["6.weight"].unique()) <= 256
    halved = request(net, tmp_path / "b.pt", source=source, resumes=True)
    (stopped,) = products(replace(keeping, run=RunOptions(stop_after=1)), halved)
    assert set(opened(Path(stopped.path), net).stored) == {"6.weight"}
    assert "encoded again" in stopped.step.notes[0]
    last = opened(tmp_path / "b.run/last.pt", net)
    assert not last.stored
    assert "left dense" in last.history[-1].notes[0]
    (resumed,) = products(replace(keeping, run=RunOptions(resume=True)), halved)
    assert resumed.file == product.file


def test_the_metrics_are_those_of_the_encoded_network(tmp_path: Path, net: str) -> None:
    from cctool.operations.inspect.evaluate import run as evaluate
    from cctool.options.inspect.evaluate import EvaluateOptions

    keeping = replace(options(2), keep_storage=True)
    (product,) = products(keeping, request(net, tmp_path / "a.pt", source=stored(tmp_path, net)))
    asked = pipeline.Request("evaluate", str(tmp_path / "a.pt"), model=ModelOptions(arch=net))
    report = pipeline.read(evaluate, EvaluateOptions(data=keeping.data), asked)
    assert report.metrics == product.step.metrics_after[1]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"stop_after": 0}, "--stop-after 0"),
        ({"save_every": 0}, "--save-every 0"),
        ({"devices": 0}, "--devices 0"),
        ({"nodes": 0}, "--nodes 0"),
        ({"mlflow_dir": "x"}, "--mlflow-dir needs --mlflow"),
    ],
)
def test_wrong_run_options_are_refused(run: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunOptions(**run)


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives(tmp_path: Path, net: str) -> None:
    """Validation top-1 within 8 points (five of 64 images) after four epochs."""
    found = []
    for device in ("cpu", "cuda"):
        asked = request(net, tmp_path / f"{device}.pt", runtime=RuntimeOptions(device=device))
        (product,) = products(options(), asked)
        found.append(product.step.metrics_after[0].values["top1"])
    assert found[1] == pytest.approx(found[0], abs=8)


def test_errors_are_ours(tmp_path: Path, net: str) -> None:
    """Whatever a user's loss raises is one of our errors, so that the command says it in one line."""
    reference = user(net, "faulty")
    with pytest.raises(CctoolError):
        products(options(loss=reference), request(net, tmp_path / "a.pt", user_code=(reference,)))
