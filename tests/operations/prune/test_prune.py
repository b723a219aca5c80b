"""`cctool prune` from options to files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cctool.base.errors import PruningError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.prune import run as prune
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.prune.choices import Images, PruneMethod, Scope, StepMode
from cctool.options.prune.options import PruneOptions, PrunePreset
from option_toys import asked

DIGITS = DataOptions(data="digits", limit=64, batch_size=32)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1}
    model = registry.build("mobilenet_student", arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1)
            nn.init.normal_(module.bias)
    spec = ModelSpec(
        architecture="mobilenet_student",
        arguments=arguments,
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    save(Checkpoint(model, spec), tmp_path / "student.pt", tables())
    return tmp_path / "student.pt"


def pruned(path: Path, name: str = "out.pt", seed: int = 0, **options: Any) -> Checkpoint:
    request = pipeline.Request(
        verb="prune",
        source=str(path),
        output=str(path.with_name(name)),
        runtime=RuntimeOptions(seed=seed, device="cpu"),
        force=True,
    )
    (product,) = pipeline.write(prune.run, PruneOptions(**options), request)
    return load(product.path, tables())


def widths(checkpoint: Checkpoint) -> list[int]:
    return [
        module.num_features for module in checkpoint.model.modules() if isinstance(module, nn.BatchNorm2d)
    ]


def parameters(checkpoint: Checkpoint) -> int:
    return sum(parameter.numel() for parameter in checkpoint.model.parameters())


def test_the_rate_counts_units(student: Path) -> None:
    dense = sum(widths(load(student, tables())))
    assert sum(widths(pruned(student, rate=0.25))) > sum(widths(pruned(student, rate=0.5)))
    assert parameters(pruned(student, rate=0.0)) == 256_234
    assert sum(widths(load(student, tables()))) == dense


@pytest.mark.parametrize("method", list(PruneMethod))
def test_every_method_prunes_and_records(student: Path, method: PruneMethod) -> None:
    checkpoint = pruned(student, method=method, rate=0.5, samples=16, data=DIGITS)
    step = checkpoint.history[-1]
    assert step.options["method"] == method.value
    assert step.before is not None
    assert step.after is not None
    assert step.after.parameters == parameters(checkpoint) < step.before.parameters
    assert step.after.macs is not None
    assert step.before.macs is not None
    assert step.after.macs < step.before.macs
    assert checkpoint.model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_scope_exclude_only_and_rounding_change_the_widths(student: Path) -> None:
    base = widths(pruned(student, rate=0.5))
    assert widths(pruned(student, rate=0.5, scope=Scope.LOCAL)) != base
    assert widths(pruned(student, rate=0.5, exclude=("cnn.5.*",)))[5] == 256
    only = widths(pruned(student, rate=0.5, only=("cnn.5.1",)))
    assert sum(a != b for a, b in zip(only, widths(load(student, tables())), strict=True)) == 1
    assert all(width % 8 == 0 for width in widths(pruned(student, rate=0.5, round_to=8)))
    assert any(width % 8 for width in base)


def test_the_seed_decides_what_random_removes(student: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        checkpoint = pruned(student, seed=seed, method=PruneMethod.RANDOM, rate=0.5)
        return next(iter(checkpoint.model.parameters())).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_pattern_that_matches_nothing_is_refused(student: Path) -> None:
    with pytest.raises(UsageError, match="nothing"):
        pruned(student, exclude=("nothing.*",))


def test_steps_write_a_file_each_and_modes_differ(student: Path) -> None:
    def sizes(mode: StepMode) -> list[int]:
        request = pipeline.Request("prune", str(student), str(student.with_name(f"{mode.value}.pt")))
        options = PruneOptions(steps=3, step_mode=mode, rate=0.6, method=PruneMethod.L2)
        before = student.read_bytes()
        products = list(pipeline.write(prune.run, options, request))
        assert student.read_bytes() == before
        assert [Path(p.path).name for p in products] == [f"{mode.value}.step{i}.pt" for i in (1, 2, 3)]
        assert [p.step.notes[0] for p in products] == [f"step {i} of 3" for i in (1, 2, 3)]
        return [parameters(load(p.path, tables())) for p in products]

    independent, progressive = sizes(StepMode.INDEPENDENT), sizes(StepMode.PROGRESSIVE)
    assert independent[0] > independent[1] > independent[2]
    assert progressive[0] > progressive[1] > progressive[2]
    assert abs(independent[2] - progressive[2]) < 0.05 * independent[2]


def test_the_homework_preset_gives_its_published_counts(tmp_path: Path) -> None:
    arguments = {"num_classes": 11}
    spec = ModelSpec(architecture="mobilenet_student", arguments=arguments, input_shape=(3, 64, 64))
    save(Checkpoint(registry.build("mobilenet_student", arguments), spec), tmp_path / "s.pt", tables())
    options = asked(PruneOptions, PrunePreset.LHY_HW7, finetune_epochs=0)
    products = list(pipeline.write(prune.run, options, pipeline.Request("prune", str(tmp_path / "s.pt"))))
    counts = [parameters(load(product.path, tables())) for product in products]
    assert counts == [236_066, 217_850, 200_354, 185_091, 171_606]


def test_fine_tuning_moves_the_weights_and_measures(student: Path) -> None:
    still = pruned(student, "still.pt", rate=0.5)
    moved = pruned(student, "moved.pt", rate=0.5, finetune_epochs=1, data=DIGITS)
    pairs = zip(still.model.parameters(), moved.model.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    step = moved.history[-1]
    assert [(m.split, m.n) for m in step.metrics_after] == [("validation", 64), ("test", 64)]
    assert [(m.split, m.n) for m in step.metrics_before] == [("validation", 64), ("test", 64)]
    faster = pruned(student, "faster.pt", rate=0.5, finetune_epochs=1, data=DIGITS, lr=0.05)
    adam = pruned(student, "adam.pt", rate=0.5, finetune_epochs=1, data=DIGITS, optimizer="adam")
    results = [torch.cat([p.flatten() for p in c.model.parameters()]) for c in (moved, faster, adam)]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_recalibration_changes_statistics_alone(student: Path) -> None:
    still = pruned(student, "still.pt", rate=0.5)
    again = pruned(student, "again.pt", rate=0.5, recalibrate=64, data=DIGITS)
    for (name, a), b in zip(still.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b) != name.endswith(("running_mean", "running_var", "num_batches_tracked")), (
            name
        )


def test_recalibration_may_look_at_varied_images(student: Path) -> None:
    found = {}
    for images in (None, Images.PLAIN, Images.AUGMENTED):
        options = {"rate": 0.5, "recalibrate": 64, "recalibrate_images": images, "data": DIGITS}
        found[images] = pruned(student, **options).model.state_dict()["cnn.0.1.running_mean"]
    assert torch.equal(found[None], found[Images.PLAIN])
    assert not torch.equal(found[Images.PLAIN], found[Images.AUGMENTED])


def test_recalibration_needs_the_preprocessing(student: Path) -> None:
    checkpoint = load(student, tables())
    spec = checkpoint.spec.model_copy(update={"preprocessing": None})
    save(Checkpoint(checkpoint.model, spec), student, tables(), overwrite=True)
    with pytest.raises(UsageError, match="--mean"):
        pruned(student, recalibrate=8, data=DIGITS)


def test_training_without_data_says_what_to_do(student: Path) -> None:
    with pytest.raises(UsageError, match="--data"):
        pruned(student, finetune_epochs=1)


def test_stored_integers_are_cut_and_not_rounded_again(student: Path) -> None:
    dense = load(student, tables())
    encode = tables().encodings["affine-u8"].encode
    stored = {
        name: encode(tensor, {}) for name, tensor in dense.model.state_dict().items() if tensor.dim() > 1
    }
    state = dense.model.state_dict()
    for name, encoded in stored.items():
        state[name].copy_(tables().encodings["affine-u8"].decode(encoded))
    save(Checkpoint(dense.model, dense.spec, stored=stored), student.with_name("u8.pt"), tables())
    small = pruned(student.with_name("u8.pt"), "small.pt", rate=0.5)
    assert small.stored.keys() == stored.keys()
    name = "cnn.5.3.weight"
    values = {tuple(part.shape) for part in small.stored[name].parts.values()}
    assert tuple(small.model.state_dict()[name].shape) in values
    before, after = stored[name].parts, small.stored[name].parts
    assert all(torch.equal(before[key], after[key]) for key in before if before[key].dim() == 0)
    tuned = pruned(student.with_name("u8.pt"), "tuned.pt", rate=0.5, finetune_epochs=1, data=DIGITS)
    assert not tuned.stored
    kept = pruned(
        student.with_name("u8.pt"), "kept.pt", rate=0.5, finetune_epochs=1, data=DIGITS, keep_storage=True
    )
    assert kept.stored.keys() == stored.keys()
    assert not torch.equal(kept.model.state_dict()[name], small.model.state_dict()[name])


def test_a_plan_writes_nothing_and_agrees_with_the_cut(student: Path) -> None:
    request = pipeline.Request("prune", str(student))
    (report,) = pipeline.read(prune.plan, PruneOptions(rate=0.5), request)
    assert sorted(path.name for path in student.parent.iterdir()) == ["student.pt"]
    assert report.cut.parameters_after == report.after.parameters == parameters(pruned(student, rate=0.5))


def test_a_network_without_removable_channels_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def flat(num_classes=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
    )
    arch = f"{tmp_path / 'net.py'}:flat"
    spec = ModelSpec(architecture=arch, arguments={}, input_shape=(3, 2, 2))
    registries = tables({arch})
    save(Checkpoint(registries.build(arch, {}), spec), tmp_path / "a.pt", registries)
    request = pipeline.Request("prune", str(tmp_path / "a.pt"), model=ModelOptions(arch=arch))
    with pytest.raises(PruningError):
        list(pipeline.write(prune.run, PruneOptions(method=PruneMethod.L2), request))


def test_a_second_cut_keeps_what_the_first_recorded(student: Path) -> None:
    first = pruned(student, "first.pt", rate=0.5, method=PruneMethod.L1)
    # Slimming cuts the inputs of the last convolution, whose outputs and bias only the first cut touched.
    second = pruned(student.with_name("first.pt"), "second.pt", rate=0.5, method=PruneMethod.SLIMMING)
    last = [checkpoint.model.state_dict()["cnn.7.3.weight"].shape for checkpoint in (first, second)]
    assert last[0][0] == last[1][0] < 256
    assert last[0][1] > last[1][1]
    third = pruned(
        student.with_name("second.pt"), "third.pt", only=("cnn.4.1",), rate=0.3, method=PruneMethod.L1
    )
    assert parameters(third) < parameters(second)
