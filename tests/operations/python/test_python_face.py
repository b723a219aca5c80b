"""The verbs as functions: the commands' tensors and history, in memory, on the caller's own data."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import cctool
from cctool.cli.main import app
from cctool.data.registry import open_data
from cctool.data.serving.batches import batches
from cctool.operations.python.calls import keywords
from cctool.options.verbs import VERBS

ROOT = Path(__file__).parents[3]
FEW = ("--data", "digits", "--limit", "96", "--batch-size", "32")


def ran(*line: object) -> None:
    result = CliRunner().invoke(app, [str(word) for word in line])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("face")
    ran("train", "--arch", "resnet20", "--arg", "base=4", "--epochs", "1", *FEW, "-o", folder / "net.pt")
    return folder


@pytest.fixture
def net(folder: Path) -> cctool.Checkpoint:
    return cctool.load(folder / "net.pt")


def same(one: cctool.Checkpoint, other: cctool.Checkpoint) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert one.spec == other.spec
    assert {name: form.encoding for name, form in one.stored.items()} == {
        name: form.encoding for name, form in other.stored.items()
    }


def example() -> str:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]


def test_the_example_of_the_docs_equals_the_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = example()
    assert len(code.strip().splitlines()) < 25
    work = folder / "example"
    work.mkdir()
    (work / "net.pt").write_bytes((folder / "net.pt").read_bytes())
    monkeypatch.chdir(work)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    ran("prune", "net.pt", *["--method", "l1", "--rate", "0.5", "--recalibrate", "256", "--data", "digits"])
    ran("quantize", "net.prune.pt", *["--method", "int8", "--data", "digits"])
    ran("export", "net.prune.quantize.pt", "-o", "commands.onnx", "--data", "digits")
    made, written = names["quantized"], cctool.load("net.prune.quantize.pt")
    same(made, written)
    same(cctool.load("net.int8.pt"), written)
    assert [step.options for step in made.history] == [step.options for step in written.history]
    assert [step.metrics_after for step in made.history] == [step.metrics_after for step in written.history]
    pruned = cctool.load("net.prune.pt")
    assert made.history[-1].parent is not None
    assert written.history[-1].parent is not None
    assert made.history[-1].parent.content == written.history[-1].parent.content == pruned.origin.content  # type: ignore[union-attr]
    first, second = (onnx.load(name).graph.initializer for name in ("net.onnx", "commands.onnx"))
    assert [item.SerializeToString() for item in first] == [item.SerializeToString() for item in second]


def served(split: str, *, shuffle: bool = False, limit: int | None = 96) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that a command sees, as the network gets them."""
    source = open_data("digits", limit=limit, input_shape=(1, 32, 32))
    found = batches(source.split(split), batch_size=32, mean=source.mean, std=source.std, shuffle=shuffle)
    for batch in found:
        assert batch.labels is not None
        yield batch.images, batch.labels


def whole(split: str) -> tuple[Tensor, Tensor]:
    images, labels = zip(*served(split), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_loader_of_the_same_batches_gives_the_commands_tensors(
    folder: Path, net: cctool.Checkpoint
) -> None:
    ran("quantize", folder / "net.pt", "--method", "int8", "--calibration", "64", *FEW, "-o", folder / "q.pt")
    loader = list(served("train", shuffle=True))
    made, report = cctool.quantize(net, method="int8", calibration=64, data=Again(loader))
    written = cctool.load(folder / "q.pt")
    for name, tensor in written.model.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[name]), name
    assert made.history[-1].options["data"]["data"] == "in memory (n=96, 1x32x32)"
    assert made.spec == net.spec.model_copy(update={"edits": made.spec.edits})
    assert report.metrics_after == ()


class Again:
    """A loader of one's own: an iterable that starts anew each time."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


@pytest.mark.filterwarnings("ignore::cctool.CctoolWarning")
def test_tensors_give_the_commands_tensors_and_metrics(folder: Path, net: cctool.Checkpoint) -> None:
    line = ["--method", "taylor", "--rate", "0.1", "--samples", "64", "--recalibrate", "64"]
    ran("prune", folder / "net.pt", *line, *FEW, "-o", folder / "p.pt")
    made, _ = cctool.prune(
        net,
        method="taylor",
        rate=0.1,
        samples=64,
        recalibrate=64,
        batch_size=32,
        data=whole("train"),
        val_data=whole("validation"),
        test_data=whole("test"),
    )
    written = cctool.load(folder / "p.pt")
    same(made, written)
    assert made.history[-1].metrics_after == written.history[-1].metrics_after


@pytest.mark.filterwarnings("ignore::cctool.CctoolWarning")
def test_values_stand_for_text(net: cctool.Checkpoint) -> None:
    wanted, _ = cctool.prune(net, method="l1", granularity="nm", pattern="2:4")
    found, _ = cctool.prune(net, method="l1", granularity="nm", pattern=(2, 4))
    same(wanted, found)
    assert wanted.history == found.history
    fresh, _ = cctool.train(arch="lenet", input=[1, 32, 32], mean=0.5, std=(0.25,), epochs=0)
    assert fresh.spec.input_shape == (1, 32, 32)
    assert fresh.spec.preprocessing is not None
    assert fresh.spec.preprocessing.std == (0.25,)


@pytest.mark.filterwarnings("ignore::cctool.CctoolWarning")
def test_history_names_no_file_of_a_network_in_memory(net: cctool.Checkpoint) -> None:
    made = [cctool.prune(net, method="l1", rewind=net)[0].history for _ in range(2)]
    assert made[0][-1].options["rewind"] == "in memory"
    assert made[0] == made[1]


@pytest.mark.parametrize("loaded", [False, True])
def test_exports_are_compared_on_data_in_memory(net: cctool.Checkpoint, tmp_path: Path, loaded: bool) -> None:
    images, labels = whole("test")
    data = DataLoader(TensorDataset(images, labels), batch_size=20) if loaded else (images, labels)
    _, report = cctool.export(net, output=tmp_path / "a.onnx", data=data)
    assert "in memory" in report.files[0].agreements[-1].inputs


def test_a_loader_with_labels_is_measured_as_its_tensors(net: cctool.Checkpoint) -> None:
    images, labels = whole("test")
    loader = DataLoader(TensorDataset(images, labels), batch_size=20)
    found = cctool.evaluate(net, data=loader)
    assert found.metrics is not None
    assert found.metrics.values["top1"] == cctool.evaluate(net, data=(images, labels)).metrics.values["top1"]
    with pytest.raises(cctool.CctoolError, match="no labels"):
        cctool.evaluate(net, data=DataLoader(images))


def test_what_goes_in_is_never_changed(net: cctool.Checkpoint) -> None:
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    cctool.prune(net, rate=0.5, method="l1", finetune_epochs=1, data="digits", limit=32)
    cctool.quantize(net, method="int8", data="digits", limit=32)
    cctool.transform(net, keep=0.5)
    cctool.train(net, epochs=1, data="digits", limit=32)
    cctool.evaluate(net, data="digits", limit=32)
    after = net.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(net.history) == 1


def test_several_products_are_a_list_and_a_plan_is_reports(net: cctool.Checkpoint) -> None:
    steps = cctool.prune(net, steps=2, rate=0.5, method="l1")
    assert [report.step for _, report in steps] == [1, 2]
    plan = cctool.prune(net, rate=0.5, method="l1", dry_run=True)
    assert plan[0].cut.families
    reports = cctool.compare([net, steps[1][0]], data="digits", limit=32)
    assert reports[0].parameters > reports[1].parameters


def test_fresh_networks_teachers_in_memory_and_loaders(net: cctool.Checkpoint) -> None:
    loader = DataLoader(TensorDataset(*whole("train")), batch_size=16)
    student, report = cctool.distill(
        arch="lenet", arg="num_classes=10", input="1x32x32", teacher=net, data=loader, epochs=1
    )
    assert report.epochs == 1
    assert student.spec.data is None
    assert student.spec.preprocessing is None
    teacher = student.history[0].others["teacher"]
    assert net.origin is not None
    assert teacher.content == net.origin.content
    measured = cctool.evaluate(student, data=whole("test"))
    assert measured.n == 96
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cctool.quantize(student, method="int8", data=whole("train")[0])


def test_maps_are_decoded_and_exports_are_not_replaced_unasked(
    net: cctool.Checkpoint, tmp_path: Path
) -> None:
    coded, _ = cctool.transform(net, target="features", calibration=32, data="digits", limit=32)
    cctool.evaluate(coded, data="digits", limit=32, bitstream=tmp_path / "maps")
    report = cctool.decode(tmp_path / "maps", output=tmp_path / "npy")
    assert report.maps
    path, _ = cctool.export(net, output=tmp_path / "net.onnx", data="digits", limit=32)
    assert Path(path).exists()
    with pytest.raises(cctool.CctoolError, match="exists already"):
        cctool.export(net, output=tmp_path / "net.onnx")
    cctool.export(net, output=tmp_path / "net.onnx", force=True)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"ratee": 0.5}, TypeError, "near: rate"),
        ({"rate": 2}, cctool.CctoolError, r"\[0, 1\) is allowed"),
        ({"rate": "half"}, cctool.CctoolError, "float is expected"),
        ({"method": "best"}, cctool.CctoolError, "slimming, l1"),
        ({"alpha": 0.5}, cctool.CctoolError, "there is no --teacher"),
        ({"plot": True}, cctool.CctoolError, "output= says"),
        ({"mean": "0.5", "std": "0.5"}, cctool.CctoolError, "fresh networks"),
        ({"finetune_epochs": 1, "data": 3}, cctool.CctoolError, "a loader, a pair of tensors"),
        (
            {"finetune_epochs": 1, "data": torch.zeros(2, 1, 32, 32).byte()},
            cctool.CctoolError,
            "floating-point",
        ),
        (
            {"finetune_epochs": 1, "data": (torch.zeros(2, 1, 32, 32), torch.zeros(3))},
            cctool.CctoolError,
            r"\[2\]",
        ),
        ({"data": torch.zeros(2, 1, 32, 32), "val_data": "digits"}, cctool.CctoolError, "give one kind"),
        (
            {"finetune_epochs": 1, "data": {"training": torch.zeros(2, 1, 32, 32)}},
            cctool.CctoolError,
            "training",
        ),
        (
            {"data": (torch.zeros(2, 1, 32, 5), torch.zeros(2).long()), "finetune_epochs": 1},
            cctool.CctoolError,
            "in memory are 1x32x5, and the network takes 1x32x32",
        ),
        ({"target": 0.5}, cctool.CctoolError, "QUANTITY=VALUE"),
        ({"pattern": 24, "granularity": "nm"}, cctool.CctoolError, "N:M"),
        ({"block": (4, 1, 2), "granularity": "block"}, cctool.CctoolError, "ROWSxCOLUMNS is expected"),
        ({"round_to": 2.5}, cctool.CctoolError, "a whole number"),
        ({"exclude": 5}, cctool.CctoolError, "a list of GLOB"),
        ({"exclude": [5]}, cctool.CctoolError, "a list of GLOB"),
        ({"data": [{"x": 1}], "finetune_epochs": 1}, cctool.CctoolError, "not list of dict"),
        (
            {"data": (torch.zeros(2, 1, 32, 32) for _ in range(2)), "finetune_epochs": 1},
            cctool.CctoolError,
            "once only",
        ),
    ],
)
def test_wrong_calls(
    net: cctool.Checkpoint, values: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        cctool.prune(net, **values)


def test_files_that_nobody_named_are_refused(net: cctool.Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(cctool.CctoolError, match="export needs output"):
        cctool.export(net)
    with pytest.raises(cctool.CctoolError, match="macs_file"):
        cctool.analyze(net, macs=True)
    report = cctool.analyze(net, macs_file=tmp_path / "macs.csv")
    assert Path(report.written[0].path).exists()


def test_what_is_no_checkpoint_is_named() -> None:
    with pytest.raises(TypeError, match="takes a Checkpoint"):
        cctool.prune("net.pt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Checkpoint"):
        cctool.prune()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="a list of checkpoints"):
        cctool.compare(cctool.load)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs output="):
        cctool.decode("streams")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="save\\(\\) takes a Checkpoint"):
        cctool.save(5, "a.pt")  # type: ignore[arg-type]


def test_warnings_are_pythons(net: cctool.Checkpoint) -> None:
    noise = (torch.randn(64, 1, 32, 32), torch.arange(64) % 10)
    unknown = cctool.Checkpoint(net.model, net.spec.model_copy(update={"preprocessing": None}))
    with pytest.warns(cctool.CctoolWarning, match="unknown"):
        cctool.evaluate(unknown, data="digits", limit=32)
    assert cctool.evaluate(net, data=noise).n == 64


def test_the_stub_lists_what_the_options_say() -> None:
    path = ROOT / "docs" / "python_stub.py"
    spec = importlib.util.spec_from_file_location("python_stub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.STUB.read_text(encoding="utf-8")
    assert ast.dump(ast.parse(written)) == ast.dump(ast.parse(module.stub()))
    for function in ast.parse(written).body:
        if isinstance(function, ast.FunctionDef):
            named = [argument.arg for argument in function.args.kwonlyargs]
            assert named == [leaf.keyword for leaf in keywords(VERBS[function.name])]
            assert named == list(inspect.signature(getattr(cctool, function.name)).parameters)[1:]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'typer', 'numpy'} & set(sys.modules)"
    code = f"import sys, cctool; assert 'prune' in dir(cctool); print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
