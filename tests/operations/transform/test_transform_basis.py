"""`cctool transform --mode basis` and `cctool train --swap`, from options to files."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cctool.base.errors import TransformError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.mask import add_masks, masks_of, with_masks
from cctool.checkpoint.edits.thin import thin_edits
from cctool.checkpoint.spec import ModelSpec
from cctool.cli.main import app
from cctool.models.registry import build
from cctool.operations.registries import tables
from cctool.operations.train.resume import starts_afresh
from cctool.operations.transform import run as transform
from cctool.operations.transform.basis import TransformBasisReport
from cctool.options.train.fit import OPTIMIZER_DEFAULTS, FitOptions, OptimizerName
from cctool.options.train.run import TrainOptions, parse_swap
from cctool.options.transform.choices import Axes, Mode, Select, TransformPreset
from cctool.options.transform.options import TransformOptions, WeightOptions
from cctool.quantization.encodings.uint8 import AFFINE_U8
from cctool.transforms.basis.complex import ComplexBasisConv2d, ComplexBasisLinear, ComplexBatchNorm
from cctool.transforms.basis.linear import BasisLayer, BasisLinear
from cctool.transforms.layers.base import with_swaps
from cctool.transforms.layers.coefficients import CoefficientConv2d
from option_toys import asked
from procedure_toys import Listening, context, plain_checkpoint

QUICK = ("--data", "digits", "--limit", "64", "--batch-size", "32", "--quiet", "--device", "cpu")


def run(*arguments: object, fails: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    if fails is None:
        assert result.exit_code == 0, result.output
    else:
        assert result.exit_code in (1, 2)
        assert fails in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    return result.stdout


def changed(checkpoint: Checkpoint, kernel: str = "dct", **weights: Any) -> Checkpoint:
    asked = TransformOptions(kernel=kernel, weights=WeightOptions(mode=Mode.BASIS, **weights))
    (outcome,) = transform.run(checkpoint, asked, context())
    assert isinstance(outcome.report, TransformBasisReport)
    return outcome.checkpoint


def logits(model: nn.Module, shape: tuple[int, int, int] = (1, 32, 32)) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    return found


@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
def test_a_file_gives_the_same_network_again(tmp_path: Path, kernel: str) -> None:
    trained, written = tmp_path / "a.pt", tmp_path / "b.safetensors"
    run("train", "--arch", "resnet20", "--arg", "base=4", "--epochs", "0", "-o", trained, *QUICK)
    run("transform", trained, "--mode", "basis", "--kernel", kernel, "-o", written, *QUICK)
    first, second = load(written, tables()), load(written, tables())
    torch.testing.assert_close(logits(first.model), logits(second.model))
    swapped = [module for module in first.model.modules() if isinstance(module, BasisLayer)]
    assert len(swapped) == 22
    assert any(isinstance(layer, ComplexBasisConv2d) for layer in swapped) == (kernel == "dft")
    run("train", written, "--epochs", "1", "-o", tmp_path / "c.pt", *QUICK)
    again = load(tmp_path / "c.pt", tables())
    assert not torch.equal(logits(again.model), logits(first.model))
    kinds = {type(module) for module in again.model.modules()}
    assert (ComplexBatchNorm in kinds) == (kernel == "dft")
    # Buffers of batch norm were trained along with the weights.
    assert again.spec.edits == first.spec.edits


def test_training_from_scratch_swaps_layers(tmp_path: Path) -> None:
    output = tmp_path / "l.pt"
    arguments = ("train", "--arch", "lenet", "--swap", "basis:dct:linear", "--swap", "basis:dst:features.3")
    run(*arguments, "--epochs", "2", "--stop-after", "1", "-o", output, *QUICK)
    begun = load(output, tables())
    assert isinstance(begun.model.get_submodule("classifier.0"), BasisLinear)
    assert begun.model.get_submodule("features.3").arguments.kernel == "dst"
    assert type(begun.model.get_submodule("features.0")) is nn.Conv2d
    assert begun.history[0].options["swap"] == ["basis:dct:linear", "basis:dst:features.3"]
    run("train", "--arch", "lenet", "--resume", "--epochs", "2", "-o", output, *QUICK)
    resumed = load(output, tables())
    run(*arguments, "--epochs", "2", "-o", tmp_path / "whole.pt", *QUICK)
    whole = load(tmp_path / "whole.pt", tables())
    torch.testing.assert_close(logits(resumed.model), logits(whole.model))
    offsets = resumed.model.get_submodule("classifier.0").frequency_offsets
    assert float(offsets.detach().abs().max()) > 0


def test_coefficients_from_scratch(tmp_path: Path) -> None:
    output = tmp_path / "l.pt"
    run("train", "--arch", "lenet", "--swap", "coefficient:dwt:conv", "--epochs", "1", "-o", output, *QUICK)
    layer = load(output, tables()).model.get_submodule("features.0")
    assert isinstance(layer, CoefficientConv2d)
    assert layer.arguments.axes[0].kernel == "dwt"


def test_what_swaps_refuse(tmp_path: Path) -> None:
    for text in ("basis", "basis:dct", "basis:dct:", "basis::linear", "spline:dct:linear", ""):
        with pytest.raises(UsageError, match="MODE:KERNEL:LAYERS"):
            parse_swap(text)
    with pytest.raises(UsageError, match="MODE:KERNEL:LAYERS"):
        TrainOptions(swap=("basis",))
    fresh = ("train", "--arch", "lenet", "-o", tmp_path / "x.pt", *QUICK, "--epochs", "1")
    run(*fresh, "--swap", "basis:haar:linear", fails="--swap haar: basis functions are dct, dst, dft")
    run(*fresh, "--swap", "basis:dct:nothing", fails="--layers nothing")
    run("train", "--arch", "lenet", "--epochs", "0", "-o", tmp_path / "p.pt", *QUICK)
    again = ("train", tmp_path / "p.pt", "--swap", "basis:dct:all", "--epochs", "1")
    run(*again, *QUICK, fails="--swap is for fresh networks")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"axes": Axes.BOTH},
        {"block": 8},
        {"levels": 2},
        {"select": Select.CORNER},
        {"keep": 0.5},
        {"threshold": 0.1},
    ],
)
def test_options_of_coefficients_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="coefficient"):
        WeightOptions(mode=Mode.BASIS, **given)
    with pytest.raises(UsageError, match="basis"):
        WeightOptions(mode=Mode.COEFFICIENT, normalize_gradients=True)


def test_the_preset_of_the_thesis() -> None:
    options = asked(TransformOptions, TransformPreset.THESIS_BASIS, kernel="dst")
    assert options.weights.mode is Mode.BASIS
    assert options.weights.normalize_gradients
    (outcome,) = transform.run(plain_checkpoint(), options, context())
    layer = outcome.checkpoint.model[8]
    assert layer.arguments.normalize_gradients
    assert layer.arguments.kernel == "dst"


def test_what_belonged_to_the_weights_is_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("lenet", {})
    spec = ModelSpec(architecture="lenet", input_shape=(1, 32, 32))
    masks = {"features.0.weight": model.features[0].weight.detach().abs() > 0.1}
    masks["features.3.weight"] = model.features[3].weight.detach().abs() > 0.1
    add_masks(model, masks)
    stored = {}
    for name in ("classifier.0.weight", "features.6.weight"):
        stored[name] = AFFINE_U8.encode(model.state_dict()[name], {"axis": None})
        model.state_dict()[name].copy_(AFFINE_U8.decode(stored[name]))
    checkpoint = Checkpoint(model, with_masks(spec, model), stored=stored)
    product = changed(checkpoint, layers=("linear", "features.3"))
    assert isinstance(product.model.get_submodule("classifier.0"), BasisLinear)
    # A masked layer is left alone, and keeps its mask, which is stored as its file will hold it.
    assert set(product.stored) == {"features.6.weight", "features.3.weight", "features.3.weight_mask"}
    assert set(masks_of(product.model)) == {"features.0.weight", "features.3.weight"}
    save(product, tmp_path / "m.pt", tables())
    torch.testing.assert_close(logits(load(tmp_path / "m.pt", tables()).model), logits(product.model))


def test_layers_whose_channels_were_cut_load_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("lenet", {})
    checkpoint = Checkpoint(model, ModelSpec(architecture="lenet", input_shape=(1, 32, 32)))
    product = changed(checkpoint, layers=("all",))
    whole = product.model.get_submodule("features.3")
    keep = torch.tensor([0, 2, 3, 7, 11])

    class Cut:
        def __init__(self, dim: int, size: int) -> None:
            self.dim, self.size, self.keep = dim, size, keep

    narrow = whole.taken({"weight": [Cut(0, 16)], "bias": [Cut(0, 16)]})
    reading = product.model.get_submodule("features.6").taken({"weight": [Cut(1, 16)]})
    for layer, name in ((narrow, "3"), (reading, "6")):
        layer.train(False)
        product.model.features._modules[name] = layer
    plain = build("lenet", {})
    plain.features._modules["3"], plain.features._modules["6"] = narrow.plain(), reading.plain()
    widths = [("features.3", "out_channels"), ("features.6", "in_channels")]
    thin = thin_edits(plain, ["features.3.weight", "features.3.bias", "features.6.weight"], widths)
    cut = replace(product, spec=with_swaps(product.spec.with_edits(thin), product.model))
    save(cut, tmp_path / "cut.pt", tables())
    again = load(tmp_path / "cut.pt", tables())
    torch.testing.assert_close(logits(again.model), logits(product.model))
    torch.testing.assert_close(again.model.get_submodule("features.3").weight, whole.weight[keep])


def test_the_report_counts_and_the_weights_are_said_to_be_gone() -> None:
    torch.manual_seed(0)
    checkpoint = Checkpoint(build("lenet", {}), ModelSpec(architecture="lenet", input_shape=(1, 32, 32)))
    asked = TransformOptions(kernel="dft", weights=WeightOptions(mode=Mode.BASIS, layers=("linear",)))
    where = context()
    (outcome,) = transform.run(checkpoint, asked, where)
    report = outcome.report
    assert (report.parameters_before, report.parameters_after) == (61_706, 50_974)
    assert report.bytes_after == 4 * 50_974
    assert [(layer.name, layer.parameters_before, layer.parameters_after) for layer in report.layers] == [
        ("classifier.0", 120 * 84 + 84, 3 * 84),
        ("classifier.2", 84 * 10 + 10, 30),
    ]
    assert report.layers[0].layer == ComplexBasisLinear.__name__
    assert report.complex_modules == ("classifier.1",)
    assert any("needs training" in text for text in where.reporter.said)
    assert isinstance(where.reporter, Listening)
    ((_, columns, rows),) = report.tables()
    assert all(len(row) == len(columns) for row in rows)


def test_kernels_without_basis_functions_are_refused() -> None:
    with pytest.raises(UsageError, match="--kernel haar: basis functions are dct, dst, dft"):
        changed(plain_checkpoint(), "haar")
    lonely = Checkpoint(nn.Sequential(nn.ConvTranspose2d(1, 2, 3)), plain_checkpoint().spec)
    with pytest.raises(TransformError, match="nothing is left to replace"):
        changed(lonely)


def test_taps_and_complex_numbers_exclude_each_other() -> None:
    checkpoint = plain_checkpoint()
    spec = checkpoint.spec.model_copy(update={"edits": ({"kind": "tap", "module": "2"},)})
    with pytest.raises(TransformError, match="complex numbers"):
        changed(replace(checkpoint, spec=spec), "dft")


def test_fresh_basis_functions_start_at_the_rate_of_fresh_networks(tmp_path: Path) -> None:
    trained, basis = tmp_path / "a.pt", tmp_path / "b.pt"
    run("train", "--arch", "lenet", "--epochs", "1", "-o", trained, *QUICK)
    run("transform", trained, "--mode", "basis", "-o", basis, *QUICK)
    run("train", basis, "--epochs", "1", "-o", tmp_path / "c.pt", *QUICK)
    files = [load(path, tables()).history for path in (trained, basis, tmp_path / "c.pt")]
    assert [starts_afresh(history) for history in files] == [False, True, False]
    with (tmp_path / "c.run" / "metrics.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    # The second of two steps, half way down the cosine.
    assert float(row["learning_rate"]) == pytest.approx(0.5 * OPTIMIZER_DEFAULTS[OptimizerName.ADAMW][0])


def train_digits(kernel: str, layers: str, epochs: int, folder: Path, *more: object) -> float:
    """Test accuracy in percent."""
    swap = f"basis:{kernel}:{layers}"
    output = folder / f"{kernel}-{layers}.pt"
    arguments = ("train", "--arch", "lenet", "--swap", swap, "--epochs", epochs, "-o", output)
    run(*arguments, "--data", "digits", "--quiet", "--device", "cpu", *more)
    after = {metrics.split: metrics for metrics in load(output, tables()).history[-1].metrics_after}
    assert after["test"].n == 360
    return after["test"].values["top1"]


def test_a_network_of_dct_functions_alone_reads_digits(tmp_path: Path) -> None:
    assert train_digits("dct", "all", 10, tmp_path, "--batch-size", 64) > 90


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["dct", "dst", "dft"])
@pytest.mark.parametrize("layers", ["linear", "conv", "all"])
def test_every_kernel_reads_digits(kernel: str, layers: str, tmp_path: Path) -> None:
    assert train_digits(kernel, layers, FitOptions.epochs, tmp_path) > 93


def test_normalised_gradients_change_the_course_of_training(tmp_path: Path) -> None:
    fresh = tmp_path / "f.pt"
    run("train", "--arch", "lenet", "--epochs", "0", "-o", fresh, *QUICK)
    losses = []
    for name, more in (
        ("plain", ()),
        ("normal", ("--normalize-gradients",)),
        ("preset", ("--preset", "thesis-basis")),
    ):
        changed_file = tmp_path / f"{name}.pt"
        run("transform", fresh, "--mode", "basis", *more, "-o", changed_file, *QUICK)
        trained = tmp_path / f"{name}.t.pt"
        sgd = ("--optimizer", "sgd", "--lr", "0.01", "--epochs", "1")
        run("train", changed_file, *sgd, "-o", trained, *QUICK)
        (metrics,) = (m for m in load(trained, tables()).history[-1].metrics_after if m.split == "validation")
        losses.append(metrics.values["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]
