"""Fine-tuning after a cut with a teacher, most often the network that was cut."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import procedure_toys as toys
from cctool.base.errors import ArchitectureError, CheckpointError, TrainingError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import Metrics
from cctool.operations.registries import tables
from cctool.operations.train.finetune import finetune
from cctool.operations.train.teacher import distillation
from cctool.options.common import ModelOptions
from cctool.options.teacher import TeacherOptions
from cctool.options.train.fit import FitOptions


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return toys.saved(toys.shaken(toys.residual_checkpoint()), tmp_path / "dense.pt")


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(6, 1, 32, 32), torch.randint(0, 10, (6,))


def test_the_loss_is_alpha_times_kd_and_the_rest_on_labels(dense: Path) -> None:
    """The dense network teaches the thinned one out of the command's own input."""
    source = load(dense, tables())
    student, _ = toys.cut(source)
    options = TeacherOptions(str(dense), temperature=3.0, alpha=0.7)
    objective, others = distillation(student, toys.digits(), options, toys.context())
    images, labels = batch()
    student.model.eval()
    terms = objective(student.model, images, labels)
    with torch.no_grad():
        taught, logits = source.model(images), student.model(images)
        p = F.softmax(taught / 3, dim=1)
        divergence = (p * (p.log() - F.log_softmax(logits / 3, dim=1))).sum(dim=1).mean()
        by_hand = 0.7 * 9 * divergence + 0.3 * F.cross_entropy(logits, labels)
    assert terms.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert source.origin is not None
    assert others == {"teacher": source.origin}


def test_a_teacher_whose_weights_are_no_numbers_is_refused(dense: Path, tmp_path: Path) -> None:
    source = load(dense, tables())
    spoilt = load(dense, tables())
    name, weight = next(iter(spoilt.model.named_parameters()))
    weight.data.flatten()[:2] = torch.tensor([float("nan"), float("inf")])
    save(spoilt, tmp_path / "nan.pt", tables())
    options = TeacherOptions(str(tmp_path / "nan.pt"))
    with pytest.raises(TrainingError, match=f"the teacher .*nan.pt holds 2 NaN or infinite values in {name}"):
        distillation(source, toys.digits(), options, toys.context())


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    return toys.saved(toys.lenet_checkpoint(), tmp_path / "quick.pt")


def tuned(quick: Path, **changes: Any) -> Checkpoint:
    student, _ = toys.cut(load(quick, tables()))
    source, context = toys.digits(64), toys.context()
    objective = None
    if "teacher" not in changes:
        options = TeacherOptions(str(quick), **changes)
        objective, _ = distillation(student, source, options, context)
    fit = FitOptions(epochs=1, optimizer="sgd", lr=0.05)
    return finetune(student, source, fit, toys.DIGITS, context, objective=objective)


def test_each_option_changes_the_weights(quick: Path) -> None:
    base = tuned(quick).model.features[0].weight
    for change in ({"alpha": 0.3}, {"temperature": 1.0}, {"teacher": None}):
        assert not torch.equal(base, tuned(quick, **change).model.features[0].weight), change
    assert torch.equal(base, tuned(quick).model.features[0].weight)
    assert torch.allclose(
        tuned(quick, alpha=0.0).model.features[0].weight, tuned(quick, teacher=None).model.features[0].weight
    )


def test_the_students_own_foreign_file_needs_no_second_name(tmp_path: Path) -> None:
    from cctool.base.runtime import Silent
    from cctool.operations.opening import open_checkpoint

    path = tmp_path / "foreign.pth"
    torch.save(toys.residual_checkpoint().model.state_dict(), path)
    named = ModelOptions(
        arch="resnet20",
        arguments=("in_channels=1", "base=4"),
        input_shape=(1, 32, 32),
        mean=(0.4,),
        std=(0.3,),
    )
    context = replace(toys.context(), model_options=named)
    student = open_checkpoint(path, named, tables(), frozenset(), Silent())
    _, others = distillation(student, toys.digits(), TeacherOptions(str(path)), context)
    assert others == {"teacher": student.origin}
    torch.save(toys.residual_checkpoint(seed=2).model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not say which network"):
        distillation(student, toys.digits(), TeacherOptions(str(tmp_path / "other.pth")), context)
    given = TeacherOptions(str(tmp_path / "other.pth"), named)
    assert distillation(student, toys.digits(), given, context)[1]["teacher"].path == "other.pth"


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, dense: Path) -> None:
    path = toys.saved(toys.residual_checkpoint(num_classes=7), tmp_path / "seven.pt")
    with pytest.raises(TrainingError, match=r"seven\.pt tells 7 classes apart, the student 10"):
        distillation(load(dense, tables()), toys.digits(), TeacherOptions(str(path)), toys.context())
    with pytest.raises(CheckpointError, match="no such file"):
        distillation(load(dense, tables()), toys.digits(), TeacherOptions("nowhere.pt"), toys.context())


def test_a_fresh_network_gets_another_default_rate(quick: Path) -> None:
    def run(lr: float | None = None, **changes: Any) -> Tensor:
        fit = FitOptions(epochs=1, optimizer="sgd", lr=lr)
        trained = finetune(
            load(quick, tables()), toys.digits(64), fit, toys.DIGITS, toys.context(), **changes
        )
        return trained.model.features[0].weight

    assert not torch.equal(run(), run(fresh=True))
    assert torch.equal(run(fresh=True), run(lr=0.02))


def test_the_last_epoch_counts_where_the_best_is_not_asked_for(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation falls from epoch to epoch, so that the first one is the best."""
    epochs: list[dict[str, Tensor]] = []

    def falling(model: nn.Module, *_: Any, **__: Any) -> Metrics:
        epochs.append({name: value.clone() for name, value in model.state_dict().items()})
        return Metrics(split="validation", n=1, values={"top1": 50.0 - len(epochs)})

    monkeypatch.setattr("cctool.operations.train.finetune.evaluate", falling)

    def run(**changes: Any) -> dict[str, Tensor]:
        fit = FitOptions(epochs=3, optimizer="sgd", lr=0.05)
        trained = finetune(
            load(quick, tables()), toys.digits(64), fit, toys.DIGITS, toys.context(), **changes
        )
        return trained.model.state_dict()

    best = run()
    assert len(epochs) == 3
    assert all(torch.equal(value, epochs[0][name]) for name, value in best.items())
    last = run(choose_best=False)
    assert len(epochs) == 3
    assert all(torch.equal(value, epochs[2][name]) for name, value in last.items())


def test_errors_about_a_teacher_name_its_own_options(tmp_path: Path, dense: Path) -> None:
    student, context = load(dense, tables()), toys.context()
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))\n"
    )
    reference = f"{tmp_path / 'net.py'}:make"
    known = tables({reference})
    spec = student.spec.model_copy(update={"architecture": reference, "arguments": {}, "edits": ()})
    own, bare = tmp_path / "own.pt", tmp_path / "bare.pth"
    save(Checkpoint(known.build(reference, {}), spec), own, known)
    torch.save(known.build(reference, {}).state_dict(), bare)
    with pytest.raises(ArchitectureError, match=f"name it with --teacher-arch {reference}"):
        distillation(student, toys.digits(), TeacherOptions(str(own)), context)
    with pytest.raises(
        CheckpointError, match="name it with --teacher-arch, as in --teacher-arch torchvision"
    ):
        distillation(student, toys.digits(), TeacherOptions(str(bare)), context)
