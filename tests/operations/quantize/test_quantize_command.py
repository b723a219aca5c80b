"""`cctool quantize` from options to files."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cctool.base.errors import CheckpointError, QuantizationError, UsageError
from cctool.base.runtime import Silent
from cctool.checkpoint.checkpoint import Checkpoint, load, save
from cctool.checkpoint.file.payload import ResumeState
from cctool.checkpoint.spec import ModelSpec, Preprocessing
from cctool.cli.main import app
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.context import Context
from cctool.operations.prune import run as prune
from cctool.operations.quantize import run as quantize
from cctool.operations.quantize.report import QuantizeReport
from cctool.operations.registries import tables
from cctool.options.common import DataOptions, ModelOptions, RuntimeOptions
from cctool.options.prune.options import PruneOptions
from cctool.options.quantize.choices import QuantizeMethod, QuantizePreset
from cctool.options.quantize.options import PRESETS, QuantizeOptions
from option_toys import asked

DIGITS = DataOptions(data="digits", limit=64, batch_size=32)


def source(folder: Path, name: str = "resnet20", **arguments: Any) -> Path:
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1} | arguments
    model = registry.build(name, arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    spec = ModelSpec(
        architecture=name,
        arguments=arguments,
        input_shape=(1, 32, 32),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )
    save(Checkpoint(model.eval(), spec), folder / "source.pt", tables())
    return folder / "source.pt"


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return source(tmp_path)


def products(path: Path, options: QuantizeOptions, **request: Any) -> pipeline.Product:
    given = {
        "verb": "quantize",
        "source": str(path),
        "output": str(path.with_name("out.pt")),
        "runtime": RuntimeOptions(device="cpu"),
        "force": True,
    }
    (product,) = pipeline.write(quantize.run, options, pipeline.Request(**(given | request)))
    return product


def run(path: Path, **options: Any) -> tuple[Checkpoint, QuantizeReport]:
    product = products(path, QuantizeOptions(**options))
    return load(product.path, tables()), product.report


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = checkpoint.model.eval()(torch.linspace(-1, 1, 2048).reshape(2, 1, 32, 32))
    return result


def test_the_file_shrinks_and_loads_in_a_new_process(resnet: Path) -> None:
    written = []
    for method, ratio in (("uint8", 3.4), ("fp16", 1.9), ("bf16", 1.9)):
        out = resnet.with_name(f"{method}.pt")
        product = products(resnet, QuantizeOptions(method=QuantizeMethod(method)), output=str(out))
        assert resnet.stat().st_size / out.stat().st_size > ratio
        assert product.report.bytes_before / product.report.bytes_after > ratio
        torch.save(logits(load(out, tables())), f"{out}.logits")
        written.append(str(out))
    script = """
import sys, torch
import cctool
for path in sys.argv[1:]:
    model = cctool.load(path).model
    with torch.no_grad():
        found = model(torch.linspace(-1, 1, 2048).reshape(2, 1, 32, 32))
    assert torch.equal(found, torch.load(path + ".logits"))
"""
    subprocess.run([sys.executable, "-c", script, *written], check=True)


def test_the_product_holds_the_decoded_values_and_the_source_stays(resnet: Path) -> None:
    before = resnet.read_bytes()
    original = load(resnet, tables())
    loaded, report = run(resnet)
    assert resnet.read_bytes() == before
    names = {item.name for item in report.tensors}
    for name, weight in original.model.state_dict().items():
        found = loaded.model.state_dict()[name]
        if name in names:
            wide = weight.numpy().astype(np.float64)
            low, high = wide.min(), wide.max()
            levels = np.round((wide - low) / (high - low) * 255)
            assert np.array_equal(found.numpy(), (levels / 255 * (high - low) + low).astype(np.float32))
        else:
            assert torch.equal(found, weight)
    assert names == {n for n, w in original.model.named_parameters() if w.dim() > 1}


def test_the_checkpoint_that_went_in_stays_as_it_is(resnet: Path) -> None:
    given = replace(load(resnet, tables()), resume=ResumeState({"moment": torch.ones(2)}, {"epoch": 1}))
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    context = Context(
        device=torch.device("cpu"),
        runtime=RuntimeOptions(),
        model_options=ModelOptions(),
        tables=tables(),
        user_code=frozenset(),
        reporter=Silent(),
        output=resnet,
        force=False,
        stamp=lambda outcome: outcome.checkpoint,
    )
    (outcome,) = quantize.run(given, QuantizeOptions(), context)
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())
    assert not torch.equal(outcome.checkpoint.model.fc.weight, given.model.fc.weight)
    assert not given.stored
    assert outcome.checkpoint.resume is None, "moments belong to the values before"


def test_the_report_is_right(resnet: Path) -> None:
    original = load(resnet, tables())
    loaded, report = run(resnet, exclude=("fc.*",))
    state = loaded.model.state_dict()
    for item in report.tensors:
        weight = original.model.state_dict()[item.name].double()
        noise = weight - state[item.name]
        assert item.shape == tuple(weight.shape)
        assert item.bytes_before == 4 * weight.numel()
        assert item.bytes_after == weight.numel() + 8
        assert item.max_error == pytest.approx(float(noise.abs().max()))
        assert item.sqnr_db == pytest.approx(10 * math.log10(float((weight**2).sum() / (noise**2).sum())))
        assert 30 < item.sqnr_db < 60
    everything = {item.name for item in report.tensors} | {item.name for item in report.skipped}
    assert everything == set(state)
    saved = sum(item.bytes_before - item.bytes_after for item in report.tensors)
    assert report.bytes_before - report.bytes_after == saved
    assert report.bytes_before == sum(
        t.numel() * t.element_size() for t in original.model.state_dict().values()
    )
    left = [note for note in report.notes if note.startswith("left alone")]
    assert any("--exclude fc.*" in note for note in left)
    assert loaded.history[-1].notes == report.notes


def test_every_option_changes_something(resnet: Path) -> None:
    def stored(**options: Any) -> dict[str, tuple[str, str]]:
        loaded, _ = run(resnet, **options)
        return {
            name: (form.encoding, json.dumps(dict(form.parameters))) for name, form in loaded.stored.items()
        }

    default = stored()
    assert set(default.values()) == {("affine-u8", '{"axis": null}')}
    assert set(stored(per_channel=True).values()) == {("affine-u8", '{"axis": 0}')}
    assert set(stored(method=QuantizeMethod.FP16).values()) == {("fp16", "{}")}
    assert set(stored(method=QuantizeMethod.BF16).values()) == {("bf16", "{}")}
    with_1d = stored(include_1d=True)
    assert {"bn1.running_var", "bn1.weight", "fc.bias"} <= with_1d.keys() - default.keys()
    assert stored(include=("layer1.*",)).keys() == {n for n in default if n.startswith("layer1.")}
    assert stored(exclude=("layer1.*",)).keys() == {n for n in default if not n.startswith("layer1.")}


def test_per_channel_is_nearer_than_per_tensor(resnet: Path) -> None:
    _, tensor = run(resnet)
    _, channel = run(resnet, per_channel=True)
    for one, other in zip(tensor.tensors, channel.tensors, strict=True):
        assert one.sqnr_db is not None
        assert other.sqnr_db is not None
        assert other.sqnr_db > one.sqnr_db


def test_transposed_convolutions_have_their_channels_in_dimension_one(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.ConvTranspose2d(1, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(6, 3))\n"
    )
    reference = f"{tmp_path}/net.py:make"
    registries = tables((reference,))
    spec = ModelSpec(architecture=reference, input_shape=(1, 8, 8))
    save(Checkpoint(registries.build(reference, {}), spec), tmp_path / "a.pt", registries)
    product = products(
        tmp_path / "a.pt", QuantizeOptions(per_channel=True), model=ModelOptions(arch=reference)
    )
    stored = load(product.path, registries).stored
    assert stored["0.weight"].parameters == {"axis": 1}
    assert stored["0.weight"].parts["low"].shape == (6,)
    assert stored["3.weight"].parameters == {"axis": 0}


def test_quantizing_again(resnet: Path) -> None:
    first, _ = run(resnet)
    again = products(resnet.with_name("out.pt"), QuantizeOptions(), output=str(resnet.with_name("again.pt")))
    second = load(again.path, tables())
    assert torch.equal(logits(first), logits(second)), "the same method again changes nothing"
    assert any("stored as affine-u8: decoded, and encoded anew" in note for note in again.report.notes)
    assert all(item.sqnr_db is None and item.max_error == 0 for item in again.report.tensors)
    assert any("does not shrink" in note for note in again.report.notes)
    other = products(
        resnet.with_name("out.pt"),
        QuantizeOptions(method=QuantizeMethod.FP16, include=("fc.*",)),
        output=str(resnet.with_name("other.pt")),
    )
    mixed = load(other.path, tables())
    assert {form.encoding for form in mixed.stored.values()} == {"affine-u8", "fp16"}
    assert any("tensors stay stored as affine-u8" in note for note in other.report.notes)
    assert [step.verb for step in mixed.history] == ["quantize", "quantize"]


def test_pruning_a_quantized_network_cuts_its_integers(tmp_path: Path) -> None:
    path = source(tmp_path, "mobilenet_student", width=0.25)
    for per_channel in (False, True):
        quantized, _ = run(path, per_channel=per_channel)
        request = pipeline.Request(
            verb="prune",
            source=str(path.with_name("out.pt")),
            output=str(path.with_name("cut.pt")),
            runtime=RuntimeOptions(device="cpu"),
            force=True,
        )
        (product,) = pipeline.write(prune.run, PruneOptions(rate=0.5), request)
        cut = load(product.path, tables())
        assert cut.stored.keys() == quantized.stored.keys()
        smaller = 0
        for name, form in cut.stored.items():
            levels, whole = form.parts["levels"], quantized.stored[name].parts["levels"]
            smaller += levels.numel() < whole.numel()
            # Each remaining row is a row of the quantized network: nothing was rounded a second time.
            assert set(levels.unique().tolist()) <= set(whole.unique().tolist())
            if not per_channel:
                assert torch.equal(form.parts["low"], quantized.stored[name].parts["low"])
                assert torch.equal(form.parts["high"], quantized.stored[name].parts["high"])
        assert smaller
        assert [step.verb for step in cut.history] == ["quantize", "prune"]


def test_tied_weights_are_encoded_once(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x.flatten(1)))\n"
    )
    reference = f"{tmp_path}/net.py:Net"
    registries = tables((reference,))
    spec = ModelSpec(architecture=reference, input_shape=(1, 8, 8))
    save(Checkpoint(registries.build(reference, {}), spec), tmp_path / "a.pt", registries)
    product = products(tmp_path / "a.pt", QuantizeOptions(), model=ModelOptions(arch=reference))
    loaded = load(product.path, registries)
    assert loaded.stored["a.weight"] is loaded.stored["b.weight"]
    assert loaded.model.a.weight is loaded.model.b.weight
    (item,) = product.report.tensors
    assert (item.name, item.tied) == ("a.weight", ("b.weight",))
    assert product.report.bytes_after == 64 * 64 + 8 + 2 * 64 * 4


def test_metrics_before_and_after(resnet: Path) -> None:
    product = products(resnet, QuantizeOptions(data=DIGITS, include_1d=True))
    report = product.report
    assert [(m.split, m.n) for m in report.metrics_before] == [("validation", 64), ("test", 64)]
    assert [m.split for m in report.metrics_after] == ["validation", "test"]
    assert report.metrics_before[0].values["loss"] != report.metrics_after[0].values["loss"]
    assert product.step.metrics_after == report.metrics_after
    assert not products(resnet, QuantizeOptions()).report.metrics_before, "without data, nothing is measured"


def test_missing_data(resnet: Path, tmp_path: Path) -> None:
    class Listener:
        warnings: Sequence[str] = ()

        def note(self, text: str) -> None: ...

        def warn(self, text: str) -> None:
            self.warnings = (*self.warnings, text)

        def progress(self, items: Any, description: str, total: int | None = None) -> Any:
            return items

    gone = f"folder:{tmp_path}/gone"
    checkpoint = load(resnet, tables())
    spec = checkpoint.spec.model_copy(update={"data": gone})
    save(Checkpoint(checkpoint.model, spec), tmp_path / "remembers.pt", tables())
    listener = Listener()
    product = products(tmp_path / "remembers.pt", QuantizeOptions(), reporter=listener)
    assert product.report.metrics_after == ()
    assert any("last data set cannot be opened" in text for text in listener.warnings)
    with pytest.raises(Exception, match="gone"):
        products(resnet, QuantizeOptions(data=DataOptions(data=gone)))


def test_preset_lhy_hw7_is_the_homework(tmp_path: Path) -> None:
    assert set(PRESETS) == set(QuantizePreset)
    path = source(tmp_path, "mobilenet_student", num_classes=11)
    original = load(path, tables()).model.state_dict()
    loaded = load(products(path, asked(QuantizeOptions, QuantizePreset.LHY_HW7)).path, tables())
    found = loaded.model.state_dict()
    for name, weight in original.items():
        assert (name in loaded.stored) == (weight.dim() > 0)
        if weight.dim() and weight.min() != weight.max():
            assert loaded.stored[name].parameters == {"axis": None}
            wide = weight.numpy().astype(np.float64)
            low, high = wide.min(), wide.max()
            values = np.round((wide - low) / (high - low) * 255) / 255 * (high - low) + low
            assert np.array_equal(found[name].numpy(), values.astype(np.float32)), name
        else:
            assert torch.equal(found[name], weight), name
    given = asked(QuantizeOptions, QuantizePreset.LHY_HW7, include_1d=False)
    assert given.include_1d is False, "what is given stands"


def test_what_cannot_be_quantized(resnet: Path) -> None:
    with pytest.raises(UsageError, match=r"--per-channel.*--method uint8"):
        QuantizeOptions(method=QuantizeMethod.FP16, per_channel=True)
    with pytest.raises(QuantizationError, match=r"nothing is left to quantize: .*--exclude"):
        run(resnet, exclude=("*",))
    with pytest.raises(UsageError, match="no tensor has such a name"):
        run(resnet, include=("nobody",))
    checkpoint = load(resnet, tables())
    with torch.no_grad():
        checkpoint.model.fc.weight[0, 0] = 1e6
    save(checkpoint, resnet.with_name("large.pt"), tables())
    with pytest.raises(QuantizationError, match=r"fc\.weight: fp16 .*--exclude leaves it"):
        products(resnet.with_name("large.pt"), QuantizeOptions(method=QuantizeMethod.FP16))
    with torch.no_grad():
        checkpoint.model.fc.weight[0, 0] = float("nan")
    save(checkpoint, resnet.with_name("nan.pt"), tables())
    with pytest.raises(CheckpointError, match="NaN"):
        products(resnet.with_name("nan.pt"), QuantizeOptions())
    with pytest.raises(QuantizationError, match=r"fc\.weight: .*1 NaN"):
        products(resnet.with_name("nan.pt"), QuantizeOptions(), allow_nonfinite=True)


def test_the_command_prints_its_path_and_nothing_else(resnet: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(resnet), "--method", "uint8"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{resnet.with_name('source.quantize.pt')}\n"
    assert "smaller" in result.stderr
    assert "left alone" in result.stderr
    again = CliRunner().invoke(app, ["quantize", str(resnet)])
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_the_command_line_reaches_every_option(resnet: Path) -> None:
    arguments = [
        "quantize",
        str(resnet),
        "--json",
        "--per-channel",
        "--include-1d",
        "--include",
        "layer*",
        "--include",
        "fc*",
        "--exclude",
        "layer2*",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    (product,) = json.loads(result.stdout)["products"]
    options = product["step"]["options"]
    assert options["per_channel"] is True
    assert options["include_1d"] is True
    assert options["include"] == ["layer*", "fc*"]
    assert options["exclude"] == ["layer2*"]
    assert options["method"] == "uint8"
    names = {item["name"] for item in product["report"]["tensors"]}
    assert "layer1.0.conv1.weight" in names
    assert not any(name.startswith(("layer2", "conv1")) for name in names)


def test_a_preset_on_the_command_line_yields_to_what_is_given(resnet: Path) -> None:
    arguments = ["quantize", str(resnet), "--json", "--preset", "lhy-hw7", "--per-channel"]
    (product,) = json.loads(CliRunner().invoke(app, arguments).stdout)["products"]
    options = product["step"]["options"]
    assert (options["preset"], options["include_1d"], options["per_channel"]) == ("lhy-hw7", True, True)


@pytest.mark.cuda
def test_cuda_gives_the_same_bytes(resnet: Path) -> None:
    for per_channel in (False, True):
        paths = []
        for device in ("cpu", "cuda"):
            product = products(
                resnet,
                QuantizeOptions(per_channel=per_channel),
                runtime=RuntimeOptions(device=device),
                output=str(resnet.with_name(f"{device}.pt")),
            )
            paths.append(product.path)
        stored = [load(path, tables()).stored for path in paths]
        for name, form in stored[0].items():
            for key, part in form.parts.items():
                assert torch.equal(part, stored[1][name].parts[key])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--method apot --weight-bits 4 --terms 9", "--terms 9: 1 to 3 are allowed with 4 bits"),
        ("--method apot --terms 0", "--terms 0: 1 to 3 are allowed with 4 bits"),
        ("--method apot --weight-bits 2 --terms 2", "--terms 2: 1 is allowed with 2 bits"),
        ("--method int8 --weight-only --layer *=1", "--layer *=1: a weight has 2 bits or more"),
        ("--method int8 --layer fc=1", "--layer fc=1: a weight has 2 bits or more"),
        ("--method qat --layer fc=w1a8", "--layer fc=1: a weight has 2 bits or more"),
        ("--method lsq --layer fc=1", "--layer fc=1: a weight has 2 bits or more"),
        ("--method wrpn --layer fc=1", "--layer fc=1: a weight has 2 bits or more"),
        ("--method int8 --layer fc=w8a1", "--layer fc: 1 bit is not enough for activations"),
        ("--method lsq --layer fc=w8a1", "--layer fc: 1 bit is not enough for activations"),
        (
            "--method dorefa --activation-bits 0",
            "--activation-bits 0: 1 to 8 are allowed",
        ),
        ("--method wrpn --weight-bits 1", "--weight-bits 1: 2 to 8 are allowed with --method wrpn"),
    ],
)
def test_bits_and_terms_that_a_method_lacks_are_wrong_command_lines(line: str, said: str) -> None:
    # No such file: nothing is opened before.
    found = CliRunner().invoke(app, ["quantize", "missing.pt", "-o", "out.pt", *line.split()])
    assert found.exit_code == 2
    assert said in found.output.replace("\n", " ")


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_all_terms_that_are_allowed_are_possible(resnet: Path, terms: int) -> None:
    products(resnet, QuantizeOptions(method=QuantizeMethod.APOT, weight_bits=4, terms=terms))
    stored = load(resnet.with_name("out.pt"), tables()).stored
    assert {form.parameters["terms"] for form in stored.values() if form.encoding == "codebook"} == {terms}
