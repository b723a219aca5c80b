"""`cctool analyze` from options to files and tables."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import onnx
import openpyxl
import pytest
import torch
from typer.testing import CliRunner

from cctool.base.errors import ArchitectureError, CheckpointError, ExportError, UsageError
from cctool.checkpoint.checkpoint import Checkpoint, save
from cctool.checkpoint.spec import Metrics, ModelSpec, Parent, Size, Step
from cctool.cli.main import app
from cctool.models import registry
from cctool.operations import pipeline
from cctool.operations.inspect import analyze
from cctool.operations.inspect.analyze import AnalyzeReport, run
from cctool.operations.registries import tables
from cctool.options.common import ModelOptions, RuntimeOptions
from cctool.options.inspect.analyze import AnalyzeOptions

LENET_MACS = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
STEP = Step(
    verb="train",
    options={"epochs": 3, "data": {"data": "digits", "batch_size": 128}, "runtime": {"device": "auto"}},
    seed=7,
    parent=Parent(path="before.pt", content="a" * 64, file="b" * 64),
    after=Size(parameters=61_706, macs=LENET_MACS, bytes=246_824),
    metrics_after=(Metrics(split="test", n=300, values={"top1": 97.25}),),
    notes=("left something alone",),
)


def written_checkpoint(path: Path, *, nan: bool = False) -> Path:
    torch.manual_seed(0)
    model = registry.build("lenet", {})
    if nan:
        with torch.no_grad():
            next(model.parameters()).view(-1)[3] = math.nan
    spec = ModelSpec(architecture="lenet", input_shape=(1, 32, 32))
    save(Checkpoint(model, spec, history=(STEP,)), path, tables())
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return written_checkpoint(tmp_path / "net.pt")


DEFAULT = AnalyzeOptions()


def analyzed(source: Path, options: AnalyzeOptions = DEFAULT, **request: Any) -> AnalyzeReport:
    given = {"verb": "analyze", "source": str(source), "runtime": RuntimeOptions(device="cpu")} | request
    return pipeline.read(run, options, pipeline.Request(**given))


def invoked(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)], env={"COLUMNS": "300"})


def test_the_report_adds_up(net: Path) -> None:
    report = analyzed(net)
    assert report.analysis is not None
    totals = report.analysis.layers.totals
    assert totals.parameters == 61_706
    assert totals.macs == LENET_MACS
    assert totals.bytes == 4 * 61_706
    assert report.source is not None
    assert report.source.file == hashlib.sha256(net.read_bytes()).hexdigest()
    assert report.written == ()
    assert {line.kind for line in report.analysis.cross_check.lines} >= {"convolution and linear"}


def test_the_command_of_the_mission_works_just_so(net: Path) -> None:
    result = invoked(net, "--macs", "--onnx")
    assert result.exit_code == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == sorted(
        [str(net.with_suffix(".onnx")), str(net.parent / "net.macs.xlsx")]
    )
    onnx.checker.check_model(net.with_suffix(".onnx"))
    assert openpyxl.load_workbook(net.parent / "net.macs.xlsx")["MACs"]["A2"].value
    assert "max abs error" in result.stderr


@pytest.mark.parametrize("kind", ["macs", "sparsity"])
@pytest.mark.parametrize("suffix", [".xlsx", ".csv", ".json"])
def test_files_are_named_and_their_suffix_decides(net: Path, kind: str, suffix: str) -> None:
    path = net.parent / f"table{suffix}"
    report = analyzed(net, AnalyzeOptions(**{f"{kind}_file": str(path)}))  # type: ignore[arg-type]
    assert [(file.path, file.format) for file in report.written] == [(str(path), kind)]
    head = path.read_bytes()[:2]
    assert head == {".xlsx": b"PK", ".csv": b"Na", ".json": b"{\n"}[suffix]
    assert {child.name for child in net.parent.iterdir()} == {"net.pt", path.name}


def test_sparsity_is_written_beside_the_input(net: Path) -> None:
    analyzed(net, AnalyzeOptions(sparsity=True))
    sheet = openpyxl.load_workbook(net.parent / "net.sparsity.xlsx")["Sparsity"]
    assert sheet["C7"].value == "=SUM(C2:C6)"


def test_onnx_file_is_written_where_it_was_asked_for(net: Path) -> None:
    path = net.parent / "other.onnx"
    analyzed(net, AnalyzeOptions(onnx_file=str(path)))
    onnx.checker.check_model(path)


def test_names_that_no_writer_takes_are_wrong_usage(net: Path) -> None:
    with pytest.raises(UsageError, match=r"--macs-file a\.txt.*--onnx-file b\.pt"):
        AnalyzeOptions(macs_file="a.txt", onnx_file="b.pt")
    with pytest.raises(UsageError, match="one name"):
        analyzed(net, AnalyzeOptions(macs_file="a.csv", sparsity_file="a.csv"))


def test_existing_files_stop_everything_unless_forced(net: Path) -> None:
    path = net.parent / "net.sparsity.xlsx"
    path.write_text("mine")
    options = AnalyzeOptions(macs=True, sparsity=True)
    with pytest.raises(CheckpointError, match="exists already"):
        analyzed(net, options)
    assert path.read_text() == "mine"
    assert not (net.parent / "net.macs.xlsx").exists()
    analyzed(net, options, force=True)
    assert path.read_bytes()[:2] == b"PK"


def test_the_input_size_changes_what_is_counted(tmp_path: Path) -> None:
    model = registry.build("resnet20", {})
    save(
        Checkpoint(model, ModelSpec(architecture="resnet20", input_shape=(3, 32, 32))),
        tmp_path / "r.pt",
        tables(),
    )
    large, small = (
        analyzed(tmp_path / "r.pt", model=ModelOptions(input_shape=shape)) for shape in (None, (3, 16, 16))
    )
    assert large.analysis is not None
    assert small.analysis is not None
    classifier = 64 * 10
    assert large.analysis.layers.totals.macs - classifier == 4 * (
        small.analysis.layers.totals.macs - classifier
    )


def test_an_input_size_that_does_not_fit_is_one_clear_line(net: Path) -> None:
    with pytest.raises(ArchitectureError, match="1x8x8"):
        analyzed(net, model=ModelOptions(input_shape=(1, 8, 8)))
    result = invoked(net, "--input", "1x8x8")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_nan_weights_are_not_exported(tmp_path: Path) -> None:
    source = written_checkpoint(tmp_path / "net.pt", nan=True)
    with pytest.raises(ExportError, match=r"INPUT holds 1 NaN.*net\.macs\.xlsx was written"):
        analyzed(source, AnalyzeOptions(onnx=True, macs=True))
    assert {path.name for path in tmp_path.iterdir()} == {"net.pt", "net.macs.xlsx"}


def test_workbooks_are_kept_where_the_onnx_file_is_refused(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ExportError("it does not compute the same")

    monkeypatch.setattr(analyze, "export", refused)
    result = invoked(net, "--macs", "--sparsity", "--onnx")
    assert result.exit_code == 1
    assert result.stdout == ""
    kept = [net.parent / "net.macs.xlsx", net.parent / "net.sparsity.xlsx"]
    assert f"it does not compute the same; {kept[0]} and {kept[1]} were written" in result.stderr.replace(
        "\n", ""
    )
    for path in kept:
        assert openpyxl.load_workbook(path).sheetnames
    assert not net.with_suffix(".onnx").exists()


def test_nan_is_reported_and_does_not_stop_the_tables(tmp_path: Path) -> None:
    source = written_checkpoint(tmp_path / "net.pt", nan=True)
    result = invoked(source, "--sparsity")
    assert result.exit_code == 0, result.stderr
    assert "1 NaN or infinite values in 1 tensors" in result.stderr
    report = analyzed(source, AnalyzeOptions(sparsity=True), force=True)
    assert [(fault.nan, fault.infinite) for fault in report.nonfinite] == [(1, 0)]
    assert "not finite" in invoked(source).stdout
    document = json.loads(invoked(source, "--json").stdout)
    assert document["nonfinite"][0]["nan"] == 1
    with pytest.raises(ExportError, match="NaN"):
        analyzed(source, AnalyzeOptions(onnx=True))
    assert not source.with_suffix(".onnx").exists()


def test_the_plain_command_prints_layers_totals_and_history(net: Path) -> None:
    result = invoked(net)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    (total,) = (line for line in lines if line.split()[:1] == ["total"])
    assert "61,706" in total
    assert f"{LENET_MACS:,}" in total
    (step,) = (line for line in lines if line.split()[:2] == ["1", "train"])
    for part in ("epochs=3", "data.data=digits", "61,706", "97.25", "n=300", "before.pt", "a" * 12):
        assert part in step
    assert "batch_size" not in step


def test_the_whole_history_names_every_hash(net: Path) -> None:
    text = invoked(net, "--history").stdout
    for part in (
        "a" * 64,
        "b" * 64,
        "seed: 7",
        "data.batch_size: 128",
        "left something alone",
        "246,824 bytes",
    ):
        assert part in text


def test_the_spec_alone_is_json_that_builds_the_network_again(net: Path) -> None:
    text = invoked(net, "--spec").stdout
    assert ModelSpec.model_validate_json(text).architecture == "lenet"
    torch.save(registry.build("lenet", {}).state_dict(), net.parent / "bare.pt")
    (net.parent / "spec.json").write_text(text)
    result = invoked(net.parent / "bare.pt", "--with-spec", net.parent / "spec.json", "--json")
    assert json.loads(result.stdout)["analysis"]["layers"]["totals"]["macs"] == LENET_MACS


def test_json_is_one_document_with_everything(net: Path) -> None:
    result = invoked(net, "--json", "--macs")
    document = json.loads(result.stdout)
    assert set(document) == {"source", "spec", "history", "nonfinite", "analysis", "written"}
    assert set(document["analysis"]) == {"layers", "sparsity", "cross_check"}
    assert document["written"][0]["path"].endswith("net.macs.xlsx")
    assert document["history"][0]["verb"] == "train"


def test_history_and_spec_count_nothing(net: Path) -> None:
    for options in (AnalyzeOptions(history=True), AnalyzeOptions(spec=True)):
        assert analyzed(net, options).analysis is None
    assert analyzed(net, AnalyzeOptions(macs=True)).analysis is not None
    assert invoked(net, "--history", "--spec").exit_code == 2


@pytest.mark.cuda
def test_a_gpu_counts_the_same(net: Path) -> None:
    on_cpu, on_gpu = (analyzed(net, runtime=RuntimeOptions(device=device)) for device in ("cpu", "cuda"))
    assert on_cpu.analysis is not None
    assert on_gpu.analysis is not None
    assert on_cpu.analysis.layers == on_gpu.analysis.layers
    assert on_cpu.analysis.cross_check == on_gpu.analysis.cross_check
    for left, right in zip(on_cpu.analysis.sparsity, on_gpu.analysis.sparsity, strict=True):
        # Sums in another order: equal to double rounding.
        assert left.fine == right.fine
        assert left.std == pytest.approx(right.std, rel=1e-12)
