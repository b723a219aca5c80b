"""`cctool transform --target weights` from options to files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typer.testing import CliRunner

import cctool
from cctool.base.errors import TransformError, UsageError
from cctool.base.runtime import Silent
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.edits.mask import add_masks, masks_of, with_masks
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.cli.main import app
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.context import Context, Outcome
from cctool.operations.quantize import run as quantize
from cctool.operations.registries import tables
from cctool.operations.train import run as train
from cctool.operations.transform import run as transform
from cctool.operations.transform.weights_report import TransformWeightsReport
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.prune.choices import Scope
from cctool.options.quantize.choices import QuantizeMethod
from cctool.options.quantize.options import QuantizeOptions
from cctool.options.train.fit import FitOptions
from cctool.options.train.run import TrainOptions
from cctool.options.transform.choices import Axes, Select, TransformTarget
from cctool.options.transform.options import FeatureOptions, TransformOptions, WeightOptions
from cctool.transforms.codec.taps import stale_taps, taps_of
from cctool.transforms.layers.coefficients import CoefficientLayer, CoefficientLinear

CPU = RuntimeOptions(device="cpu")


def network(name: str = "lenet", size: int = 32, channels: int = 1, **arguments: Any) -> Checkpoint:
    torch.manual_seed(0)
    if ":" not in name:
        arguments |= {"num_classes": 10, "in_channels": channels}
    model = registry.build(name, arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    spec = ModelSpec(
        architecture=name,
        arguments=arguments,
        input_shape=(channels, size, size),
        preprocessing=Preprocessing(mean=(0.5,) * channels, std=(0.5,) * channels),
    )
    return Checkpoint(model.eval(), spec)


def written(path: Path, options: TransformOptions, **request: Any) -> pipeline.Product:
    given = {
        "verb": "transform",
        "source": str(path),
        "output": str(path.with_name("out.pt")),
        "runtime": CPU,
        "force": True,
    }
    (product,) = pipeline.write(transform.run, options, pipeline.Request(**(given | request)))
    return product


def run(path: Path, kernel: str = "dct", **weights: Any) -> tuple[Checkpoint, TransformWeightsReport]:
    product = written(path, TransformOptions(kernel=kernel, weights=WeightOptions(**weights)))
    assert isinstance(product.report, TransformWeightsReport)
    return load(product.path, tables()), product.report


def logits(checkpoint: Checkpoint) -> Tensor:
    shape = checkpoint.spec.input_shape
    x = torch.linspace(-1, 1, 2 * math.prod(shape)).reshape(2, *shape)
    with torch.no_grad():
        result: Tensor = checkpoint.model.eval()(x.sin())
    return result


@pytest.fixture
def lenet(tmp_path: Path) -> Path:
    save(network(), tmp_path / "source.pt", tables())
    return tmp_path / "source.pt"


KERNELS = ["dct", "dst", "dft", "dwt", "db2", "sym5", "coif1", "bior2.2", "rbio3.1", "klt", "identity"]
LARGE = ["alexnet", "torchvision:resnet18", "torchvision:mobilenet_v2"]


def relative_change(checkpoint: Checkpoint, folder: Path, kernel: str, **weights: Any) -> float:
    """How far the logits move, against the largest of them."""
    before = logits(checkpoint)
    options = TransformOptions(kernel=kernel, weights=WeightOptions(**weights))
    (outcome,) = transform.run(checkpoint, options, context(folder))
    assert all(layer.kept == layer.places for layer in outcome.report.layers)
    replaced = [outcome.checkpoint.model.get_submodule(layer.name) for layer in outcome.report.layers]
    assert all(isinstance(layer, CoefficientLayer) for layer in replaced)
    return float((logits(outcome.checkpoint) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_coefficients_lose_nothing(kernel: str, tmp_path: Path) -> None:
    assert relative_change(network(), tmp_path, kernel) < 1e-4


@pytest.mark.parametrize(("name", "kernel"), [(LARGE[1], "dct"), (LARGE[2], "dft")])
def test_all_coefficients_of_large_networks_lose_nothing(name: str, kernel: str, tmp_path: Path) -> None:
    assert relative_change(network(name, channels=3, num_classes=10), tmp_path, kernel) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_axes_of_large_networks_lose_nothing(name: str, kernel: str, tmp_path: Path) -> None:
    arguments = {} if name == "alexnet" else {"num_classes": 10}
    # Eigenvectors of 4096 channels take a minute.
    block = 256 if kernel == "klt" else None
    checkpoint = network(name, channels=3, **arguments)
    assert relative_change(checkpoint, tmp_path, kernel, axes=Axes.BOTH, block=block) < 1e-4


def test_a_quarter_of_the_linear_coefficients_is_what_the_file_holds(lenet: Path) -> None:
    _, whole = run(lenet, layers=("linear",))
    size = (lenet.with_name("out.pt")).stat().st_size
    coded, report = run(lenet, layers=("linear",), keep=0.25)
    smaller = (lenet.with_name("out.pt")).stat().st_size
    assert [layer.name for layer in report.layers] == ["classifier.0", "classifier.2"]
    for layer in report.layers:
        assert layer.kept == layer.places // 4
        mask = masks_of(coded.model)[f"{layer.name}.coefficients"]
        assert int(mask.sum()) == layer.kept
        # Values, and a bit for each place.
        assert layer.bytes_after == layer.kept * 4 + -(-layer.places // 8)
    saved = whole.bytes_after - report.bytes_after
    assert saved == sum(layer.bytes_before - layer.bytes_after for layer in report.layers)
    assert size - smaller > 0.9 * saved


def test_a_corner_is_a_smaller_tensor_without_a_mask(lenet: Path) -> None:
    coded, report = run(lenet, layers=("fc",), keep=0.25, select=Select.CORNER)
    assert masks_of(coded.model) == {}
    layer = coded.model.get_submodule("classifier.0")
    assert isinstance(layer, CoefficientLinear)
    assert layer.coefficients.shape == (42, 60)
    assert report.layers[0].bytes_after == 42 * 60 * 4
    assert layer.weight.shape == (84, 120)
    assert report.layers[0].relative_error is not None
    assert 0.5 < report.layers[0].relative_error < 1


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kernel": "dct"}, {"kernel": "dst"}),
    ({"layers": ("linear",)}, {"layers": ("conv",)}),
    ({"layers": ("features.*",)}, {"layers": ("features.0", "classifier.2")}),
    ({"axes": None}, {"axes": Axes.CHANNEL}),
    ({"axes": Axes.SPATIAL}, {"axes": Axes.BOTH}),
    ({"keep": 0.3}, {"keep": 0.2}),
    ({"keep": 0.3}, {"keep": 0.3, "scope": Scope.GLOBAL}),
    ({"keep": 0.3}, {"keep": 0.3, "select": Select.CORNER}),
    ({"threshold": 0.02}, {"threshold": 0.04}),
    ({}, {"block": 16}),
    ({"kernel": "db2"}, {"kernel": "db2", "levels": 1}),
]


@pytest.mark.parametrize(("one", "other"), OPTIONS)
def test_every_option_changes_something(one: dict[str, Any], other: dict[str, Any], lenet: Path) -> None:
    states = [run(lenet, **options)[0].model.state_dict() for options in (one, other)]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    assert shapes[0] != shapes[1] or any(
        not torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_wrong_options_are_refused_with_what_is_allowed(lenet: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kernel": "cosine"}, "dct, dst, dft"),
        ({"layers": ("head",)}, "no linear layer or convolution is called so; features.0 is one"),
        ({"levels": 2}, "--levels 2: dct has none"),
        ({"select": Select.CORNER}, "--keep says how large"),
        ({"scope": Scope.GLOBAL}, "--keep says what layers compete for"),
        ({"select": Select.CORNER, "threshold": 1.0}, "--select corner takes --keep"),
        ({"kernel": "identity", "keep": 0.5, "select": Select.CORNER}, "identity has no frequencies"),
    ]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            run(lenet, **options)


class Odd(nn.Module):
    """Layers of every kind that cannot be transformed, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.bound = nn.Linear(4, 4)
        self.masked = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.single = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.up(self.single(x)))).mean((2, 3))
        result: Tensor = self.again(self.shared(self.masked(self.bound(self.two(self.one(x))))))
        return result


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def context(folder: Path) -> Context:
    return Context(
        device=torch.device("cpu"),
        runtime=CPU,
        model_options=ModelOptions(),
        tables=tables(),
        user_code=frozenset(),
        reporter=Silent(),
        output=folder / "out.pt",
        force=False,
        stamp=lambda outcome: outcome.checkpoint,
    )


def transformed(checkpoint: Checkpoint, folder: Path, **weights: Any) -> Outcome:
    options = TransformOptions(weights=WeightOptions(**weights))
    (outcome,) = transform.run(checkpoint, options, context(folder))
    return outcome


def test_layers_that_cannot_be_transformed_are_named_with_the_reason(tmp_path: Path) -> None:
    model = Odd().eval()
    parametrize.register_parametrization(model.bound, "weight", Double())
    add_masks(model, {"masked.weight": torch.rand(4, 4) > 0.5})
    spec = ModelSpec(architecture="odd", input_shape=(1, 5, 5))
    before = logits(Checkpoint(model, spec))
    outcome = transformed(Checkpoint(model, with_masks(spec, model)), tmp_path)
    reasons = {item.name: item.reason for item in outcome.report.skipped}
    assert set(reasons) == {"up", "single", "one", "two", "bound", "masked"}
    assert "ConvTranspose2d" in reasons["up"]
    assert "size 1" in reasons["single"]
    assert reasons["one"] == "its weight is tied: one and two share it"
    assert "parametrized" in reasons["bound"]
    assert "mask" in reasons["masked"]
    assert [layer.name for layer in outcome.report.layers] == ["depthwise", "shared"]
    assert model.shared is model.again
    torch.testing.assert_close(logits(outcome.checkpoint), before)
    assert any("ConvTranspose2d" in note for note in outcome.notes)
    with pytest.raises(TransformError, match=r"nothing is left to transform: left alone: single"):
        transformed(Checkpoint(Odd(), spec), tmp_path, layers=("single",))


def test_masked_coefficients_stay_zero_through_training(lenet: Path) -> None:
    path = lenet
    _, report = run(path, keep=0.25, layers=("linear", "features.3"))
    request = pipeline.Request(
        verb="train",
        source=str(path.with_name("out.pt")),
        output=str(path.with_name("trained.pt")),
        runtime=CPU,
    )
    data = DataOptions(data="digits", limit=64, batch_size=32)
    (product,) = pipeline.write(train.run, TrainOptions(fit=FitOptions(epochs=1), data=data), request)
    before, after = load(path.with_name("out.pt"), tables()), load(product.path, tables())
    masks = masks_of(after.model)
    assert [name.removesuffix(".coefficients") for name in masks] == [
        "features.3", "classifier.0", "classifier.2"
    ]  # fmt: skip
    for name, mask in masks.items():
        values, earlier = after.model.get_parameter(name), before.model.get_parameter(name)
        assert not values[~mask].any()
        assert (values[mask] != earlier[mask]).float().mean() > 0.9
    assert {layer.name for layer in report.layers} == {n.removesuffix(".coefficients") for n in masks}


@pytest.mark.parametrize(
    "method",
    [
        QuantizeMethod.FP16,
        QuantizeMethod.BF16,
        QuantizeMethod.UINT8,
        QuantizeMethod.INT6,
        QuantizeMethod.CODEBOOK,
        QuantizeMethod.APOT,
    ],
)
@pytest.mark.parametrize("keep", [None, 0.25])
def test_coefficients_are_quantized(method: QuantizeMethod, keep: float | None, lenet: Path) -> None:
    run(lenet, keep=keep)
    coded = lenet.with_name("out.pt")
    request = pipeline.Request(
        verb="quantize", source=str(coded), output=str(coded.with_name("small.pt")), runtime=CPU
    )
    (product,) = pipeline.write(quantize.run, QuantizeOptions(method=method), request)
    names = {tensor.name for tensor in product.report.tensors}
    assert {"features.3.coefficients", "classifier.0.coefficients"} <= names
    loaded, before = load(product.path, tables()), load(coded, tables())
    scale = logits(before).abs().max()
    assert float((logits(loaded) - logits(before)).abs().max() / scale) < 0.1
    assert Path(product.path).stat().st_size < 0.7 * coded.stat().st_size
    for name, mask in masks_of(loaded.model).items():
        assert not loaded.model.get_parameter(name)[~mask].any()


def test_what_a_quantized_weight_decodes_to_is_transformed(lenet: Path) -> None:
    small = lenet.with_name("small.pt")
    request = pipeline.Request(verb="quantize", source=str(lenet), output=str(small), runtime=CPU)
    list(pipeline.write(quantize.run, QuantizeOptions(), request))
    before = load(small, tables())
    coded, report = run(small, layers=("linear",))
    torch.testing.assert_close(logits(coded), logits(before), atol=1e-5, rtol=1e-4)
    assert any("2 weights were stored as affine-u8" in note for note in report.notes)
    assert "classifier.0.weight" not in coded.stored
    assert "features.0.weight" in coded.stored
    assert report.layers[0].bytes_before < report.layers[0].bytes_after


def test_transforming_again_starts_from_the_weight(lenet: Path) -> None:
    before = logits(load(lenet, tables()))
    run(lenet, "dct", layers=("all",))
    coded = lenet.with_name("out.pt").rename(lenet.with_name("first.pt"))
    again, report = run(coded, "db2", layers=("linear",))
    torch.testing.assert_close(logits(again), before, atol=1e-5, rtol=1e-4)
    kernels = {
        name: module.arguments.axes[0].kernel
        for name, module in again.model.named_modules()
        if isinstance(module, CoefficientLayer)
    }
    assert kernels == dict.fromkeys(("features.0", "features.3", "features.6"), "dct") | dict.fromkeys(
        ("classifier.0", "classifier.2"), "db2"
    )
    assert any("transformed already" in note for note in report.notes)
    whole, _ = run(coded, "dct", keep=0.5)
    assert len(masks_of(whole.model)) == 5
    whole, _ = run(lenet.with_name("out.pt").rename(lenet.with_name("second.pt")), "dct")
    assert masks_of(whole.model) == {}


def test_a_codec_behind_a_layer_stays_and_is_calibrated_again(lenet: Path) -> None:
    data = DataOptions(data="digits", limit=32)
    coded = FeatureOptions(taps=("features.3",), calibration=16)
    options = TransformOptions(target=TransformTarget.FEATURES, features=coded, data=data)
    tapped = lenet.with_name("tapped.pt")
    written(lenet, options, output=str(tapped))
    options = TransformOptions(weights=WeightOptions(layers=("features.3",), keep=0.5), data=data)
    product = written(tapped, options)
    loaded = load(product.path, tables())
    layer = loaded.model.get_submodule("features.3")
    assert isinstance(layer, CoefficientLayer)
    assert list(taps_of(loaded.model)) == ["features.3"]
    assert stale_taps(loaded.model) == ()
    assert "tap_range" in layer.state_dict()
    assert product.report.layers[0].bytes_before == 4 * 16 * 6 * 25
    assert any("calibrated again" in note for note in product.report.notes)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", ["dct", "bior2.2", "klt"])
def test_devices_agree(kernel: str, lenet: Path) -> None:
    options = TransformOptions(kernel=kernel, weights=WeightOptions(keep=0.5))
    found = []
    for device in ("cpu", "cuda"):
        product = written(lenet, options, runtime=RuntimeOptions(device=device))
        found.append(logits(load(product.path, tables())))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_optimizer_state_is_dropped_and_measurements_stand_beside_it(lenet: Path) -> None:
    state = ResumeState({"moment": torch.zeros(3)}, {})
    save(replace(load(lenet, tables()), resume=state), lenet, tables(), overwrite=True)
    data = DataOptions(data="digits", limit=32)
    options = TransformOptions(weights=WeightOptions(keep=0.1), data=data)
    product = written(lenet, options)
    loaded = load(product.path, tables())
    assert loaded.resume is None
    step = loaded.history[-1]
    assert any("optimizer" in note for note in step.notes)
    assert [metrics.split for metrics in step.metrics_after] == ["validation", "test"]
    assert step.metrics_before[1].values["loss"] != step.metrics_after[1].values["loss"]
    assert step.options["weights"]["keep"] == 0.1


def test_the_command_prints_a_path_a_table_and_json(lenet: Path) -> None:
    output = lenet.with_name("coded.pt")
    command = ["transform", str(lenet), "--layers", "linear", "--keep", "0.25", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    for text in ("classifier.0", "84x120", "out, in", "2,520", "10,080"):
        assert text in result.stderr
    assert isinstance(cctool.load(output).model.get_submodule("classifier.0"), CoefficientLinear)
    result = CliRunner().invoke(app, [*command, "-o", str(output), "--force", "--json", "--quiet"])
    report = json.loads(result.stdout)
    found = report["report"] if "report" in report else report["products"][0]["report"]
    assert found["layers"][0]["kept"] == 2520
    assert found["kernel"] == "dct"
