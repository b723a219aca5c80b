"""`cctool distill`: the teacher is asked in its own terms and never touched."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cctool.base.errors import TrainingError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.registries import tables
from cctool.operations.train.run import distill
from cctool.operations.train.teacher import Teacher
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.train.distill import PRESETS, DistillOptions, DistillPreset
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import RunOptions

DIGITS = DataOptions(data="digits", limit=64, batch_size=32)
STUDENT = {"num_classes": 10, "in_channels": 1}


def checkpoint(
    arch: str, seed: int = 0, shape: tuple[int, int, int] = (1, 32, 32), **arguments: Any
) -> Checkpoint:
    torch.manual_seed(seed)
    model = registry.build(arch, arguments)
    spec = ModelSpec(
        architecture=arch,
        arguments=arguments,
        input_shape=shape,
        preprocessing=Preprocessing(mean=(0.5,) * shape[0], std=(0.25,) * shape[0]),
    )
    return Checkpoint(model, spec)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save(checkpoint("lenet", seed=3), tmp_path / "teacher.pt", tables())
    return tmp_path / "teacher.pt"


def asked(tmp_path: Path, name: str = "student.pt", **changes: Any) -> pipeline.Request:
    base = pipeline.Request(
        verb="distill",
        source=None,
        output=str(tmp_path / name),
        model=ModelOptions(arch="lenet"),
        runtime=RuntimeOptions(device="cpu", deterministic=True),
    )
    return replace(base, **changes)


def distilled(teacher: Path, wanted: pipeline.Request, **changes: Any) -> pipeline.Product:
    options = DistillOptions(
        **{"teacher": str(teacher), "fit": FitOptions(epochs=1, lr=0.02), "data": DIGITS, **changes}
    )
    (product,) = pipeline.write(distill, options, wanted)
    return product


@pytest.fixture(autouse=True)
def _undo_determinism() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def weights(product: pipeline.Product) -> dict[str, torch.Tensor]:
    return load(product.path, tables()).model.state_dict()


def test_the_history_names_the_teacher(tmp_path: Path, teacher: Path) -> None:
    before = teacher.read_bytes()
    product = distilled(teacher, asked(tmp_path))
    assert teacher.read_bytes() == before
    found = product.step.others["teacher"]
    original = load(teacher, tables()).origin
    assert original is not None
    assert (found.path, found.content, found.file) == ("teacher.pt", original.content, original.file)
    assert product.step.options["temperature"] == 4.0


def test_the_teacher_is_never_touched(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Teacher] = []
    original = Teacher.__init__

    def remember(self: Teacher, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        made.append(self)

    monkeypatch.setattr(Teacher, "__init__", remember)
    save(checkpoint("mobilenet_student", 5, **STUDENT), tmp_path / "bn.pt", tables())
    before = load(tmp_path / "bn.pt", tables()).model.state_dict()
    distilled(tmp_path / "bn.pt", asked(tmp_path))
    (used,) = made
    assert not used.model.training
    assert all(
        not parameter.requires_grad and parameter.grad is None for parameter in used.model.parameters()
    )
    assert all(torch.equal(value, before[name]) for name, value in used.model.state_dict().items())


@pytest.mark.parametrize("change", [{"alpha": 0.2}, {"temperature": 1.0}])
def test_each_option_changes_the_student(tmp_path: Path, teacher: Path, change: dict[str, float]) -> None:
    plain = weights(distilled(teacher, asked(tmp_path)))
    other = weights(distilled(teacher, asked(tmp_path, "other.pt"), **change))
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_alpha_zero_is_training_on_labels(tmp_path: Path, teacher: Path) -> None:
    from cctool.operations.train import run as train
    from cctool.options.train.run import TrainOptions

    plain = weights(distilled(teacher, asked(tmp_path), alpha=0.0))
    options = TrainOptions(FitOptions(epochs=1, lr=0.02), DIGITS)
    (product,) = pipeline.write(train.run, options, replace(asked(tmp_path, "t.pt"), verb="train"))
    trained = weights(product)
    for name, value in plain.items():
        assert torch.allclose(value, trained[name], atol=1e-6), name


def test_the_student_moves_towards_the_teacher(tmp_path: Path, teacher: Path) -> None:
    product = distilled(
        teacher, asked(tmp_path), alpha=1.0, fit=FitOptions(epochs=12, optimizer="adam", lr=3e-3)
    )
    rows = product.report.rows
    assert rows[-1].train["distillation"] < 0.5 * rows[0].train["distillation"]


def test_a_checkpoint_can_be_the_student_and_be_resumed(tmp_path: Path, teacher: Path) -> None:
    save(checkpoint("lenet", seed=9), tmp_path / "in.pt", tables())
    source = {"source": str(tmp_path / "in.pt"), "model": ModelOptions(), "resumes": True}
    fit = FitOptions(epochs=2, lr=0.02)
    whole = distilled(teacher, asked(tmp_path, **source), fit=fit)
    halved = asked(tmp_path, "halved.pt", **source)
    stopping = DistillOptions(str(teacher), fit=fit, data=DIGITS, run=RunOptions(stop_after=1))
    (early,) = pipeline.write(distill, stopping, halved)
    assert early.file != whole.file
    resumed = distilled(teacher, halved, fit=fit, run=RunOptions(resume=True))
    assert resumed.file == whole.file
    save(checkpoint("lenet", seed=4), teacher, tables(), overwrite=True)
    with pytest.raises(TrainingError, match=r"teacher teacher\.pt is not the one"):
        distilled(teacher, halved, fit=fit, run=RunOptions(resume=True))
    with pytest.raises(TrainingError, match=r"alpha was 0\.9, now 0\.5"):
        distilled(teacher, halved, fit=fit, run=RunOptions(resume=True), alpha=0.5)


def test_a_foreign_teacher_with_its_own_input(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = registry.build("resnet20", {"num_classes": 10})
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    product = distilled(
        tmp_path / "foreign.pth",
        asked(tmp_path),
        teacher_model=ModelOptions(
            arch="resnet20",
            arguments=("num_classes=10",),
            input_shape=(3, 16, 16),
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
        ),
    )
    assert product.step.others["teacher"].content is None


def test_images_reach_the_teacher_in_its_own_preprocessing() -> None:
    seen: list[torch.Tensor] = []

    class Watching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.mean((2, 3))

    own = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    given = Preprocessing(mean=(0.6,), std=(0.3,))
    teacher = Teacher(Watching(), (3, 4, 4), own, given)
    pixels = np.random.default_rng(0).random((2, 1, 8, 8)).astype(np.float32)
    teacher(torch.from_numpy((pixels - 0.6) / 0.3))
    # Halving with antialiasing weighs four pixels a side by a triangle; a constant image tells the rest.
    (found,) = seen
    assert found.shape == (2, 3, 4, 4)
    plain = found * torch.tensor(own.std).view(1, 3, 1, 1) + torch.tensor(own.mean).view(1, 3, 1, 1)
    assert torch.allclose(plain[:, 0], plain[:, 2], atol=1e-5)
    assert np.allclose(plain.mean((1, 2, 3)).numpy(), pixels.mean((1, 2, 3)), atol=0.03)
    teacher(torch.full((1, 1, 8, 8), (0.8 - 0.6) / 0.3))
    expected = (0.8 - np.array(own.mean)) / np.array(own.std)
    assert np.allclose(seen[1][0, :, 0, 0].numpy(), expected, atol=1e-5)


def test_a_gray_teacher_of_unknown_preprocessing_teaches_a_network_of_colours(tmp_path: Path) -> None:
    torch.save(registry.build("lenet", {}).state_dict(), tmp_path / "gray.pth")
    wanted = asked(tmp_path, model=ModelOptions(arch="resnet20", input_shape=(3, 32, 32)))
    distilled(tmp_path / "gray.pth", wanted, teacher_model=ModelOptions(arch="lenet"))


def test_a_teacher_that_does_not_run_says_how_to_name_its_size(tmp_path: Path) -> None:
    torch.save(registry.build("vgg11", {"in_channels": 1}).state_dict(), tmp_path / "vgg.pth")
    named = ModelOptions(arch="vgg11", input_shape=(1, 8, 8), mean=(0.5,), std=(0.5,))
    with pytest.raises(TrainingError, match=r"vgg\.pth does not run .*--teacher-input"):
        distilled(tmp_path / "vgg.pth", asked(tmp_path), teacher_model=named)


def test_equal_preprocessing_passes_images_as_they_are() -> None:
    same = Preprocessing(mean=(0.5,), std=(0.5,))
    images = torch.randn(2, 1, 4, 4)
    assert torch.equal(Teacher(nn.Identity(), (1, 4, 4), same, same)(images), images)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    save(checkpoint("lenet", num_classes=7), tmp_path / "seven.pt", tables())
    with pytest.raises(TrainingError, match=r"tells 7 classes apart, the student 10"):
        distilled(tmp_path / "seven.pt", asked(tmp_path))


def test_the_presets_are_the_published_numbers() -> None:
    assert set(PRESETS) == set(DistillPreset)
    seed = PRESETS[DistillPreset.LHY_HW7]
    assert (seed["temperature"], seed["alpha"], seed["batch_size"], seed["lr"]) == (20.0, 0.5, 4, 1e-3)
    assert PRESETS[DistillPreset.DISTILLER_2018] == {"temperature": 1.0, "alpha": 0.5}


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        DistillOptions(teacher="t.pt", **wrong)


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives(tmp_path: Path, teacher: Path) -> None:
    """Training loss within 2 %."""
    losses = []
    for device in ("cpu", "cuda"):
        runtime = RuntimeOptions(device=device)
        product = distilled(teacher, asked(tmp_path, f"{device}.pt", runtime=runtime))
        losses.append(product.report.rows[-1].train["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
